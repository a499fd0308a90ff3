"""Rows of tables: CSV, TSV and Parquet, streamed; their columns are checked before any row."""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.corpus.formats import (
    BLOCK,
    BOM,
    DOCUMENT_LIMIT,
    SURROGATE,
    Columns,
    Position,
    Reader,
    Row,
    Source,
    TextLines,
    fill,
    go_to,
    mend,
    open_stored,
    open_stream,
)

BATCH = 1024  # rows of a Parquet file decoded at a time
FIELD_LIMIT = DOCUMENT_LIMIT  # characters of a CSV field; more means a quote that nobody closed


class CsvRecords(TextLines):
    """csv and tsv, RFC 4180 with a header; records may span lines, blank lines are no rows."""

    broken = False  # some bytes since the last record were not UTF-8

    def open(self, start: Position) -> None:
        source = self.source
        csv.field_size_limit(max(csv.field_size_limit(), FIELD_LIMIT))
        self.file = open_stream(source.files[0])
        delimiter = "\t" if source.format == "tsv" else ","
        self.records = csv.reader(self._lines(), delimiter=delimiter, strict=True)
        self.header = self._next() or []
        if isinstance(self.header, str):
            raise ValueError(f"input {source.name}: the header is broken: {self.header}")
        if self.header:
            _check_names(source, self.columns, self.header)
        if start.offset:
            self._go(start)
        else:
            self.skip(start.row)

    def _go(self, start: Position) -> None:
        if self.source.seekable and self.file.seekable():
            go_to(self.file, self.source, start.offset)
        else:
            go_to(self.file, self.source, start.offset - self.offset)
        self.row, self.offset = start.row, start.offset

    def take(self, count: int) -> list[Row]:
        rows, self.held = [], 0
        while len(rows) < count and (record := self._next()) is not None:
            rows.append(self._parse_record(record))
            self.row += 1
        return rows

    def skip(self, count: int) -> None:
        while count and self._next() is not None:
            self.row += 1
            count -= 1
            self.held = 0

    def _lines(self) -> Iterator[str]:
        """Decoded lines. csv.reader asks for no more than a record needs: so offsets are exact."""
        while True:
            first = self.offset == 0
            if not (line := self._line()):
                return
            line = line.removeprefix(BOM) if first else line
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                self.broken = True
                text = line.decode("utf-8", "surrogateescape")
            yield text

    def _next(self) -> list[str] | str | None:
        """The fields of the next record, or what is wrong with it; None at the end."""
        self.broken = False
        while True:
            try:
                fields = next(self.records, None)
            except csv.Error as error:
                if "field limit" in str(error):
                    raise ValueError(
                        f"input {self.source.name}, row {self.row}: a field of more than "
                        f"{FIELD_LIMIT} characters. Is a quote left open there?"
                    ) from error
                if "new-line character" in str(error):
                    return "not valid CSV: a carriage return in a field without quotes"
                return f"not valid CSV: {error}"
            if fields != []:
                return fields

    def _parse_record(self, record: list[str] | str) -> Row:
        row = self.blank()
        if isinstance(record, str):
            row.error = record
        elif len(record) != len(self.header):
            row.error = f"{len(record)} fields, but the header has {len(self.header)}"
        else:
            fields: dict[str, str | None] = dict(zip(self.header, record, strict=True))
            if self.columns.id is not None:
                fields[self.columns.id] = fields[self.columns.id] or None  # empty = missing
            fill(row, fields, self.columns)
            if self.broken:
                _refuse_undecoded(row)
        return row


class ParquetRows(Reader):
    """Parquet: batches of the wanted columns; starts at the row group that holds the row."""

    def open(self, start: Position) -> None:
        path = self.source.files[0]
        self.file = open_stored(path) if "://" in path else pa.OSFile(path)
        # a column chunk can be gigabytes: it is read in pieces
        self.table = pq.ParquetFile(
            self.file, buffer_size=8 * BLOCK, pre_buffer=False, page_checksum_verification=True
        )
        schema, metadata = self.table.schema_arrow, self.table.metadata
        self.wanted = _check_names(self.source, self.columns, schema.names)
        kind = schema.field(self.columns.text).type
        if not _holds_text(kind):
            raise ValueError(
                f"input {self.source.name}: column {self.columns.text!r} is {kind}, not text"
            )
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        if min(sizes, default=0) < 0:
            raise ValueError(f"input {self.source.name} tells of {min(sizes)} rows: it is damaged")
        self.starts = [0, *accumulate(sizes)]
        self.batches: Iterator[pa.RecordBatch] = iter(())
        # The row group that is read, the batch in hand, and its first row.
        self.group, self.batch, self.first = -1, None, 0
        self.skip(start.row)

    def take(self, count: int) -> list[Row]:
        rows: list[Row] = []
        self.held = 0
        while len(rows) < count and self.row < self.starts[-1]:
            batch = self._batch()
            part = batch.slice(self.row - self.first, count - len(rows))
            columns = [_values(part.column(name)) for name in self.wanted]
            broken = any(broken for _, broken in columns)
            for values in zip(*(values for values, _ in columns), strict=True):
                row = self.blank()
                fill(row, dict(zip(self.wanted, values, strict=True)), self.columns)
                self.hold(len(row.text))
                if broken:
                    _refuse_undecoded(row)
                rows.append(row)
                self.row += 1
        self.offset = self.row
        return rows

    def skip(self, count: int) -> None:
        self.row = self.offset = min(self.row + count, self.starts[-1])

    def _batch(self) -> pa.RecordBatch:
        """The batch that holds the next row; row groups before it are never touched. One group at a
        time: in a damaged file columns of different lengths would run on into the next one.
        """
        group = bisect_right(self.starts, self.row) - 1
        if group != self.group:
            self.batches = self.table.iter_batches(BATCH, [group], self.wanted)
            self.group, self.batch, self.first = group, None, self.starts[group]
        while self.batch is None or self.row >= self.first + len(self.batch):
            self.first += len(self.batch) if self.batch is not None else 0
            self.batch = next(self.batches, None)
            if self.batch is None or self.first + len(self.batch) > self.starts[group + 1]:
                raise ValueError(
                    f"input {self.source.name}: row group {group} has not the "
                    f"{self.starts[group + 1] - self.starts[group]} rows that it tells of"
                )
        return self.batch


def _refuse_undecoded(row: Row) -> None:
    if mend(row) and not row.error:
        row.text, row.error = "", "not valid UTF-8"


def _check_names(source: Source, columns: Columns, names: list[str]) -> list[str]:
    """The columns to read. Raises ValueError for one that is absent or there twice."""
    wanted = [columns.text, *([] if columns.id is None else [columns.id]), *columns.keep]
    for name in wanted:
        if names.count(name) != 1:
            what = "no" if name not in names else f"{names.count(name)} times the"
            raise ValueError(
                f"input {source.name} has {what} column {name!r}; its columns are "
                f"{', '.join(map(repr, names))[:300]}"
            )
    return list(dict.fromkeys(wanted))


def _holds_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "null")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def _values(array: pa.Array) -> tuple[list[Any], bool]:
    """Python values, and whether bytes among them were no UTF-8 (they are then escaped)."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check what a file calls a string
        values = array.cast(pa.large_binary()).to_pylist()
    if not any(isinstance(value, bytes) for value in values):
        return values, False
    texts = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]
    return texts, any(isinstance(t, str) and SURROGATE.search(t) for t in texts)
