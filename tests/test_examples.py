"""Every example runs, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("examples"), "llama"))


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_encode(directory):
    assert len(run("encode.py", str(directory)).splitlines()) == 2


def test_embed_corpus(directory, tmp_path):
    (tmp_path / "t.txt").write_text("a list\na dict\na set of keys\n")
    told = run("embed_corpus.py", str(directory), str(tmp_path / "t.txt"), str(tmp_path / "out"))
    assert "3 documents" in told and len(told.splitlines()) == 6  # 3 of the summary, 3 hits
    opened = run("open_vectors.py", str(tmp_path / "out"))
    assert "pyarrow: 3 vectors of 48 dimensions" in opened
    assert all(f"{tool}: " in opened for tool in ("polars", "duckdb", "faiss"))


def test_st_encode(directory, tmp_path):
    pytest.importorskip("sentence_transformers")
    assert len(run("st_encode.py", str(directory), str(tmp_path / "saved")).splitlines()) == 2


def test_mteb_local_task(directory, tmp_path):
    pytest.importorskip("mteb")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "a dict"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a map"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    assert "ndcg_at_10: 1.0000" in run("mteb_local_task.py", str(directory), str(tmp_path))


def test_langchain_search(directory, tmp_path):
    pytest.importorskip("langchain_core")
    (tmp_path / "t.txt").write_text("a list\na dict\na set of keys\na file\n")
    told = run("langchain_search.py", str(directory), str(tmp_path / "t.txt"))
    assert len(told.splitlines()) == 3


def test_rag_search(directory, tmp_path):
    rows = ({"title": f"T{i}", "text": t} for i, t in enumerate(["a list", "a dict", "a file"]))
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = (str(directory), str(tmp_path / "t.jsonl"), str(tmp_path / "out"), "what is a map?")
    told = run("rag_search.py", *arguments)
    assert told.endswith("Question: what is a map?\n")
    assert sorted(line[4:] for line in told.splitlines() if line[:1] == "[") == ["T0", "T1", "T2"]
    assert run("rag_search.py", *arguments) == told  # embedded once, searched twice


def test_train_your_own(tiny_model, add_tokenizer, tmp_path):
    model = add_tokenizer(tiny_model(tmp_path, "llama", causal_lm=True))
    lines = (f"{'a list of values, ' * (n % 5)}number {n} of a dictionary" for n in range(40))
    (tmp_path / "t.txt").write_text("\n".join(lines))
    words = ("--max_steps", "2", "--per_device_train_batch_size", "4", "--max_seq_length", "32")
    told = run("train_your_own.py", str(model), str(tmp_path / "t.txt"), str(tmp_path), *words)
    assert [line.split(":")[0] for line in told.splitlines()] == ["mntp", "simcse", "cosine"]
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_embed_with_ray(directory, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)  # or one is put into the home directory
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES", str(200 << 20))
    pq.write_table(pa.table({"text": ["a list", "a dict"], "n": [1, 2]}), tmp_path / "t.parquet")
    out = tmp_path / "out"
    told = run("embed_with_ray.py", str(directory), str(tmp_path / "t.parquet"), str(out))
    assert told.splitlines()[-1] == f"2 rows with vectors in {out}"
    assert sorted(pq.read_table(out).column_names) == ["embedding", "n", "text"]


def test_every_example_is_tested():
    tested = {"encode.py", "embed_corpus.py", "open_vectors.py"}
    tested |= {"st_encode.py", "mteb_local_task.py"}
    tested |= {"langchain_search.py", "rag_search.py", "train_your_own.py"}
    tested |= {"embed_with_ray.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
