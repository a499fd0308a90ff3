"""Every input format: right rows, offsets that resume, skips that agree, and clear refusals."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
from datetime import date
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2vec_fast.corpus import formats, tables
from llm2vec_fast.corpus.read import Columns, Position, Rows, open_sources, size_of

TEXTS = ["one", "", "zwei, drei", 'a "quoted" word', "two\nlines", "naïve 数据 \u202e\u200d", "end"]
RECORDS = [{"text": text, "n": n, "lang": "en"} for n, text in enumerate(TEXTS)]
WITH_ID = Columns(id="n", keep=("lang",))


def as_csv(delimiter: str, end: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow(["n", "text", "lang"])
    writer.writerows([r["n"], r["text"], r["lang"]] for r in RECORDS)
    return file.getvalue().encode()


def as_parquet(**options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(RECORDS), file, row_group_size=2, **options)
    return file.getvalue()


JSONL = "".join(json.dumps(r, ensure_ascii=r["n"] % 2 == 0) + "\n" for r in RECORDS).encode()
FILES = {
    "a.jsonl": JSONL,
    "crlf.ndjson": JSONL.replace(b"\n", b"\r\n"),
    "open_end.jsonl": JSONL.rstrip(b"\n"),
    "bom.jsonl": formats.BOM + JSONL,
    "a.jsonl.gz": gzip.compress(JSONL[:100]) + gzip.compress(JSONL[100:]),
    "a.jsonl.zst": pa.compress(JSONL, codec="zstd", asbytes=True),
    "a.csv": as_csv(",", "\r\n"),
    "a.tsv": as_csv("\t", "\n"),
    "bom.csv": formats.BOM + as_csv(",", "\n").rstrip(b"\n"),
    "a.csv.gz": gzip.compress(as_csv(",", "\n")),
    "a.tsv.zst": pa.compress(as_csv("\t", "\r\n"), codec="zstd", asbytes=True),
    "a.parquet": as_parquet(),
    "other.parquet": as_parquet(use_dictionary=True, data_page_version="2.0", compression="zstd"),
}


def source_of(path, data: bytes | None = None):
    if data is not None:
        Path(path).write_bytes(data)
    return open_sources([path])[0]


def rows_of(source, columns=Columns(), start=Position(), step=1000):  # noqa: B008
    found = []
    with Rows(source, columns, start) as rows:
        while True:
            part, _ = rows.take(step)
            if not part:
                assert rows.done
                return found
            found += part


def texts_of(source, **options):
    return [row.text for row in rows_of(source, **options)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["local", "file://", "memory://"])
def test_all_formats_from_all_places(tmp_path, name, place):
    path = tmp_path / name
    given_name = {"local": str(path), "file://": f"file://{path}"}.get(place, f"memory://{name}")
    if place == "memory://":
        fsspec.filesystem("memory").pipe_file(f"/{name}", FILES[name])
    else:
        path.write_bytes(FILES[name])
    (source,) = open_sources([given_name])
    assert source.name == given_name and source.files == (given_name,)
    assert source.seekable == (not name.endswith(("gz", "zst")))
    assert size_of(source) == len(FILES[name])
    rows = rows_of(source, WITH_ID, step=3)
    assert [row.text for row in rows] == TEXTS
    assert [row.id for row in rows] == [str(n) for n in range(len(TEXTS))]
    assert [row.keep for row in rows] == [["en"]] * len(TEXTS)
    assert not any(row.error or row.note for row in rows)
    assert rows_of(source)[3].id == f"{given_name}:3"


def check_places(source, columns=Columns()):  # noqa: B008
    """From every row on, by offset and by row number alone, taken or skipped: the same rest."""
    whole = rows_of(source, columns)
    place = Position()
    for at in range(len(whole) + 1):
        assert place.row == at
        for start in (place, Position(row=at)):
            with Rows(source, columns, start) as rows:
                assert rows.take(len(whole))[0] == whole[at:]
        with Rows(source, columns, place) as rows:
            assert rows.skip(2).row == min(at + 2, len(whole))
            assert rows.done == (at + 2 > len(whole))
            assert rows.take(len(whole))[0] == whole[at + 2 :]
        with Rows(source, columns, place) as rows:
            assert rows.take(3)[0] == whole[at : at + 3] and rows.done == (at + 3 > len(whole))
        with Rows(source, columns, place) as rows:
            part, place = rows.take(1)
            assert part == whole[at : at + 1] and rows.done == (at == len(whole))
            skipped = rows.skip(1)
        with Rows(source, columns, place) as rows:
            assert rows.take(1)[1] == skipped
    return whole


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_files_are_closed_also_after_a_refusal(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for name, data in FILES.items():
        source = source_of(tmp_path / name, data)
        with Rows(source, Columns()) as rows:
            rows.take(2)
            assert len(os.listdir("/proc/self/fd")) > before
        if source.format != "jsonl":
            with pytest.raises(ValueError, match="absent"):
                Rows(source, Columns("absent"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", FILES)
def test_every_place_can_be_resumed_and_skipped_to(tmp_path, name):
    source = source_of(tmp_path / name, FILES[name])
    assert len(check_places(source, WITH_ID)) == len(TEXTS)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
    kind=st.sampled_from(["txt", "csv", "jsonl"]),
)
def test_any_text_survives_and_resumes(tmp_path_factory, texts, end, kind):
    path = tmp_path_factory.mktemp("any") / f"a.{kind}"
    if kind == "csv":
        file = io.StringIO()
        csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(
            [["text"], *([text] for text in texts)]
        )
        data = file.getvalue()
    elif kind == "txt":
        texts = [text.replace("\n", " ").replace("\r", " ").lstrip("\ufeff") for text in texts]
        data = "".join(text + end for text in texts)
    else:
        data = "".join(json.dumps({"text": text}) + end for text in texts)
    source = source_of(path, data.encode())
    assert [row.text for row in check_places(source)] == texts


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=60), kind=st.sampled_from(["txt", "jsonl", "csv"]))
def test_no_bytes_break_the_count_of_rows(tmp_path_factory, data, kind):
    head = b"text,b\n" if kind == "csv" else b""
    source = source_of(tmp_path_factory.mktemp("any") / f"a.{kind}", head + data)
    for row in check_places(source):
        assert not (row.error and row.text)
        (row.text + row.id).encode()


def test_txt_lines(tmp_path):
    data = (
        formats.BOM + b"first\r\n\n\xef\xbb\xbfkept\n nul \x00\x0c\xe2\x80\xa8 same\nbad \xff\nlast"
    )
    rows = check_places(source_of(tmp_path / "a.txt", data))
    assert [row.text for row in rows] == [
        "first", "", "\ufeffkept", " nul \x00\x0c\u2028 same", "", "last"
    ]  # fmt: skip
    assert [row.error for row in rows] == ["", "", "", "", "not valid UTF-8 (byte 4)", ""]
    assert rows_of(source_of(tmp_path / "empty.txt", b"")) == []
    (row,) = rows_of(source_of(tmp_path / "bom.jsonl", formats.BOM))
    assert (row.text, row.error) == ("", "")


def test_json_rows_that_are_wrong_or_changed(tmp_path):
    lines = [
        rb'{"text": "a \ud800 b", "id": "x\uDFFF"}',
        rb'{"text": "pair \ud83d\ude00", "id": 1}',
        rb'{"text": "no id"}',
        rb'{"text": "b", "id": true}',
        rb'{"text": "c", "id": 1.5}',
        rb'{"text": null, "id": 2}',
        b'{"text": "\xff", "id": 3}',
        b"{",
        b"[" * 100_000,
        b" \t",
        b'{"text": "kept", "id": 4, "k": {"a": ["\\ud800", 1]}}',
    ]
    source = source_of(tmp_path / "a.jsonl", b"\n".join(lines))
    rows = rows_of(source, Columns(id="id", keep=("k",)))
    assert (rows[0].text, rows[0].id) == ("a \ufffd b", "x\ufffd")
    assert rows[0].note == "lone surrogate replaced"
    assert (rows[1].text, rows[1].note) == ("pair 😀", "")
    told = ["None", "True", "1.5", "null", "UTF-8", "JSON", "JSON"]
    for row, word in zip(rows[2:9], told, strict=True):
        assert word in row.error and row.text == ""
    assert (rows[9].text, rows[9].error) == ("", "")
    assert json.loads(rows[10].keep[0]) == {"a": ["\ud800", 1]}
    for row in rows:
        (row.text + row.id + (row.keep[0] or "")).encode()


def test_csv_records_that_are_wrong(tmp_path):
    data = (
        b"id,text\r\n1,a\r\n\r\n2\r\n3,b,c\r\n4,\xff\r\n\xff,d\r\n,e\r\n"
        b'5,"x"y\r\n6,"f\r\n\r\n""g"""\r\n7,"h\r\n'
    )
    rows = check_places(source_of(tmp_path / "a.csv", data), Columns(id="id"))
    told = ["", "1 fields", "3 fields", "UTF-8", "UTF-8", "id 'id'", "CSV", "", "end of data"]
    assert len(rows) == len(told)
    for row, word in zip(rows, told, strict=True):
        assert word in row.error and bool(row.error) == bool(word)
    assert rows[7].text == 'f\r\n\r\n"g"'
    assert texts_of(source_of(tmp_path / "empty.csv", b"")) == []
    assert texts_of(source_of(tmp_path / "head.csv", b"text")) == []


def test_a_quote_left_open_is_not_the_rest_of_the_corpus(tmp_path, monkeypatch):
    limit = 10_000
    monkeypatch.setattr(tables, "FIELD_LIMIT", limit)
    before = csv.field_size_limit(limit)
    source = source_of(tmp_path / "a.csv", b'text\nok\n"open\n' + b"line\n" * limit)
    try:
        with pytest.raises(ValueError, match=r"a\.csv, row 1: .*quote left open"):
            rows_of(source)
    finally:
        csv.field_size_limit(before)
    fits = b'text\n"' + b"line\n" * limit + b'"\n'
    assert len(texts_of(source_of(tmp_path / "b.csv", fits))) == 1


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_columns_are_checked_before_any_row(tmp_path, name):
    source = source_of(tmp_path / name, FILES[name])
    for columns in (Columns("body"), Columns(id="body"), Columns(keep=("body",))):
        with pytest.raises(ValueError, match=rf"{name} has no column 'body'.*'lang'"):
            Rows(source, columns)
    twice = source_of(tmp_path / "twice.csv", b"text,text\na,b\n")
    with pytest.raises(ValueError, match="2 times the column 'text'"):
        Rows(twice, Columns())


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
     pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)  # fmt: skip
def test_parquet_types_and_nulls(tmp_path, kind):
    count = 3 * tables.BATCH + 5
    texts = [None if n % 7 == 3 else f"text {n % 50} ü" for n in range(count)]
    day = date(2026, 1, 2)
    table = pa.table(
        {
            "text": pa.array(texts, pa.string()).cast(kind)
            if not pa.types.is_dictionary(kind)
            else pa.array(texts).dictionary_encode(),
            "id": pa.array(range(count)),
            "day": [day] * count,
            "tags": [["a", "b"]] * count,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=tables.BATCH + 100)
    source = source_of(tmp_path / "a.parquet")
    columns = Columns(id="id", keep=("day", "tags", "id"))
    rows = rows_of(source, columns, step=999)
    assert [row.text for row in rows] == [text or "" for text in texts]
    assert [row.id for row in rows] == [str(n) for n in range(count)]
    assert rows[0].keep == ['"2026-01-02"', '["a", "b"]', "0"]
    for row, text in zip(rows, texts, strict=True):
        assert ("is null" in row.error) == (text is None)
    for at in (1, 1123, 1124, 2248, count - 1, count):
        with Rows(source, columns, Position(at)) as found:
            assert found.take(3)[0] == rows[at : at + 3]
            found.skip(900)
            assert found.take(2)[0] == rows[at + 903 : at + 905]


def test_parquet_reads_only_the_columns_and_groups_it_needs(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{n}" for n in range(10_000)], "big": ["x" * 99] * 10_000})
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    pq.write_table(table, path, row_group_size=2000, **options)
    data = bytearray(path.read_bytes())
    group = pq.read_metadata(path).row_group
    for number, column in ((0, 0), (2, 0), (4, 1)):  # broken: some texts, an unwanted column
        chunk = group(number).column(column)
        data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    source = source_of(path)
    assert texts_of(source, start=Position(6000)) == [f"{n}" for n in range(6000, 10_000)]
    with Rows(source, Columns(), Position(2000)) as rows:
        assert rows.take(10)[0][9].text == "2009"
        assert rows.skip(3990) == Position(6000, 6000)
        assert rows.take(1)[0][0].text == "6000"
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read beyond row 0"):
        rows_of(source)


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    texts = [os.urandom(5000).hex() for _ in range(6000)]
    options = {"use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **options)
    source = source_of(tmp_path / "a.parquet")
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1 and size_of(source) > 60e6
    before = pa.total_allocated_bytes()
    with Rows(source, Columns()) as rows:
        for at in (0, 3000):
            rows.skip(at)
            assert rows.take(1)[0][0].text == texts[at + (at > 0)]
            assert pa.total_allocated_bytes() - before < 30e6


def test_parquet_that_is_not_text(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match="'text' is int64, not text"):
        Rows(source_of(tmp_path / "n.parquet"), Columns())
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        Rows(source_of(tmp_path / "x.parquet", b"PAR1 no"), Columns())
    bad = pa.array([b"good", b"\xff"]).view(pa.string())  # Arrow itself does not look
    pq.write_table(pa.table({"text": bad}), tmp_path / "b.parquet")
    rows = rows_of(source_of(tmp_path / "b.parquet"))
    assert [(row.text, row.error) for row in rows] == [("good", ""), ("", "not valid UTF-8")]


def test_a_line_of_50_mb(tmp_path):
    long = "word " * 10_000_000
    source = source_of(tmp_path / "a.txt", f"before\n{long}\nafter\n".encode())
    rows = rows_of(source)
    assert [row.text[:6] for row in rows] == ["before", "word w", "after"]
    assert rows[1].text == long
    with Rows(source, Columns()) as skipped:
        assert skipped.skip(2) == Position(2, 7 + len(long) + 1)
    source = source_of(tmp_path / "a.csv", f'text\n"{long[: 1 << 20]}"\n'.encode())
    assert len(texts_of(source)[0]) == 1 << 20


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("move", ["take", "skip"])
def test_a_compressed_file_cut_short_is_no_end(tmp_path, name, move):
    raw = os.urandom(3 << 20).hex().encode()
    lines = b"\n".join(raw[at : at + 100] for at in range(0, len(raw), 100))
    packed = gzip.compress(lines, 1) if name.endswith("gz") else pa.compress(lines, codec="zstd")
    packed = memoryview(packed).tobytes()
    whole = rows_of(source_of(tmp_path / f"whole.{name}", packed))
    assert len(whole) == len(lines.split(b"\n"))
    for cut in (len(packed) // 2, len(packed) - 1):
        source = source_of(tmp_path / name, packed[:cut])
        with (
            pytest.raises(ValueError, match=rf"{name} cannot be read beyond row \d{{4}}"),
            Rows(source, Columns()) as rows,
        ):
            getattr(rows, move)(len(whole))
    short = gzip.compress(b"a\n") if name.endswith("gz") else pa.compress(b"a\n", codec="zstd")
    source = source_of(tmp_path / name, memoryview(short).tobytes())
    with pytest.raises(ValueError, match=rf"{name} has 2 bytes, .* shorter"):
        Rows(source, Columns(), Position(2, 99))
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        rows_of(source_of(tmp_path / name, b"plain text\n" * 9))


def test_a_place_beyond_the_end_is_refused(tmp_path):
    for name in ("a.txt", "a.csv"):
        source = source_of(tmp_path / name, b"text\na\n")
        with pytest.raises(ValueError, match=rf"{name} has 7 bytes"):
            Rows(source, Columns(), Position(3, 99))


def make_tree(top: Path) -> None:
    for name in ("b/2.txt", "b/1.jsonl.gz", "a.TXT", "z.csv", ".hidden.txt", ".git/x.txt", "p.png"):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text\n")
    (top / "out").mkdir()
    (top / "out/manifest.json").write_text(json.dumps({"format": 1, "made_by": "llm2vec_fast 0"}))
    (top / "out/part-00000-000000.parquet").write_bytes(as_parquet())


def test_directories_and_globs(tmp_path):
    make_tree(tmp_path)
    names = [source.name for source in open_sources([tmp_path])]
    assert names == [f"{tmp_path}/{n}" for n in ("a.TXT", "b/1.jsonl.gz", "b/2.txt", "z.csv")]
    assert [s.format for s in open_sources([tmp_path])] == ["txt", "jsonl", "txt", "csv"]
    globbed = open_sources([f"{tmp_path}/**/*.txt", f"{tmp_path}/b/*.gz"])
    assert [s.name for s in globbed] == [f"{tmp_path}/b/2.txt", f"{tmp_path}/b/1.jsonl.gz"]
    assert len(open_sources([tmp_path / "out"])) == 1  # asked for by name
    odd = tmp_path / "odd[1].txt"
    odd.write_text("a")
    assert open_sources([odd])[0].name == str(odd)
    memory = fsspec.filesystem("memory")
    for name in ("tree/b/2.txt", "tree/1.jsonl", "tree/.h/x.txt", "tree/p.png"):
        memory.pipe_file(f"/{name}", b"text\n")
    found = [source.name for source in open_sources(["memory://tree"])]
    assert found == ["memory:///tree/1.jsonl", "memory:///tree/b/2.txt"]
    assert texts_of(open_sources(["memory://tree/**/*.txt"])[0]) == ["text"]


@pytest.mark.parametrize("where", ["local", "memory"])
def test_whole_files(tmp_path, where):
    contents = {"b.md": b"\xef\xbb\xbftwo\nlines\n", "a/1.html": b"<p>", "c.bin": b"\xff", "e": b""}
    top = str(tmp_path) if where == "local" else "memory:///whole"
    with fsspec.filesystem(where).transaction:
        for name, data in contents.items():
            with fsspec.open(f"{top}/{name}", "wb", auto_mkdir=True) as file:
                file.write(data)
    (source,) = open_sources([top], whole_files=True)
    assert (source.name, source.format) == (top, "files")
    assert size_of(source) == sum(map(len, contents.values()))
    rows = check_places(source, Columns(keep=("k",)))
    assert [row.id for row in rows] == [f"{top}/{n}" for n in ("a/1.html", "b.md", "c.bin", "e")]
    assert [row.text for row in rows] == ["<p>", "two\nlines\n", "", ""]
    assert [bool(row.error) for row in rows] == [False, False, True, False]
    with pytest.raises(ValueError, match=r"names no files"):
        (tmp_path / "none").mkdir()
        open_sources([tmp_path / "none"], whole_files=True)


def test_a_file_that_vanishes(tmp_path):
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("a")
    (whole,) = open_sources([tmp_path], whole_files=True)
    first, second = open_sources([tmp_path])
    (tmp_path / "2.txt").unlink()
    assert texts_of(first) == ["a"]
    for attempt in (
        lambda: Rows(second, Columns()),
        lambda: rows_of(whole),
        lambda: size_of(whole),
    ):
        with pytest.raises(ValueError, match=r"cannot be read.*2\.txt"):
            attempt()
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"link\.txt is not a file"):
        open_sources([tmp_path])


def test_errors_of_remote_libraries_name_the_input(monkeypatch):
    """Made by hand, because no network is needed for it: such errors are no OSErrors."""

    class ConnectError(Exception):
        pass

    def fail(*args, **kwargs):
        raise ConnectError("no such host")

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/remote.txt", b"a\n")
    (source,) = open_sources(["memory://remote.txt"])
    for name in ("isfile", "size", "_open"):
        monkeypatch.setattr(type(memory), name, fail)
    for attempt in (
        lambda: open_sources(["memory://remote.txt"]),
        lambda: size_of(source),
        lambda: Rows(source, Columns()),
    ):
        with pytest.raises(ValueError, match=r"memory://remote\.txt cannot be read: no such host"):
            attempt()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (source,) = open_sources([tmp_path])
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read"):
        Rows(source, Columns())


def test_a_directory_that_cannot_be_listed(tmp_path, monkeypatch):
    """Made by hand, because root may list everything."""
    (tmp_path / "below").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"cannot be read: .*below"):
        open_sources([tmp_path])


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([], "no inputs"),
        (["{top}/absent.txt"], "absent.txt is not there"),
        (["{top}/*.nothing"], "names no files"),
        (["{top}/p.png"], "only .txt"),
        (["{top}/p*"], "p.png: only .txt"),
        (["{top}/.git"], None),
        (["{top}/empty"], "names no files"),
        (["{top}/a.TXT", "{top}/b/../a.TXT"], "named twice"),
        (["{top}", "{top}/z.csv"], "named twice"),
        (["memory://absent.txt"], "absent.txt is not there"),
        (["nosuch://b/a.txt"], "nosuch"),
        (["zip://a.txt::memory://b.zip"], "chained URLs"),
        (["{top}/fifo.txt"], "fifo.txt is not a file"),
    ],
)
def test_inputs_that_are_refused(tmp_path, inputs, told):
    make_tree(tmp_path)
    (tmp_path / "empty").mkdir()
    if "fifo" in str(inputs):
        os.mkfifo(tmp_path / "fifo.txt")
    inputs = [name.format(top=tmp_path) for name in inputs]
    if told is None:  # hidden, but named
        assert len(open_sources(inputs)) == 1
        return
    with pytest.raises(ValueError, match=told):
        open_sources(inputs)


@pytest.mark.parametrize(
    ("data", "format"),
    [(b'{"text": "one"}\n{"text": "two"}\n', "jsonl"), (b"one\ntwo", "txt"), (b"", "txt")],
)
def test_stdin(monkeypatch, data, format):
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    with open(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        (source,) = open_sources(["-"])
        assert (source.name, source.format, source.seekable) == ("-", format, False)
        assert size_of(source) is None
        start = Position(1, data.index(b"\n") + 1) if data else Position()
        rows = rows_of(source, start=start)
        assert [(row.id, row.text) for row in rows] == ([("-:1", "two")] if data else [])
        assert not pipe.closed and not pipe.buffer.closed
        with pytest.raises(ValueError, match="--whole-files"):
            open_sources(["-"], whole_files=True)


def test_names_that_are_not_utf8(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff.txt")
    with open(path, "wb") as file:
        file.write(b"a\n")
    (source,) = open_sources([tmp_path])
    (whole,) = open_sources([tmp_path], whole_files=True)
    assert rows_of(source)[0].id == f"{tmp_path}/\ufffd.txt:0"
    assert rows_of(whole)[0].id == f"{tmp_path}/\ufffd.txt"
