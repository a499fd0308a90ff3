"""Damaged, missing and foreign shards are found, each with its reason, and nothing else is."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search
from llm2vec_fast.corpus.npy import npy_beside
from llm2vec_fast.corpus.plan import FORMAT, MANIFEST, ManifestError
from llm2vec_fast.corpus.read import Row
from llm2vec_fast.corpus.store import check_shard, write_shard
from llm2vec_fast.corpus.verify import verify
from llm2vec_fast.model.checkpoint import write_json
from llm2vec_fast.vectors import PRECISIONS, finish

PER_SHARD, WIDTH = 10, 20


def add(out, source, number, *, count=PER_SHARD, precision="int8", layout="parquet", **changed):
    random = np.random.default_rng([source, number])
    first_row = changed.get("first_row", number * PER_SHARD)
    width = changed.get("width", WIDTH)
    vectors, scale = finish(random.standard_normal((count, width)), None, False, precision)
    path = out / f"part-{source:05d}-{number:06d}.parquet"
    write_shard(
        path, [Row(f"{source}:{n}", keep=["x"]) for n in range(count)],
        changed.get("keep", ("title",)), vectors, scale, np.ones(count, np.int32), ["ok"] * count,
        [""] * count, precision=precision, first_row=first_row, offsets=(0, 0),
        output_format=layout,
    )  # fmt: skip
    return path


def make(out, precision="int8", layout="parquet"):
    """Two inputs, of 3 shards and of 1."""
    out.mkdir()
    manifest = {
        "format": FORMAT,
        "inputs": [{"path": "a.txt"}, {"path": "b.txt"}],
        "columns": {"text": "text", "id": None, "keep": ["title"]},
        "rows_per_shard": PER_SHARD,
        "output_format": layout,
        "vectors": {"precision": precision, "dimension": WIDTH},
    }
    write_json(manifest, out / MANIFEST)
    jobs = ((0, 0, 10), (0, 1, 10), (0, 2, 4), (1, 0, 10))
    return [add(out, s, n, count=c, precision=precision, layout=layout) for s, n, c in jobs]


@pytest.mark.parametrize("layout", ["parquet", "npy"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_job_is_well(tmp_path, precision, layout):
    make(tmp_path / "out", precision, layout)
    seen = []
    assert verify(tmp_path / "out", lambda *at: seen.append(at)) == []
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_damaged_shards_are_found_and_removed(tmp_path, layout):
    out = tmp_path / "out"
    paths = make(out, layout=layout)
    flipped = npy_beside(paths[0]) if layout == "npy" else paths[0]
    data = bytearray(flipped.read_bytes())
    at = len(data) // 2
    if layout == "parquet":  # in the middle there is metadata: a byte of the vectors
        vectors = pq.read_metadata(flipped).row_group(0).column(2)
        at = vectors.data_page_offset + vectors.total_compressed_size // 4
    data[at] ^= 4
    flipped.write_bytes(data)
    paths[2].write_bytes(paths[2].read_bytes()[:-30])
    bad = verify(out)
    assert [path for path, _ in bad] == [paths[0], paths[2]]
    assert all(reason for _, reason in bad)
    assert all(path.exists() for path in paths)
    assert verify(out, remove=True) == bad
    assert sorted(out.glob("part-*.parquet")) == [paths[1], paths[3]]
    assert len(list(out.glob("*.npy"))) == (2 if layout == "npy" else 0)
    # What is left is whole; the first shard is known to be missing, the end of the input is not.
    assert [(path, reason[:7]) for path, reason in verify(out)] == [(paths[0], "missing")]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"width": WIDTH + 1}, "int8 x 21"),
        ({"precision": "float16"}, "float16 x 20"),
        ({"first_row": 9}, "rows from 9 on"),
        ({"count": PER_SHARD + 1}, "11 rows from 10 on"),
        ({"layout": "npy"}, "layout is npy"),
        ({"keep": ()}, "no column title"),
    ],
)
def test_a_whole_shard_of_another_job_is_found(tmp_path, changed, reason):
    make(tmp_path / "out")
    path = add(tmp_path / "out", 0, 1, **changed)
    assert check_shard(path) is None
    ((found, why),) = verify(tmp_path / "out")
    assert found == path and reason in why


def test_a_shard_of_no_input_is_found(tmp_path):
    make(tmp_path / "out")
    path = add(tmp_path / "out", 2, 0)
    ((found, why),) = verify(tmp_path / "out")
    assert found == path and "no input" in why


@pytest.mark.parametrize("layout", ["parquet", "npy"])
def test_what_is_removed_the_same_command_makes_again(tiny_model, add_tokenizer, tmp_path, layout):
    model = LLM2Vec.from_pretrained(add_tokenizer(tiny_model(tmp_path, "llama")), dtype="float32")
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("".join(f"document number {n}\n" for n in range(14)))
    options = {"rows_per_shard": 5, "precision": "int8", "output_format": layout}
    embed(source, model, out, **options)
    assert verify(out) == []
    before = {path.name: path.read_bytes() for path in out.glob("part-*")}
    hits = search(out, "number 7", model=model)
    path = out / f"part-00000-000001.{layout}"
    path.write_bytes(path.read_bytes()[:-9])
    (bad,) = verify(out, remove=True)
    assert bad[0].name == "part-00000-000001.parquet"
    summary = embed(source, model, out, **options)
    assert (summary.documents, summary.reused) == (5, 9)
    assert {path.name: path.read_bytes() for path in out.glob("part-*")} == before
    assert verify(out) == [] and search(out, "number 7", model=model) == hits


def test_not_a_job(tmp_path):
    with pytest.raises(ManifestError):
        verify(tmp_path)
