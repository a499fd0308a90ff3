"""Shards are there whole or not at all, and any byte that changes afterwards is found."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_fast.corpus import store
from llm2vec_fast.corpus.npy import npy_beside
from llm2vec_fast.corpus.read import Row
from llm2vec_fast.corpus.store import (
    ShardError,
    StoreError,
    blocks_of,
    check_shard,
    clean_partials,
    read_footer,
    read_shard,
    rows_at,
    vectors_of,
    write_shard,
)
from llm2vec_fast.vectors import PRECISIONS, finish

FAILED = 3


def write(path, count=10, width=20, precision="float32", output_format="parquet", seed=0):
    """A shard of random vectors whose row 3 failed. Returns (vectors as stored, footer)."""
    random = np.random.default_rng(seed)
    vectors, scale = finish(random.standard_normal((count, width)), None, False, precision)
    statuses = ["error" if row == FAILED else "ok" for row in range(count)]
    footer = write_shard(
        path, [Row(f"id {n}", keep=[f"kept {n}", None]) for n in range(count)], ("a", "b"),
        vectors, scale, np.arange(count, dtype=np.int32), statuses, ["note"] * count,
        precision=precision, first_row=7, offsets=(100, 200), output_format=output_format,
    )  # fmt: skip
    vectors[FAILED : FAILED + 1] = 0
    return vectors, footer


@pytest.mark.parametrize("output_format", store.LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [0, 1, 10])
def test_what_is_written_is_read(tmp_path, precision, output_format, count):
    path = tmp_path / "part-0.parquet"
    vectors, footer = write(path, count, precision=precision, output_format=output_format)
    assert read_footer(path, thorough=True) == footer and check_shard(path) is None
    assert (footer.first_row, footer.rows, footer.end_offset) == (7, count, 200)
    assert footer.tokens == sum(range(count))
    assert footer.statuses == ({"error": 1, "ok": 9} if count == 10 else {"ok": 1} if count else {})
    table = read_shard(path)
    scale = ["scale"] if precision == "int8" else []
    names = ["id", "a", "b", "embedding", *scale, "n_tokens", "status", "note"]
    assert table.column_names == names
    assert table["embedding"].type.value_type == store.STORED[precision]
    assert table["embedding"].null_count == (count > FAILED)
    assert table["id"].to_pylist() == [f"id {n}" for n in range(count)]
    assert table["b"].null_count == count
    blocks = list(blocks_of(path, rows=4))
    assert [block.first for block in blocks] == list(range(0, count, 4))
    if count:
        stored = np.concatenate([block.vectors for block in blocks])
        assert stored.dtype == vectors.dtype
        np.testing.assert_array_equal(stored, vectors)
    wanted = vectors.astype(np.float32)
    if precision == "binary":
        wanted = np.unpackbits(vectors, axis=1)[:, :20].astype(np.float32) * 2 - 1
        wanted[FAILED : FAILED + 1] = 0
    np.testing.assert_array_equal(vectors_of(table, precision, 20), wanted)
    part = table.slice(1, 5)  # offsets inside of the arrays
    np.testing.assert_array_equal(vectors_of(part, precision, 20), wanted[1:6])
    assert read_shard(path, ["embedding", "id"]).column_names == ["embedding", "id"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_npy_can_be_mapped_into_memory(tmp_path, precision):
    path = tmp_path / "part-0.parquet"
    vectors, _ = write(path, precision=precision, output_format="npy")
    mapped = np.load(tmp_path / "part-0.npy", mmap_mode="r", allow_pickle=False)
    assert isinstance(mapped, np.memmap) and mapped.dtype == vectors.dtype
    np.testing.assert_array_equal(mapped, vectors)
    assert "embedding" not in pq.read_schema(path).names


def test_a_byte_takes_a_byte(tmp_path):
    """Parquet stores plain int8 in four bytes."""
    for precision, size in (("float32", 4), ("float16", 2), ("int8", 1), ("binary", 1 / 8)):
        path = tmp_path / f"{precision}.parquet"
        write(path, 3000, 256, precision)
        assert path.stat().st_size < 1.15 * 3000 * 256 * size + 3000 * 35


def test_several_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BLOCK", 8)
    path = tmp_path / "part-0.parquet"
    vectors, _ = write(path, 21)
    assert pq.read_metadata(path).num_row_groups == 3
    np.testing.assert_array_equal(vectors_of(read_shard(path), "float32", 20), vectors)
    found = rows_at(path, [20, 0, 8, 8, 7], ["id", "a"])
    assert found == {n: {"id": f"id {n}", "a": f"kept {n}"} for n in (0, 7, 8, 20)}


@pytest.mark.parametrize("output_format", store.LAYOUTS)
def test_no_changed_bit_is_missed(tmp_path, output_format):
    """Any bit anywhere: found, or (statistics, padding) every column still reads the same."""
    path = tmp_path / "part-0.parquet"
    write(path, output_format=output_format)
    whole, table, footer = path.read_bytes(), read_shard(path), read_footer(path)
    random, found = np.random.default_rng(1), 0
    places = random.integers(0, 8 * len(whole), 400)
    for place in places.tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        reason = check_shard(path)
        found += reason is not None
        assert read_footer(path) in (footer, None), "a footer with other values"
        if reason is None:
            assert read_shard(path).equals(table), f"bit {place} changed data unnoticed"
        else:
            assert reason and read_footer(path, thorough=True) is None
    assert found > 150


@pytest.mark.parametrize("output_format", store.LAYOUTS)
def test_a_shard_cut_short_is_no_shard(tmp_path, output_format):
    path = tmp_path / "part-0.parquet"
    write(path, output_format=output_format)
    whole = path.read_bytes()
    for size in np.linspace(0, len(whole) - 1, 40).astype(int).tolist():
        path.write_bytes(whole[:size])
        assert read_footer(path) is None
        assert "footer" in check_shard(path)
    with pytest.raises(ShardError, match=r"part-0\.parquet.*--verify"):
        read_shard(path)
    path.unlink()
    assert "no such file" in check_shard(path)


def test_a_changed_npy_is_found(tmp_path):
    path = tmp_path / "part-0.parquet"
    write(path, output_format="npy")
    npy, footer = npy_beside(path), read_footer(path)
    whole = npy.read_bytes()
    for place in (3, 20, 70, 128, len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 1
        npy.write_bytes(data)
        assert read_footer(path) == footer  # the size is right: only reading it all can tell
        assert check_shard(path) and read_footer(path, thorough=True) is None
        with pytest.raises(ShardError):
            list(blocks_of(path, rows=4))
        with pytest.raises(ShardError):
            read_shard(path)
    npy.write_bytes(whole[:-1])
    assert read_footer(path) is None and "bytes" in check_shard(path)
    npy.unlink()
    assert read_footer(path) is None and "missing" in check_shard(path)


@pytest.mark.parametrize("output_format", store.LAYOUTS)
def test_a_full_disk_leaves_nothing_behind(tmp_path, output_format):
    """A limit on the size of files stands for the disk: the same OSError in the middle of it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "part-0.parquet"
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StoreError, match=r"part-0\.(parquet|npy).*the same command") as told:
            write(path, 1000, output_format=output_format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []
    write(path, 1000, output_format=output_format)
    assert check_shard(path) is None


def test_no_directory(tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        write(tmp_path / "absent" / "part-0.parquet")


def test_a_column_of_ours_cannot_be_kept(tmp_path):
    with pytest.raises(ValueError, match="'status' cannot be kept"):
        write_shard(
            tmp_path / "part-0.parquet", [Row("a", keep=["x"])], ("status",), np.zeros((1, 4)),
            None, np.zeros(1, np.int32), ["ok"], [""],
            precision="float32", first_row=0, offsets=(0, 0),
        )  # fmt: skip
    with pytest.raises(ValueError, match="output_format"):
        write(tmp_path / "part-0.parquet", output_format="csv")


KILLED = """
import os, signal, sys
from pathlib import Path
from llm2vec_fast.corpus.atomic import atomically
with atomically(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_the_dead_are_removed(tmp_path):
    path = tmp_path / "part-00000-000000.parquet"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert killed.returncode == -signal.SIGKILL and not path.exists()
    (left,) = tmp_path.iterdir()
    host = platform.node() or "host"
    mine = tmp_path / f"part-00000-000001.npy.{host}-{os.getpid()}.partial"
    elsewhere = tmp_path / f"part-00000-000002.parquet.far-away-{os.getpid()}.partial"
    forgotten = tmp_path / f"part-00000-000003.parquet.far-away-{os.getpid()}.partial"
    for file in (mine, elsewhere, forgotten):
        file.write_bytes(b"half")
    write(path)
    hours_ago = time.time() - 2 * 3600
    os.utime(forgotten, (hours_ago, hours_ago))
    assert set(clean_partials(tmp_path)) == {left, forgotten}
    assert set(tmp_path.iterdir()) == {path, mine, elsewhere}


def test_npy_alone_is_not_finished(tmp_path, monkeypatch):
    """Killed between the two files: the shard is redone, over what is there."""
    path = tmp_path / "part-0.parquet"
    write(path, output_format="npy", seed=1)
    path.unlink()
    assert read_footer(path) is None
    vectors, _ = write(path, output_format="npy", seed=2)
    assert check_shard(path) is None
    np.testing.assert_array_equal(np.load(npy_beside(path)), vectors)


def test_a_foreign_parquet_file_is_refused(tmp_path):
    path = tmp_path / "part-0.parquet"
    pq.write_table(pa.table({"embedding": [1, 2], "status": ["ok", "ok"]}), path)
    assert read_footer(path) is None and "footer" in check_shard(path)
