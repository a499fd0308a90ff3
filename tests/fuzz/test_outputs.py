"""Damaged outputs of a bulk job: a shard is what was written or known to be damaged, a manifest is
one of a job or refused.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_fast.corpus.npy import npy_beside
from llm2vec_fast.corpus.plan import ManifestError, settle_manifest
from llm2vec_fast.corpus.read import Row
from llm2vec_fast.corpus.store import ShardError, check_shard, read_footer, read_shard, write_shard


def write(path, output_format: str, count: int = 9) -> None:
    rows = [Row(f"id {n}", "", [f"kept {n} 字"]) for n in range(count)]
    vectors = np.random.default_rng(0).standard_normal((count, 6)).astype(np.float16)
    statuses = ["ok", "error", "truncated"] * (count // 3)
    write_shard(
        path, rows, ("kept",), vectors, None, np.arange(count, dtype=np.int32), statuses,
        [f"note {n}" for n in range(count)], precision="float16", first_row=18,
        offsets=(100, 200), output_format=output_format,
    )  # fmt: skip


@pytest.mark.parametrize("output_format", ["parquet", "npy"])
@pytest.mark.parametrize("file", ["part.parquet", "part.npy"])
def test_shards(fuzz, tmp_path, output_format, file):
    path = tmp_path / "part.parquet"
    write(path, output_format)
    if file == "part.npy" and output_format == "parquet":
        npy_beside(path).write_bytes(b"left of another run")  # is nobody's
    whole, table, footer = (tmp_path / file).read_bytes(), read_shard(path), read_footer(path)

    def attempt(data: bytes) -> bool:
        (tmp_path / file).write_bytes(data)
        assert read_footer(path) in (footer, None), "a footer with other values"
        reason = check_shard(path)
        try:
            found = read_shard(path)
        except ShardError:
            assert reason
            return False
        assert reason or found.equals(table), "other data unnoticed"
        return not reason

    found = fuzz(fuzz.bytes((whole,), -0.6), attempt)
    assert found["refused"] > 50 or (file, output_format) == ("part.npy", "parquet")


def without_null(told):
    """Left out is null."""
    return {k: v for k, v in told.items() if v is not None} if isinstance(told, dict) else told


def test_manifests(fuzz, tmp_path):
    wanted = {
        "inputs": [{"path": "t.txt", "size": 10, "mtime_ns": 1, "ends": "00"}],
        "columns": {"text": "text", "id": None, "keep": []}, "rows_per_shard": 10,
        "output_format": "parquet", "model": {"base": "m", "settings": {"max_length": 512}},
        "vectors": {"precision": "float16", "dimension": 6, "tokens_per_batch": 64},
    }  # fmt: skip
    path = tmp_path / "manifest.json"
    settle_manifest(tmp_path, wanted)
    whole = path.read_text()

    def attempt(data: str | bytes) -> bool:
        path.write_bytes(data.encode(errors="replace") if isinstance(data, str) else data)
        before = path.read_bytes()
        try:
            found = settle_manifest(tmp_path, wanted, append=True)
        except ManifestError:
            assert path.read_bytes() == before
            return False
        for name in set(wanted) - {"inputs"}:
            assert without_null(found.get(name, "parquet")) == without_null(wanted[name])
        return True

    found = fuzz(st.one_of(fuzz.json(whole), fuzz.bytes((whole.encode(),))), attempt)
    assert found["refused"] > found["read"] > 0
