"""Readers of lines, JSON lines and whole files, and the byte streams under every format."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

BOM = b"\xef\xbb\xbf"
STDIN = "-"
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 20  # bytes read at a time
# A few compressed kilobytes can become terabytes. More than this is refused, not read:
DOCUMENT_LIMIT = 1 << 27  # bytes of a line or whole file
TAKE_LIMIT = 1 << 32  # bytes of all rows of a job, which are in memory together
REPLACED = "lone surrogate replaced"
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """One input. `name` is its path or URL as given, `-` for stdin.

    format:   txt | jsonl | csv | tsv | parquet, or files: each of `files` is one document
    files:    the one path, or every file of a `files` source
    seekable: reading can start in the middle; else it starts again and throws away
    """

    name: str
    format: str
    files: tuple[str, ...]
    seekable: bool


@dataclass(frozen=True)
class Columns:
    """Which fields are read; txt and whole files have a text and nothing else."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Position:
    """A place between two rows of a source.

    offset: in (decompressed) bytes; parquet and whole files are found by row alone. 0 with a row
            above 0 means unknown: the rows before are then counted.
    """

    row: int = 0
    offset: int = 0


@dataclass(slots=True)
class Row:
    """One document; `error` says why it has no text, `note` what was changed in it."""

    id: str
    text: str = ""
    keep: list[str | None] = field(default_factory=list)
    error: str = ""
    note: str = ""


def open_stored(path: str) -> BinaryIO:
    """The bytes of a local path, an fsspec URL or stdin as they are stored. Raises OSError."""
    if path == STDIN:
        return sys.stdin.buffer
    if "://" not in path:
        return open(path, "rb", buffering=BLOCK)
    import fsspec

    raw = fsspec.open(path, "rb").open()
    return io.BufferedReader(raw, BLOCK)  # fsspec's own readline is slow Python


def open_stream(path: str) -> BinaryIO:
    """The same bytes, decompressed if the name ends in .gz or .zst. Raises OSError."""
    file = open_stored(path)
    for suffix, codec in COMPRESSED.items():
        if path.lower().endswith(suffix):
            return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), codec), BLOCK)
    return file


def go_to(file: BinaryIO, source: Source, offset: int) -> None:
    """Goes to `offset`, by seeking or by reading from the start. Raises ValueError past the end."""
    at = 0
    if source.seekable and file.seekable():
        at = min(offset, file.seek(0, io.SEEK_END))
        file.seek(at)
    while at < offset and (block := file.read(min(BLOCK, offset - at))):
        at += len(block)
    if at < offset:
        raise ValueError(
            f"input {source.name} has {at} bytes, and reading was to go on at {offset}: it is "
            "shorter than it was"
        )


class Reader:
    """What all formats share: the next row's number, and the source's name for ids and errors."""

    file: BinaryIO | None = None

    def __init__(self, source: Source, columns: Columns):
        self.source, self.columns = source, columns
        self.row = self.offset = self.held = 0
        self.name = SURROGATE.sub("\ufffd", source.name)
        self.where = source.name  # what an error names
        # Shared by the rows, because a list for each is slow: `fill` sets another, never adds.
        self.keep: list[str | None] = [None] * len(columns.keep)

    def open(self, start: Position) -> None:
        raise NotImplementedError

    def take(self, count: int) -> list[Row]:
        raise NotImplementedError

    def skip(self, count: int) -> None:
        raise NotImplementedError

    def hold(self, size: int) -> None:
        """Counts the bytes of rows that are in memory together. Raises ValueError at the limit."""
        self.held += size
        if self.held > TAKE_LIMIT:
            raise ValueError(
                f"input {self.source.name}: the rows up to {self.row} hold more than {TAKE_LIMIT} "
                "bytes, too many for one shard. Use a smaller --rows-per-shard."
            )

    def close(self) -> None:
        if self.file is not None and self.source.name != STDIN:
            self.file.close()

    def blank(self) -> Row:
        return Row(f"{self.name}:{self.row}", "", self.keep)


class TextLines(Reader):
    """txt: a line is a document, and an empty line is an empty one."""

    def open(self, start: Position) -> None:
        self.file = open_stream(self.source.files[0])
        if start.offset:
            go_to(self.file, self.source, start.offset)
            self.row, self.offset = start.row, start.offset
        else:
            self.skip(start.row)

    def take(self, count: int) -> list[Row]:
        rows, self.held = [], 0
        while len(rows) < count and (line := self._line()):
            rows.append(self._parse(line.removeprefix(BOM) if self.row == 0 else line))
            self.row += 1
        return rows

    def _line(self) -> bytes:
        """The next line with its end; nothing behind the last."""
        line = self.file.readline(DOCUMENT_LIMIT)
        if len(line) == DOCUMENT_LIMIT:
            raise ValueError(
                f"input {self.source.name}, row {self.row}: a line of {DOCUMENT_LIMIT} bytes or "
                "more is no document"
            )
        self.offset += len(line)
        self.hold(len(line))
        return line

    def skip(self, count: int) -> None:
        """Counts newlines in blocks; a last line without one is a row too."""
        last = b"\n"
        while count and (block := self.file.peek()):
            found = block.count(b"\n")
            if found >= count:
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                found, block = count, block[: ends[count - 1] + 1]
            self.file.read(len(block))
            self.row += found
            self.offset += len(block)
            count -= found
            last = block
        self.row += not last.endswith(b"\n")

    def _parse(self, line: bytes) -> Row:
        row = self.blank()
        try:
            row.text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            row.error = f"not valid UTF-8 (byte {error.start})"
        return row


class JsonLines(TextLines):
    """jsonl: a line is an object; an empty line is an empty document."""

    def _parse(self, line: bytes) -> Row:
        row = self.blank()
        try:
            text = line.decode("utf-8")
            if not text or text.isspace():
                return row
            fields = json.loads(text)
        except UnicodeDecodeError as error:
            row.error = f"not valid UTF-8 (byte {error.start})"
            return row
        except (ValueError, RecursionError) as error:
            row.error = f"not valid JSON: {error}"
            return row
        if not isinstance(fields, dict):
            row.error = f"not a JSON object but {type(fields).__name__}"
            return row
        fill(row, fields, self.columns)
        if b"\\u" in line and ("\\ud" in text or "\\uD" in text) and mend(row):
            row.note = REPLACED
        return row


class WholeFiles(Reader):
    """Each file is one document, and its path is the id."""

    def open(self, start: Position) -> None:
        self.skip(start.row)

    def take(self, count: int) -> list[Row]:
        rows, self.held = [], 0
        for path in self.source.files[self.row : self.row + count]:
            self.where = path
            with open_stream(path) as file:
                data = file.read(DOCUMENT_LIMIT).removeprefix(BOM)
            self.hold(len(data))
            row = Row(SURROGATE.sub("\ufffd", path), "", self.keep)
            try:
                if len(data) >= DOCUMENT_LIMIT - len(BOM):
                    row.error = f"{DOCUMENT_LIMIT} bytes or more are no document"
                else:
                    row.text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                row.error = f"not valid UTF-8 (byte {error.start})"
            rows.append(row)
            self.row = self.offset = self.row + 1
        return rows

    def skip(self, count: int) -> None:
        self.row = self.offset = min(self.row + count, len(self.source.files))


def fill(row: Row, fields: dict[str, Any], columns: Columns) -> None:
    """Text, id and kept columns of one record, or the reason why it has none."""
    if columns.keep:
        row.keep = [_as_text(fields.get(name)) for name in columns.keep]
    if columns.id is not None:
        found = fields.get(columns.id)
        if not isinstance(found, str | int) or isinstance(found, bool):
            row.error = f"the id {columns.id!r} is {_told(found)}, not text or a whole number"
            return
        row.id = str(found)
    text = fields.get(columns.text)
    if isinstance(text, str):
        row.text = text
    elif columns.text not in fields:
        row.error = f"no field {columns.text!r}; it has {', '.join(map(repr, fields))[:80]}"
    else:
        row.error = f"field {columns.text!r} is {_told(text)}, not text"


def _told(value: object) -> str:
    return "null (None)" if value is None else f"{value!r:.40}"


def _as_text(value: object) -> str | None:
    """Kept values are stored as text, so that every shard has the same columns."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str)  # Parquet has dates and decimals, JSON has not


def mend(row: Row) -> bool:
    """Replaces surrogates, which no encoding can store; whether there were any."""
    before = [row.text, row.id, *row.keep]
    after = [None if text is None else SURROGATE.sub("\ufffd", text) for text in before]
    row.text, row.id, row.keep = after[0] or "", after[1] or "", after[2:]
    return before != after
