"""The benchmark of training compares like with like: the Trainer is its own oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
WORDS = "the of and to in a is that for it was on are as with they be at one have this".split()


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import _train_worker

    return _train_worker


@pytest.fixture
def spec_of(tmp_path, tiny_model, add_tokenizer):
    """spec_of(kind): what a worker of the benchmark is asked, on a tiny model and made-up texts."""
    noise = torch.Generator().manual_seed(0)
    draws = torch.randint(len(WORDS), (60, 12), generator=noise).tolist()
    texts = [" ".join(WORDS[i] for i in row[: 3 + n % 10]) for n, row in enumerate(draws)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    model = tiny_model(tmp_path, "llama", causal_lm=True)
    add_tokenizer(model)

    def make(kind: str, **fields) -> dict:
        fields |= {
            "model_name_or_path": str(model), "output_dir": str(tmp_path / "none"),
            "train_file": str(tmp_path / "texts.jsonl"), "device": "cpu",
            "per_device_train_batch_size": 4, "max_seq_length": 24, "lora_dropout": 0.0,
            "torch_dtype": "float32",
        }  # fmt: skip
        return {
            "kind": kind, "model": str(model), "device": "cpu", "dtype": "float32",
            "rows": str(tmp_path / "rows.pt"), "fields": fields, "warm_up": 1, "steps": 1,
            "micro": 4, "checkpointing": False, "autocast": False, "attention": "sdpa",
        }  # fmt: skip

    return make


def test_both_rivals_train_on_the_same_masked_chunks(spec_of, worker):
    """Adapters change nothing at first: the losses of the first step are those of one model."""
    spec = spec_of("mntp")
    told = worker.write_rows(spec | {"steps": 2})
    assert told["texts"] == [4, 4] and told["tokens"] == told["padded"] == [96, 96]
    ours = worker.ours(spec)
    stock = worker.stock(spec | {"micro": 2, "checkpointing": True})
    assert len(ours["losses"]) == len(stock["losses"]) == 2 and len(ours["seconds"]) == 1
    assert ours["losses"][0] == pytest.approx(stock["losses"][0], rel=1e-5)
    assert ours["dtype"] == "float32"
    for found in (ours, stock):
        assert 0 < found["loaded_mb"] <= found["peak_mb"]


def test_both_rivals_train_on_the_same_pairs(spec_of, worker):
    spec = spec_of("simcse", simcse_dropout=0.0)
    told = worker.write_rows(spec | {"steps": 2})
    assert told["texts"] == [4, 4] and told["tokens"][0] < told["padded"][0]
    ours = worker.ours(spec)
    stock = worker.stock(spec)
    assert ours["losses"][0] == pytest.approx(stock["losses"][0], rel=1e-4)
