"""Damaged inputs of a bulk job: every row is a text or an error, or the input is refused by name.

Lines and records are those that a plain reading of the same bytes finds; a resume from anywhere
finds the same rows.
"""

from __future__ import annotations

import csv
import io
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from llm2vec_fast.corpus.read import Columns, Position, Rows, open_sources

TEXTS = ["a list of numbers", "", "字 and \u200f א", 'two\nlines, "quoted"', "x" * 90, "tab\there"]
RECORDS = [
    {"key": n, "text": f"{text} {n}", "more": {"n": [n, None]}} for n, text in enumerate(TEXTS * 4)
]
COLUMNS = Columns(id="key", keep=("more",))


def rows_of(path, start=Position(), columns=COLUMNS) -> tuple[list, list[Position]]:  # noqa: B008
    """All rows from a place on, and the places after each few."""
    (source,) = open_sources([str(path)])
    rows, places = [], []
    with Rows(source, columns, start) as reader:
        while not reader.done:
            some, place = reader.take(5)
            rows += some
            places.append(place)
    return rows, places


def read_and_resumed(path, columns=COLUMNS) -> list | None:
    """The rows; None where the input is refused. Then the same rows come from its middle."""
    try:
        rows, places = rows_of(path, columns=columns)
    except ValueError as error:
        assert str(path) in str(error)
        return None
    middle = places[len(places) // 2]
    assert rows_of(path, middle, columns)[0] == rows[middle.row :]
    for row in rows:
        assert isinstance(row.text, str) and isinstance(row.id, str)
        row.text.encode(), row.id.encode()
        assert not (row.error and row.text)
    return rows


def jsonl() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def table() -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["key", "text", "more"])
    writer.writeheader()
    writer.writerows(RECORDS)
    return out.getvalue().encode()


def parquet(**options) -> bytes:
    out = io.BytesIO()
    records = [record | {"more": str(record["more"])} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(records), out, row_group_size=9, **options)
    return out.getvalue()


def test_jsonl(fuzz, tmp_path):
    path = tmp_path / "t.jsonl"

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        rows = read_and_resumed(path)
        lines = io.BytesIO(data).readlines()
        assert len(rows) == len(lines)
        for row, line in zip(rows, lines, strict=True):
            if not row.error and line.strip():
                told = json.loads(line.decode("utf-8-sig"))
                assert (row.id, row.text) == (str(told["key"]), told["text"]) or row.note
        return not any(row.error for row in rows)

    damaged = st.one_of(fuzz.bytes((jsonl(),)), fuzz.json(json.dumps(RECORDS[1])).map(str.encode))
    found = fuzz(damaged, attempt)
    assert min(found.values()) > 5


def test_csv(fuzz, tmp_path):
    path, whole = tmp_path / "t.csv", table()

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        rows = read_and_resumed(path)
        if rows is None:
            return False
        try:
            lines = [line.decode() for line in io.BytesIO(data.removeprefix(b"\xef\xbb\xbf"))]
            # DictReader takes an empty line for the header; blank lines are nowhere rows for us.
            lines = itertools.dropwhile(lambda line: not line.strip("\r\n"), lines)
            told = list(csv.DictReader(lines, strict=True))
        except (csv.Error, ValueError):
            return True
        assert len(rows) == len(told)
        for row, record in zip(rows, told, strict=True):
            assert row.error or (row.id, row.text) == (record["key"], record["text"])
        return True

    found = fuzz(fuzz.bytes((whole,)), attempt)
    assert found["read"] > 50


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "version": "1.0"},
                                     {"use_dictionary": False, "compression": "none"}])  # fmt: skip
def test_parquet(fuzz, tmp_path, options):
    path, whole = tmp_path / "t.parquet", parquet(write_page_checksum=True, **options)

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        rows = read_and_resumed(path)
        if rows is None:
            return False
        try:
            official = pq.read_table(path, columns=["key", "text"])
            told = official.cast(as_bytes(official)).to_pylist()
        except (OSError, pa.ArrowException):  # of what is not looked at here
            told = [{"key": r["key"], "text": r["text"].encode()} for r in RECORDS]
        assert len(rows) == len(told)
        for row, record in zip(rows, told, strict=True):
            assert row.error or row.id == str(record["key"])
            assert row.error or row.text.encode() == record["text"]
        return True

    found = fuzz(fuzz.bytes((whole,), -0.5), attempt)
    assert min(found.values()) > 5


def as_bytes(table: pa.Table) -> pa.Schema:
    return pa.schema([("key", table.schema.field("key").type), ("text", pa.binary())])


@pytest.mark.parametrize("told", [12, 6])
def test_row_groups_of_other_lengths_than_they_tell(tmp_path, told):
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet())
    with Rows(open_sources([path])[0], COLUMNS) as rows:
        rows._reader.starts = [0, told, 24]
        with pytest.raises(ValueError, match=rf"t\.parquet: row group 0 has not the {told} rows"):
            rows.take(24)


@pytest.mark.parametrize(("suffix", "codec"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed(fuzz, tmp_path, suffix, codec):
    """Rows before the damage may be read; gzip's checksum finds it, and it is never an end."""
    path, whole = tmp_path / f"t.jsonl{suffix}", pa.compress(jsonl(), codec, asbytes=True)
    good = [str(record["key"]) for record in RECORDS]

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        rows = read_and_resumed(path)
        if rows is not None and codec == "gzip" and data[:10] == whole[:10]:
            assert [row.id for row in rows] in ([], good)
        return rows is not None

    found = fuzz(fuzz.bytes((whole,)), attempt)
    assert found["refused"] > 50
