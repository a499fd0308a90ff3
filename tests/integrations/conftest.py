"""Tiny models for other libraries' doors."""

from __future__ import annotations

import pytest

from llm2vec_fast import LLM2Vec

TEXTS = [
    "a cat",
    "The quick brown fox jumps over the lazy dog.",
    "dict() -> new empty dictionary\ndict(mapping) -> new dictionary",
    "x",
    "list of numbers, list of words and a set of both of them " * 3,
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return list(TEXTS)


@pytest.fixture(scope="session")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    """A tiny model with its tokenizer, which must not be written to."""
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("integrations"), "llama"))


@pytest.fixture
def encoder(directory) -> LLM2Vec:
    """A model of its own for each test: some are trained."""
    return LLM2Vec.from_pretrained(directory, dtype="float32", device="cpu")
