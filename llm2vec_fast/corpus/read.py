"""Inputs to rows: what a user names (files, directories, globs, URLs, stdin), read row by row."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from llm2vec_fast.corpus.formats import (
    BOM,
    COMPRESSED,
    STDIN,
    Columns,
    JsonLines,
    Position,
    Reader,
    Row,
    Source,
    TextLines,
    WholeFiles,
)
from llm2vec_fast.corpus.tables import CsvRecords, ParquetRows

__all__ = ["Columns", "Position", "Row", "Rows", "Source", "open_sources", "size_of"]

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
READERS: dict[str, type[Reader]] = {
    "txt": TextLines,
    "jsonl": JsonLines,
    "csv": CsvRecords,
    "tsv": CsvRecords,
    "parquet": ParquetRows,
    "files": WholeFiles,
}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
READ = "only .txt, .jsonl, .ndjson, .csv, .tsv (each also .gz or .zst) and .parquet are read"


class Rows:
    """The rows of a source from `start` on.

    Seekable sources start there in constant time (Parquet: at its row group). Compressed files
    and stdin are read again from their beginning; stdin can be opened once in a process.

    raises: ValueError naming the input and the row reached, when it cannot be read (on)
    """

    def __init__(self, source: Source, columns: Columns, start: Position = Position()):  # noqa: B008
        self.source = source
        self.done = False
        self._reader = READERS[source.format](source, columns)
        try:
            self._reader.open(start)
        except BaseException as error:
            self._reader.close()
            if _is_unreadable(error, source.name):
                raise ValueError(f"input {source.name} cannot be read: {error}") from error
            raise

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *exc_info) -> None:
        self._reader.close()

    @property
    def position(self) -> Position:
        """The place after everything taken or skipped."""
        return Position(self._reader.row, self._reader.offset)

    def take(self, count: int) -> tuple[list[Row], Position]:
        """The next `count` rows and the place after them; fewer only at the end."""
        rows = self._guarded(self._reader.take, count)
        self.done = len(rows) < count
        return rows, self.position

    def skip(self, count: int) -> Position:
        """Moves `count` rows on, or to the end, parsing no more than it must."""
        goal = self._reader.row + count
        self._guarded(self._reader.skip, count)
        self.done = self._reader.row < goal
        return self.position

    def _guarded(self, move, count: int):
        try:
            return move(count)
        except Exception as error:
            if not _is_unreadable(error, self.source.name):
                raise
            raise ValueError(
                f"input {self._reader.where} cannot be read beyond row {self._reader.row}: {error}"
            ) from error


def open_sources(inputs: Sequence[str | Path], whole_files: bool = False) -> list[Source]:
    """The sources that `inputs` name, in that order; those of a directory or glob sorted.

    inputs:      files, directories (searched to the bottom; hidden files, unknown suffixes and
                 outputs of this program are left out), globs (with **), fsspec URLs of all these,
                 `-` for stdin
    whole_files: each file, whatever its suffix, is one document; an input is one source
    raises:      ValueError for what is missing, unreadable, of another format, or named twice
    """
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    if not inputs:
        raise ValueError("no inputs: name files, directories, globs or - for stdin")
    sources: list[Source] = []
    for given in inputs:
        name = given.as_posix() if isinstance(given, Path) else given
        try:
            sources += _sources_of(name, whole_files)
        except Exception as error:
            if not _is_unreadable(error, name):
                raise
            raise ValueError(f"input {name} cannot be read: {error}") from error
    _refuse_twice(sources)
    return sources


def size_of(source: Source) -> int | None:
    """Bytes as stored (compressed, if so), of all files; None for stdin or where unknown."""
    if source.name == STDIN:
        return None
    try:
        sizes = [_size(path) for path in source.files]
    except Exception as error:
        if not _is_unreadable(error, source.name):
            raise
        raise ValueError(f"input {source.name} cannot be read: {error}") from error
    return None if None in sizes else sum(sizes)


def _is_unreadable(error: BaseException, name: str) -> bool:
    """Whether an error is the input's. Behind URLs every library raises kinds of its own."""
    if isinstance(error, OSError | pa.ArrowException | ImportError | UnicodeDecodeError):
        return True
    return bool(URL.match(name)) and isinstance(error, Exception) and type(error) is not ValueError


def _size(path: str) -> int | None:
    if not URL.match(path):
        return os.stat(path).st_size
    import fsspec

    filesystem, inside = fsspec.core.url_to_fs(path)
    return filesystem.size(inside)


def _sources_of(name: str, whole_files: bool) -> list[Source]:
    if name == STDIN:
        if whole_files:
            raise ValueError("stdin is not a file of whole files: leave out --whole-files, or -")
        return [_stdin()]
    files, searched = _url_files(name) if URL.match(name) else _local_files(name)
    if whole_files and files:
        return [Source(name, "files", tuple(files), True)]
    if searched:  # a directory may hold anything
        files = [path for path in files if _format_of(path)]
    if not files:
        raise ValueError(f"input {name} names no files that are read: {READ}")
    return [_source(path) for path in files]


def _source(path: str) -> Source:
    found = _format_of(path)
    if found is None:
        raise ValueError(f"input {path}: {READ}")
    if not URL.match(path) and not os.path.isfile(path):
        raise ValueError(f"input {path} is not a file (a link to nothing?); use - for a pipe")
    return Source(path, *found)


def _format_of(path: str) -> tuple[str, tuple[str], bool] | None:
    """Format, files and whether it can be read from the middle; None for an unknown suffix."""
    base, suffix = os.path.splitext(path)
    packed = suffix.lower() in COMPRESSED
    if packed:
        suffix = os.path.splitext(base)[1]
    found = FORMATS.get(suffix.lower())
    if found is None or (packed and found == "parquet"):
        return None
    return found, (path,), not packed


def _stdin() -> Source:
    """jsonl if it begins with an object."""
    begin = sys.stdin.buffer.peek(len(BOM) + 1).removeprefix(BOM)
    return Source(STDIN, "jsonl" if begin.startswith(b"{") else "txt", (STDIN,), False)


def _local_files(name: str) -> tuple[list[str], bool]:
    """The files that a path or glob names, and whether a directory was searched for them."""
    path = Path(name)
    if path.is_dir():
        return _walk(path), True
    if path.exists():
        return [path.as_posix()], False
    if glob.has_magic(name):
        found = (Path(p).as_posix() for p in glob.iglob(name, recursive=True))
        return sorted(p for p in found if not os.path.isdir(p)), False
    raise ValueError(f"input {name} is not there: no file, directory or match has this name")


def _walk(top: Path) -> list[str]:
    def stop(error: OSError) -> None:
        raise error

    found = []
    for directory, below, names in os.walk(top, onerror=stop):
        at = Path(directory)
        below[:] = [d for d in below if not d.startswith(".") and not _is_output(at / d)]
        found += [(at / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _is_output(directory: Path) -> bool:
    """Shards of vectors are no input: an output inside the input directory would feed itself."""
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        return False
    with open(manifest, "rb") as file:
        return b'"made_by": "llm2vec_fast' in file.read(4096)


def _url_files(url: str) -> tuple[list[str], bool]:
    import fsspec

    if "::" in url:
        raise ValueError(f"input {url}: chained URLs are not read; unpack the archive first")
    filesystem, path = fsspec.core.url_to_fs(url)
    if filesystem.isfile(path):
        return [url], False
    if filesystem.isdir(path):
        found = [p for p in filesystem.find(path) if "/." not in p[len(path.rstrip("/")) :]]
        return sorted(map(filesystem.unstrip_protocol, found)), True
    if glob.has_magic(path):
        found = filesystem.glob(path, detail=True)
        files = [p for p, info in found.items() if info["type"] == "file"]
        return sorted(map(filesystem.unstrip_protocol, files)), False
    raise ValueError(f"input {url} is not there: no file, directory or match has this name")


def _refuse_twice(sources: Sequence[Source]) -> None:
    seen: dict[str, str] = {}
    for source in sources:
        for path in source.files:
            real = path if path == STDIN or URL.match(path) else os.path.realpath(path)
            if real in seen:
                raise ValueError(
                    f"input {path} is named twice, also as {seen[real]}: its documents would be "
                    "embedded twice. Name each file once."
                )
            seen[real] = path
