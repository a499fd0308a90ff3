"""Adapters that come with the package: found by name, sound, and better than the bare model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_fast import LLM2Vec, adapters
from llm2vec_fast.demo import ADAPTERS
from llm2vec_fast.model.lora import read_config
from llm2vec_fast.model.source import find

STACK = [name.removeprefix(adapters.PREFIX) for name in ADAPTERS]
STSB = Path(__file__).parents[2] / "shared/data/stsb/stsb-en-dev.csv"


def test_names_are_found_with_and_without_the_prefix():
    assert adapters.names() == sorted(STACK)
    for name in STACK:
        assert adapters.shipped(name) == adapters.shipped(f"shipped:{name}")
        assert find(f"shipped:{name}") == adapters.shipped(name)


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean shipped:smollm2-135m-mntp"):
        find("shipped:smollm-135m-mntp")


def test_they_are_small_and_name_their_base():
    files = [file for name in STACK for file in adapters.shipped(name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    for name in STACK:
        directory = adapters.shipped(name)
        told = read_config(directory)
        assert told["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        weights = load_file(directory / "adapter_model.safetensors")
        kinds = {(bool(t.isfinite().all()), str(t.dtype)) for t in weights.values()}
        assert kinds == {(True, "torch.bfloat16")}
        assert "standard library" in (directory / "README.md").read_text(encoding="utf-8")


def test_the_stack_is_better_than_the_bare_model(smollm2):
    """On fifty pairs already; the whole set stands in benchmarks/results."""
    if not STSB.exists():
        pytest.skip("the evaluation data is not here")
    pytest.importorskip("scipy")
    from llm2vec_fast.evaluate import sts_spearman

    bare = LLM2Vec.from_pretrained(smollm2)
    causal = LLM2Vec.from_pretrained(smollm2, enable_bidirectional=False)
    stack = LLM2Vec.from_pretrained(smollm2, ADAPTERS[:2])  # the third is for docstrings
    assert stack.tokenizer.max_length == 512 and stack.settings["pooling_mode"] == "mean"
    found = sts_spearman(stack, STSB, limit=150)
    assert found > sts_spearman(causal, STSB, limit=150) + 5
    assert found > sts_spearman(bare, STSB, limit=150) + 10


def test_the_last_adapter_finds_docstrings(smollm2):
    """Documents that it was not trained on, asked for by the words of their names (in-domain)."""
    from benchmarks.recipe import words_of
    from llm2vec_fast.demo import sample

    chosen = sample()[::8]

    def found(adapters):
        model = LLM2Vec.from_pretrained(smollm2, adapters, max_length=64)
        query = model.encode([words_of(name) for name, _ in chosen], normalize=True)
        document = model.encode([text for _, text in chosen], normalize=True)
        return ((query @ document.T).argmax(1) == torch.arange(len(chosen))).float().mean()

    assert found(ADAPTERS) > found(ADAPTERS[:2]) + 0.2
