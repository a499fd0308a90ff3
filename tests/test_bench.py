"""`bench`: stock transformers makes our vectors; what it cannot do is told and ends nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from llm2vec_fast import LLM2Vec, bench
from llm2vec_fast.cli import app

ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
TEXTS = ["a list of numbers", "the keys of a dict, " * 6, "key", "numbers in a list, sorted " * 2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llm2vec_fast", "bench", "--device", "cpu", *arguments]
    return subprocess.run(command, env=ENV, capture_output=True, text=True)


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("bench"), "llama"))


@pytest.fixture
def no_ceiling(monkeypatch):
    """Without the seconds of matrix products, which the first test measures."""
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1e11)


@pytest.fixture(scope="module")
def adapter(directory, tmp_path_factory):
    """A LoRA adapter that changes every vector."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModel

    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    path = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(AutoModel.from_pretrained(directory), settings).save_pretrained(path)
    return path


def test_a_table_and_rows_of_ours_and_of_transformers(directory, adapter, tmp_path):
    source, out = tmp_path / "own.jsonl", tmp_path / "rows.json"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*TEXTS, " ", "last"]))
    done = run(
        str(source), "--model", str(directory), "--adapter", str(adapter), "--text-column", "body",
        "--texts", "4", "--minutes", "0.02", "--dtype", "float32", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("llm2vec_fast", "transformers", "unsorted", "ours is", "4 of 4 texts", "torch 2."):
        assert word in done.stdout
    told = json.loads(out.read_text())
    ours, *stock = told["rows"]
    assert told["machine"]["torch"] and ours["adapters"] == [adapter.name] and len(stock) == 2
    for row in told["rows"]:
        assert row["texts"] == 4 and row["rounds"] == len(row["all_seconds"]) >= 2
        assert row["tokens_per_s"] > row["docs_per_s"] > 0 and row["of_matmul"] > 0
        assert row["min_cosine"] > 1 - 1e-5


@pytest.mark.parametrize("mode", ["mean", "weighted_mean", "last_token", "bos_token"])
@pytest.mark.parametrize("family, causal", [("llama", False), ("mistral", True), ("qwen2", False)])
def test_transformers_makes_our_vectors(tiny_model, add_tokenizer, tmp_path, family, causal, mode):
    """However it is batched: padding, the mask and the pooled span are right; "" is zero."""
    own = {"sliding_window": 8} if family == "mistral" else {}
    own |= {"use_sliding_window": True, "max_window_layers": 0} if family == "qwen2" else {}
    path = add_tokenizer(tiny_model(tmp_path, family, **own))
    model = LLM2Vec.from_pretrained(
        path, device="cpu", dtype="float32", pooling_mode=mode, enable_bidirectional=not causal
    )
    stock, texts = bench.Stock(model), [*TEXTS, ""]
    wanted = model.encode(texts, convert_to_numpy=True)
    for size, by_length in ((1, True), (2, True), (8, False)):
        np.testing.assert_allclose(stock.encode(texts, size, by_length), wanted, atol=2e-4)


def test_what_transformers_cannot_do_is_told(directory, no_ceiling, monkeypatch, capsys):
    def fail(self, ours):
        raise RuntimeError("no such [class]")

    monkeypatch.setattr(bench.Stock, "__init__", fail)
    model = LLM2Vec.from_pretrained(directory, device="cpu", dtype="float32")
    *_, rows = bench.compare(model, TEXTS, minutes=0)
    assert [row["rival"] for row in rows] == ["llm2vec_fast", "transformers"]
    assert rows[0]["rounds"] == 2 and "no such [class]" in rows[1]["error"]
    bench.show(rows, {"cpu": "a cpu", "torch": "2", "transformers": "5"})
    assert "no such [class]" in capsys.readouterr().out


def test_fp8_has_no_rival(tiny_model, add_tokenizer, tmp_path, no_ceiling):
    path = add_tokenizer(tiny_model(tmp_path, "llama", num_hidden_layers=4))
    model = LLM2Vec.from_pretrained(path, device="cpu", dtype="fp8")
    *_, rows = bench.compare(model, TEXTS[:1], minutes=0)
    assert rows[0]["dtype"] == "fp8" and rows[0]["rounds"] == 2
    assert "compare with --dtype bfloat16" in rows[1]["error"]


def test_a_rival_that_fails_on_the_way_keeps_the_others(directory, no_ceiling, monkeypatch):
    honest = bench.Stock.encode

    def fail(self, texts, size, by_length):
        if not by_length:
            raise MemoryError("full")
        return honest(self, texts, size, by_length)

    monkeypatch.setattr(bench.Stock, "encode", fail)
    model = LLM2Vec.from_pretrained(directory, device="cpu", dtype="float32")
    *_, rows = bench.compare(model, TEXTS, minutes=0)
    assert ["error" in row for row in rows] == [False, False, True]
    assert rows[1]["rounds"] == 2 and "full" in rows[2]["error"]


def test_only_texts_that_there_is_time_for(monkeypatch):
    """A text takes half a second here."""
    tried = []

    def seconds_of(call, device):
        tried.append(len(call.args[0]))
        return tried[-1] / 2

    monkeypatch.setattr(bench, "seconds_of", seconds_of)
    for there, seconds, wanted in ((100, 6.0, 12), (10, 60.0, 10), (100, 0.0, 2), (1, 9.0, 1)):
        assert bench._fitting(lambda texts: None, ["x"] * there, "cpu", seconds) == wanted
    assert tried == [2, 4, 8, 2, 4, 8, 10, 2, 1]


def test_what_a_user_can_mend(directory, tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("a list\n")
    for arguments, word in (
        (("--model", str(tmp_path / "none"), str(good)), "none"),
        (("--model", str(directory), "absent.txt"), r"absent\.txt"),
        (("--model", str(directory), str(good), "--json", str(tmp_path)), "--json"),
    ):
        with pytest.raises(ValueError, match=word):
            app(["bench", *arguments], standalone_mode=False)
