"""A tiny encoder to evaluate, causal and not, and the real data where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2vec_fast import LLM2Vec

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def tiny_encoder(tiny_model, add_tokenizer, tmp_path_factory):
    """tiny_encoder(**options) -> LLM2Vec in fp32 with random weights; `.path` is its directory"""
    directory = add_tokenizer(tiny_model(tmp_path_factory.mktemp("evaluate"), "llama"))

    def load(**options) -> LLM2Vec:
        model = LLM2Vec.from_pretrained(directory, dtype="float32", device="cpu", **options)
        model.path = directory
        return model

    return load


@pytest.fixture(scope="session")
def shared_data():
    """shared_data("stsb/stsb-en-dev.csv") -> Path; skips where the data is absent"""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"the public data {name} is not beside this checkout")
        return DATA / name

    return find
