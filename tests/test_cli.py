"""The command line as a person types it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llm2vec_fast", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("cli"), "llama"))


def test_embed_then_search(directory, tmp_path):
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("a list of numbers\nthe keys of a dict\n")
    command = ("embed", str(source), "--model", str(directory), "--output", str(out), "--causal")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout and "2 ok" in done.stdout
    assert "2 reused" in run(*command).stdout
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["settings"]["enable_bidirectional"] is False
    found = run("search", str(out), "a list of numbers", "--k", "1", "--json")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["hits"][0]["id"].endswith("t.txt:0") and answer["hits"][0]["score"] > 0.99
    assert "t.txt:0" in run("search", str(out), "a list of numbers").stdout


def test_errors_are_one_line_without_a_traceback(directory, tmp_path):
    done = run("embed", "absent.txt", "--model", str(directory), "--output", str(tmp_path / "o"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "absent.txt" in done.stderr
    assert "Traceback" not in done.stderr
    unknown = run("embed", "x.txt", "--modle", "y")
    assert unknown.returncode == 2 and "--modle" in unknown.stderr
    assert run("nonsense").returncode == 2


def test_doctor_tells_machine_versions_and_backends(directory):
    done = run("doctor", "--model", str(directory))
    assert done.returncode == 0, done.stderr
    for word in ("torch", "triton", "nvcc", "attention", "sdpa", "needs a CUDA device", "template"):
        assert word in done.stdout
