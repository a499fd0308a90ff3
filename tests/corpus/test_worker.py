"""One job: the three stages, errors that name rows, and batches that do not fit into memory."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from llm2vec_fast import LLM2Vec, batch
from llm2vec_fast.corpus import embed, run, worker
from llm2vec_fast.corpus.plan import Job
from llm2vec_fast.corpus.read import Columns, Rows, open_sources
from llm2vec_fast.corpus.store import read_shard, vectors_of
from llm2vec_fast.corpus.worker import Options, Work, run_shard

TEXTS = [f"{'list of values ' * (n % 5)}number {n}" for n in range(40)]


@pytest.fixture(scope="module")
def model(tiny_model, add_tokenizer, tmp_path_factory):
    directory = add_tokenizer(tiny_model(tmp_path_factory.mktemp("worker"), "llama"))
    return LLM2Vec.from_pretrained(directory, dtype="float32")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def rows_of(output) -> list[dict]:
    return [row for path in sorted(output.glob("part-*")) for row in read_shard(path).to_pylist()]


def test_run_shard_is_what_the_pipeline_does(model, source, tmp_path):
    embed(source, model, tmp_path / "out", rows_per_shard=40, show_progress=False)
    found = open_sources([source])[0]
    with Rows(found, Columns()) as reader:
        rows, end = reader.take(40)
    from llm2vec_fast.corpus.read import Position

    (tmp_path / "alone").mkdir()
    work = Work(Job(0, 0), found, rows, Position(), end)
    footer = run_shard(work, model, tmp_path / "alone", Options(rows_per_shard=40))
    assert footer.rows == 40
    name = "part-00000-000000.parquet"
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def out_of_memory_beyond(model, monkeypatch, limit: int):
    """The device has room for `limit` tokens in a batch."""
    forward, seen = model.model.forward, []

    def limited(batch, *training):
        seen.append(batch.n_tokens)
        if batch.n_tokens > limit:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch, *training)

    monkeypatch.setattr(model.model, "forward", limited)
    return seen


def test_out_of_memory_halves_the_batches(model, source, tmp_path, monkeypatch):
    expected = model.encode(TEXTS, convert_to_numpy=True)
    seen = out_of_memory_beyond(model, monkeypatch, 150)
    out = tmp_path / "out"
    embed(source, model, out, tokens_per_batch=1000, precision="float32", show_progress=False)
    assert 500 < max(seen) <= 1000 and 50 < max(n for n in seen if n <= 150)
    got = vectors_of(read_shard(out / "part-00000-000000.parquet"), "float32", 48)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_batches_before_the_one_that_failed_are_not_counted_twice(
    model, source, tmp_path, monkeypatch
):
    tokens = sum(map(len, model.tokenizer(TEXTS, [""] * 40)))
    forward, calls = model.model.forward, []

    def fails_once(batch, *training):
        calls.append(batch.n_tokens)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch, *training)

    monkeypatch.setattr(model.model, "forward", fails_once)
    counted = np.zeros(2, dtype=int)
    update = run.Progress.update

    def count(self, documents, tokens):
        counted[:] += documents, tokens
        update(self, documents, tokens)

    monkeypatch.setattr(run.Progress, "update", count)
    embed(source, model, tmp_path / "out", tokens_per_batch=200, show_progress=False)
    assert max(calls[:3]) > 100 >= max(calls[3:])
    assert calls[0] + calls[1] + sum(calls[3:]) == tokens  # nothing is computed twice
    assert counted.tolist() == [40, tokens]


def test_a_text_that_never_fits_is_an_error_of_its_own(model, tmp_path, monkeypatch):
    texts = [*TEXTS[:7], "value " * 90, *TEXTS[7:12]]
    expected = model.encode(texts, convert_to_numpy=True)
    source = tmp_path / "t.txt"
    source.write_text("\n".join(texts))
    seen = out_of_memory_beyond(model, monkeypatch, 80)
    with pytest.raises(ValueError, match=r"row 7 of .*t\.txt: its \d+ tokens do not fit"):
        embed(source, model, tmp_path / "raised", show_progress=False)
    out = tmp_path / "out"
    seen.clear()
    embed(source, model, out, precision="float32", on_error="skip", show_progress=False)
    assert sum(n for n in seen if n <= 80) == sum(
        len(tokens) for tokens in model.tokenizer(texts, [""] * 13) if len(tokens) <= 80
    )
    rows = rows_of(out)
    assert [row["status"] for row in rows] == ["ok"] * 7 + ["error"] + ["ok"] * 5
    assert "do not fit" in rows[7]["note"] and rows[7]["embedding"] is None
    del rows[7]
    got = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(got, np.delete(expected, 7, 0), atol=1e-5)


def test_the_thread_that_writes_waits_for_the_device(model, source, tmp_path, monkeypatch):
    """So the next job is queued meanwhile."""
    waited, result = [], batch.Download.result

    def wait(self):
        waited.append(threading.current_thread().name)
        return result(self)

    monkeypatch.setattr(batch.Download, "result", wait)
    embed(source, model, tmp_path / "out", rows_per_shard=10, show_progress=False)
    assert waited == ["store"] * 4


def test_what_reading_changed_is_noted(model, tmp_path):
    source = tmp_path / "t.jsonl"
    source.write_text('{"text": "a lone \\ud800 one"}\n{"text": "' + "value " * 900 + '\\ud800"}\n')
    embed(source, model, tmp_path / "out", show_progress=False)
    first, second = rows_of(tmp_path / "out")
    assert first["status"] == "ok" and "surrogate" in first["note"]
    assert second["status"] == "truncated"
    assert "surrogate" in second["note"] and "tokens" in second["note"]


@pytest.mark.parametrize("stage", ["prepare", "compute", "store"])
def test_an_error_in_any_stage_names_the_rows_and_keeps_finished_shards(
    model, source, tmp_path, monkeypatch, stage
):
    real = getattr(worker, stage)

    def fail(work, *rest):
        if work.job.number == 2:
            time.sleep(0.2)  # the jobs before are done by then
            raise RuntimeError("no more")
        return real(work, *rest)

    monkeypatch.setattr(run, stage, fail)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="no more") as caught:
        embed(source, model, out, rows_per_shard=5, show_progress=False)
    assert caught.value.__notes__ == [f"in rows 10 to 14 of {source} (part-00000-000002.parquet)"]
    assert sorted(p.name for p in out.glob("part-*")) == [
        "part-00000-000000.parquet",
        "part-00000-000001.parquet",
    ]
    assert not [t for t in threading.enumerate() if t.name in ("read", "store")]
    monkeypatch.setattr(run, stage, real)
    summary = embed(source, model, out, rows_per_shard=5, show_progress=False)
    assert (summary.documents, summary.reused) == (30, 10)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"on_error": "ignore"}, "on_error"),
        ({"rows_per_shard": 0}, "rows_per_shard"),
        ({"output_format": "csv"}, "output_format"),
        ({"precision": "int4"}, "precision"),
    ],
)
def test_options_are_checked_before_anything_is_written(model, source, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        embed(source, model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
