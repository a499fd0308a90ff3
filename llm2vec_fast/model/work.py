"""How much arithmetic and memory a pass is, and how fast this machine multiplies: what speed is a
share of.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llm2vec_fast.model.config import ModelConfig

# Tokens in a forward pass where nobody names another number. On a GPU more makes it no faster, but
# less memory may allow for less. The share is unmeasured: what is free is also for vectors, CUDA
# graphs, cuBLAS, and for what an allocator loses to fragments.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16_384}
LEAST_TOKENS, SHARE_OF_FREE = 256, 0.5


def forward_flop(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations of the forward pass of real tokens: body and attention."""
    body = config.n_parameters - config.vocab_size * config.hidden_size
    attention = 4 * config.n_heads * config.head_dim * config.n_layers
    return float(sum(2 * body * n + attention * n * n for n in lengths))


def forward_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Most bytes of activations that live at once in a forward pass, for each token: two inputs of
    a layer, their sum and its norm, what an MLP or attention makes of it, and its output.
    """
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = (queries + 2 * keys) + queries
    if config.qk_norm:  # queries and keys once more, and all three packed again
        attention += (queries + keys) + (queries + 2 * keys)
    made = max(3 * config.intermediate_size, attention)  # gate, up and their product
    return (5 * config.hidden_size + made) * dtype.itemsize


def default_budget(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens in a forward pass: on CUDA a power of two that fits the memory that is free now."""
    most = TOKENS_PER_BATCH.get(device.type, 2048)
    if device.type != "cuda":
        return most
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fitting = max(1, int(SHARE_OF_FREE * free / forward_bytes(config, dtype)))
    return min(most, max(LEAST_TOKENS, 1 << (fitting.bit_length() - 1)))


def matmul_rate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seconds: float = 3
) -> float:
    """Sustained matrix products on random data, FLOP/s: the best of a large square and the model's
    own four shapes, each run for `seconds`.
    """
    device = torch.device(device)
    D, width, H = config.hidden_size, config.intermediate_size, config.head_dim
    side, rows = (8192, 16_384) if device.type == "cuda" else (2048, TOKENS_PER_BATCH["cpu"])
    heads = config.n_heads + 2 * config.n_kv_heads
    shapes = [(side, side, side), (rows, heads * H, D), (rows, D, config.n_heads * H)]
    shapes += [(rows, 2 * width, D), (rows, D, width)]
    return max(_rate_of(shape, dtype, device, seconds) for shape in shapes)


def seconds_of(run, device: torch.device | str = "cpu") -> float:
    """Seconds of one call, with the device's work done."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _rate_of(shape: tuple[int, int, int], dtype, device: torch.device, seconds: float) -> float:
    m, n, k = shape
    x = torch.randn(m, k, device=device).to(dtype)
    weight = torch.randn(n, k, device=device).to(dtype)

    def run(times: int) -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        run(1)
        once = seconds_of(lambda: run(1), device)
        times = max(1, round(seconds / once))
        return 2 * m * n * k * times / seconds_of(lambda: run(times), device)
