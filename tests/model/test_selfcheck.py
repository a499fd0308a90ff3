"""The look at load time that attention sees what it was asked to see."""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast import LLM2Vec, ops
from llm2vec_fast.model.selfcheck import check_attention_mode

MODES = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_passes_on_every_family(tiny_model, ours, family, dtype, causal):
    check_attention_mode(ours(tiny_model(None, family), causal, dtype))


@pytest.mark.parametrize("window", [1, 2])
def test_passes_with_a_window_of_a_token_or_two(tiny_model, ours, window):
    directory = tiny_model(None, "mistral", sliding_window=window)
    for causal in (False, True):
        check_attention_mode(ours(directory, causal))


def test_passes_with_the_large_key_biases_of_real_qwen2_models(tiny_model, ours):
    model = ours(tiny_model(None, "qwen2"))
    bias = model.layers[0].attn.qkv.bias
    bias[48:72] = 60 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    check_attention_mode(model)


@MODES
def test_raises_when_attention_silently_does_the_other_thing(tiny_model, ours, monkeypatch, causal):
    model, honest = ours(tiny_model(None, "llama"), causal), ops.rope_attention

    def wrong(*args, causal, **options):
        return honest(*args, causal=not causal, **options)

    monkeypatch.setattr(ops, "rope_attention", wrong)
    asked, got = ("causal", "bidirectional") if causal else ("bidirectional", "causal")
    with pytest.raises(RuntimeError, match=f"asked to be {asked}, .* acts {got}"):
        check_attention_mode(model)


@MODES
def test_loading_runs_the_check(tiny_model, add_tokenizer, tmp_path, monkeypatch, causal):
    directory = add_tokenizer(tiny_model(tmp_path, "llama"))
    honest = ops.rope_attention
    assert LLM2Vec.from_pretrained(directory, enable_bidirectional=not causal, dtype="float32")

    def wrong(*args, causal, **options):
        return honest(*args, causal=not causal, **options)

    monkeypatch.setattr(ops, "rope_attention", wrong)
    with pytest.raises(RuntimeError, match="attention was asked to be"):
        LLM2Vec.from_pretrained(directory, enable_bidirectional=not causal, dtype="float32")


def test_it_leaves_the_model_and_the_random_state_alone(tiny_model, ours):
    model = ours(tiny_model(None, "llama"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    check_attention_mode(model)
    assert torch.equal(state, torch.get_rng_state())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
