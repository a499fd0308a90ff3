"""How much arithmetic a pass is, and how fast this machine multiplies: what speed is a share of."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from llm2vec_fast.model.config import ModelConfig


def forward_flop(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Floating-point operations of the forward pass of real tokens: body and attention."""
    body = config.n_parameters - config.vocab_size * config.hidden_size
    attention = 4 * config.n_heads * config.head_dim * config.n_layers
    return float(sum(2 * body * n + attention * n * n for n in lengths))


def matmul_rate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seconds: float = 3
) -> float:
    """Sustained matrix products on random data, FLOP/s: the best of a large square and the model's
    own four shapes, each run for `seconds`.
    """
    device = torch.device(device)
    D, width, H = config.hidden_size, config.intermediate_size, config.head_dim
    side, rows = (8192, 16_384) if device.type == "cuda" else (2048, 1024)
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
