"""What a GPU would be asked to do, counted on meta tensors: the launches of a layer, forward and
backward, at the shape of Mistral-7B, and that nothing in between waits for the device.

A value asked of a meta tensor (.item(), .tolist(), .cpu(), nonzero) raises: passing is the proof.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.transformer import Transformer

pytest.importorskip("triton")
from llm2vec_fast.ops.kernels.launch import recorded

LAYERS = 3
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}
# Operators of torch that launch nothing: they make tensors or views.
FREE = {
    "new_empty", "empty_like", "detach", "t", "view", "split_with_sizes", "slice", "unflatten",
    "flatten", "_unsafe_view",
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts the operators of torch that reach the device."""

    def __init__(self):
        super().__init__()
        self.work = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.work[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_dict(MISTRAL), causal=False).bfloat16()
    model.rope_tables(512, torch.device("meta"))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def batch():
    built = PackedBatch.build([range(512)] * 31 + [range(3), range(400)])
    parts = (built.ids, built.positions, built.cu_seqlens, built.spans)
    return PackedBatch(*(x.to("meta") for x in parts), built.max_seqlen, built.lengths)


def names(launches) -> Counter:
    """(module, kernel) of every launch; attention_backward counts as attention."""
    return Counter(x.kernel.fn.__module__.rpartition(".")[2].partition("_backward")[0]
                   for x in launches)  # fmt: skip


def test_a_layer_of_the_forward_is_five_kernels_and_four_matrix_products(model, batch):
    with ops.use("triton"), recorded() as launches, Counting() as counting, torch.no_grad():
        hidden_TD = model(batch)
        pooled_BD = ops.pool(hidden_TD, batch.spans)
    assert hidden_TD.shape == (batch.n_tokens, 4096) and hidden_TD.dtype == torch.bfloat16
    assert pooled_BD.shape == (33, 4096) and pooled_BD.dtype == torch.float32
    assert names(launches) == {
        "add_rms_norm": 2 * LAYERS + 1,
        "rope": LAYERS,
        "attention": LAYERS,
        "swiglu": LAYERS,
        "pool": 1,
    }
    matmuls = counting.work.pop("mm", 0) + counting.work.pop("linear", 0)
    assert matmuls == 4 * LAYERS
    assert counting.work == {"embedding": 1}


def test_a_layer_of_the_backward_is_seven_kernels_and_four_matrix_products(model, batch):
    """Frozen weights: no weight gradient, so as many matrix products as the forward."""
    model.embed.requires_grad_(True)
    try:
        with ops.use("triton"):
            pooled_BD = ops.pool(model(batch), batch.spans)
            with recorded() as launches, Counting() as counting:
                pooled_BD.backward(torch.empty_like(pooled_BD))
    finally:
        model.embed.requires_grad_(False)
    assert model.embed.weight.grad.shape == (32_000, 4096)
    found = names(launches)
    assert found.pop("attention") <= 3 * LAYERS
    assert found == {
        "add_rms_norm": 2 * LAYERS + 1,
        "rope": LAYERS,
        "swiglu": LAYERS,
        "pool": 1,
    }
    assert counting.work.pop("mm") == 4 * LAYERS
    # The gradient of the first layer's residual and of its norm meet at the embedding.
    assert counting.work == {"embedding_dense_backward": 1, "add": 1}
