"""Rows of input files, read a job at a time from a known place; never the whole file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl"}
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One input file. `format` is txt (a line a document) or jsonl (an object a line)."""

    path: Path
    format: str


@dataclass(frozen=True)
class Columns:
    """Which fields of an object are read; a txt file has a text and nothing else."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Position:
    """A place between two rows of a file."""

    row: int = 0
    offset: int = 0  # bytes


@dataclass(slots=True)
class Row:
    """One document; `error` says why it has no text."""

    id: str
    text: str = ""
    keep: list[str | None] = field(default_factory=list)
    error: str = ""


def open_source(path: str | Path) -> Source:
    """Raises ValueError naming a file that is missing or of a kind that is not read."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"input {path} is not a file")
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"input {path}: only {', '.join(FORMATS)} files are read")
    return Source(path, kind)


def read_rows(
    source: Source, columns: Columns, start: Position, count: int
) -> tuple[list[Row], Position]:
    """Up to `count` rows from `start` on, and the place after them."""
    rows: list[Row] = []
    with open(source.path, "rb") as file:
        file.seek(start.offset)
        while len(rows) < count:
            line = file.readline()
            if not line:
                break
            at = start.row + len(rows)
            if at == 0:
                line = line.removeprefix(BOM)
            rows.append(_parse(line.rstrip(b"\r\n"), source, columns, at))
        return rows, Position(start.row + len(rows), file.tell())


def _parse(line: bytes, source: Source, columns: Columns, at: int) -> Row:
    row = Row(id=f"{source.path.as_posix()}:{at}", keep=[None] * len(columns.keep))
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        row.error = f"not valid UTF-8 (byte {error.start})"
        return row
    if source.format == "txt":
        row.text = text
    elif text.strip():
        _fill_from_json(row, text, columns)
    return row


def _fill_from_json(row: Row, line: str, columns: Columns) -> None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        row.error = f"not valid JSON: {error}"
        return
    if not isinstance(fields, dict):
        row.error = f"not a JSON object but {type(fields).__name__}"
        return
    row.keep = [_as_text(fields.get(name)) for name in columns.keep]
    if columns.id is not None:
        if not isinstance(fields.get(columns.id), str | int):
            row.error = (
                f"the id {columns.id!r} is {fields.get(columns.id)!r:.40}, not text or a number"
            )
            return
        row.id = str(fields[columns.id])
    text = fields.get(columns.text)
    if isinstance(text, str):
        row.text = text
    elif columns.text not in fields:
        row.error = f"no field {columns.text!r}; it has {', '.join(map(repr, fields))[:80]}"
    else:
        row.error = f"field {columns.text!r} is {text!r:.40}, not text"


def _as_text(value: object) -> str | None:
    """Kept values are stored as text, so that every shard has the same columns."""
    return value if value is None or isinstance(value, str) else json.dumps(value)


def count_lines(sources: Sequence[Source], limit: int = 256 << 20) -> int | None:
    """Documents in all files, for a progress bar; None where counting would take long."""
    if sum(source.path.stat().st_size for source in sources) > limit:
        return None
    total = 0
    for source in sources:
        last = b"\n"
        with open(source.path, "rb") as file:
            while block := file.read(1 << 20):
                total += block.count(b"\n")
                last = block
        total += not last.endswith(b"\n")
    return total
