"""The real model, end to end. Takes about a minute on two cores: 135M parameters in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2vec_fast import LLM2Vec

TEXTS = [
    "The Eiffel Tower is a wrought-iron lattice tower in Paris.",
    "Il fait beau aujourd'hui, n'est-ce pas?",
    "def read(path):\n    with open(path) as file:\n        return file.read()",
    "yes",
]


@pytest.fixture(scope="module")
def causal(smollm2):
    return LLM2Vec.from_pretrained(
        smollm2, enable_bidirectional=False, pooling_mode="weighted_mean", dtype="float32"
    )


def test_vectors_do_not_depend_on_the_batch(causal):
    together = causal.encode(TEXTS, convert_to_numpy=True)
    alone = np.stack([causal.encode(text, convert_to_numpy=True) for text in TEXTS])
    scale = np.abs(together).max()
    assert np.abs(together - alone).max() <= 1e-5 * scale
    halves = causal.encode(TEXTS[::-1], tokens_per_batch=20, convert_to_numpy=True)[::-1]
    assert np.abs(together - halves).max() <= 1e-5 * scale


def test_similar_sentences_are_nearer(causal):
    a, b, c = causal.encode(
        ["A man is playing a guitar.", "Someone plays the guitar.", "Interest rates rose in March."]
    )
    cos = torch.nn.functional.cosine_similarity
    assert cos(a, b, dim=0) > cos(a, c, dim=0) + 0.02


def test_merged_save_round_trip(causal, tmp_path):
    """The weights were bf16 on disk, so that fp32 holds them exactly: nothing is lost."""
    causal.save(tmp_path / "merged", merge_before_save=True)
    again = LLM2Vec.from_pretrained(tmp_path / "merged", dtype="float32")
    assert again.settings == causal.settings
    torch.testing.assert_close(again.encode(TEXTS[:2]), causal.encode(TEXTS[:2]), rtol=0, atol=0)
