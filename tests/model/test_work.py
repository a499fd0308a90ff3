"""Counted arithmetic against torch's own counter; the measured rate of matrix products."""

from __future__ import annotations

import time

import pytest
import torch

from llm2vec_fast.model import ModelConfig, work


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_forward_flop_is_what_torch_counts_in_transformers(tiny_model, family):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    directory = tiny_model(None, family)
    config = ModelConfig.from_file(directory / "config.json")
    model = AutoModel.from_pretrained(directory, attn_implementation="eager")
    lengths = (1, 40, 17)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for length in lengths:
            model(input_ids=torch.arange(length)[None])
    counted = counter.get_total_flops()
    # Norms and biases are counted as if they were matrices: next to nothing, never too little.
    assert counted <= work.forward_flop(config, lengths) <= 1.02 * counted


def test_attention_grows_with_the_square_of_a_length(tiny_model):
    config = ModelConfig.from_file(tiny_model(None, "llama") / "config.json")
    apart, together = work.forward_flop(config, [64] * 4), work.forward_flop(config, [256])
    scores = 4 * config.n_heads * config.head_dim * config.n_layers
    assert together - apart == scores * (256**2 - 4 * 64**2)


def test_the_rate_is_the_best_of_the_models_shapes(tiny_model, monkeypatch):
    config = ModelConfig.from_file(tiny_model(None, "llama") / "config.json")
    seen = {}

    def rate(shape, dtype, device, seconds):
        assert (dtype, device, seconds) == (torch.float32, torch.device("cpu"), 0.5)
        seen[shape] = float(len(seen) + 1)
        return seen[shape]

    monkeypatch.setattr(work, "_rate_of", rate)
    assert work.matmul_rate(config, torch.float32, "cpu", 0.5) == 5.0
    # (features in, features out): qkv, o, gate and up, down
    assert {(k, n) for _, n, k in list(seen)[1:]} == {(48, 96), (48, 48), (48, 160), (80, 48)}


def test_a_rate_is_operations_per_second(monkeypatch):
    """A machine that takes a second for each product."""
    products = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: products.append(x.shape))

    def seconds_of(run, device):
        before = len(products)
        run()
        return float(len(products) - before)

    monkeypatch.setattr(work, "seconds_of", seconds_of)
    cpu = torch.device("cpu")
    assert work._rate_of((10, 20, 30), torch.float32, cpu, 7) == 2 * 10 * 20 * 30
    assert len(products) == 1 + 1 + 7  # warming up, a first look, seven seconds


def test_seconds_of_a_call():
    assert 0.05 <= work.seconds_of(lambda: time.sleep(0.05)) < 5
