"""Counted arithmetic against torch's own counter; the measured rate of matrix products."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import ModelConfig, work
from llm2vec_fast.model.transformer import Transformer


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


SHAPES = {
    "mistral 7B": (4096, 14_336, 32, 8, {}),
    "smollm2 135M": (576, 1536, 9, 3, {}),
    "more heads than MLP": (2048, 2048, 32, 32, {}),
    "qwen3 0.6B": (1024, 3072, 16, 8, {"model_type": "qwen3", "head_dim": 128}),
}


def config_of(shape: str) -> ModelConfig:
    hidden, feed, heads, kv_heads, rest = SHAPES[shape]
    raw = {
        "model_type": "llama", "vocab_size": 500, "hidden_size": hidden, "intermediate_size": feed,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    }  # fmt: skip
    return ModelConfig.from_dict(raw | rest)


class Peak(TorchDispatchMode):
    """Most bytes of results of operators that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_bytes_are_what_a_gpu_would_allocate(shape, dtype):
    """Counted on meta tensors, where the Triton path allocates as on a GPU."""
    pytest.importorskip("triton")
    config, meta = config_of(shape), torch.device("meta")
    with meta:
        model = Transformer(config).to(dtype).requires_grad_(False)
    model.rope_tables(512, meta)
    batch = PackedBatch.build([range(500)] * 4, device=meta)
    with ops.use("triton"), torch.inference_mode(), Peak() as counted:
        model(batch)
    assert counted.peak == 2000 * work.forward_bytes(config, dtype)


def test_the_default_budget_goes_by_the_free_memory_of_a_gpu(monkeypatch):
    config, free = config_of("mistral 7B"), [0, 0, 0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free[1])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: free[2])

    def budget(gigabytes, reserved=0.0, allocated=0.0):
        free[:] = (int(x * (1 << 30)) for x in (gigabytes, reserved, allocated))
        return work.default_budget(config, torch.bfloat16, torch.device("cuda", 0))

    assert budget(60) == budget(5) == 16_384  # more makes a GPU no faster
    assert budget(2) == budget(2.1) == budget(1, 15, 14) == 8192  # what torch keeps is free too
    assert budget(0) == budget(0.01) == 256
    assert work.default_budget(config, torch.float32, torch.device("cpu")) == 4096
