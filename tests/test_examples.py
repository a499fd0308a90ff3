"""Every example runs, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_every_example_is_tested():
    tested = {"encode.py", "embed_corpus.py", "open_vectors.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
