"""What every measurement needs: ceilings of the same run, floating-point work, and result rows."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llm2vec_fast.doctor import machine
from llm2vec_fast.model.config import ModelConfig

RESULTS = Path(__file__).parent / "results"


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of one call, with the device's work done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matmul_rate(config: ModelConfig, dtype: torch.dtype, device: str, seconds: float = 3) -> float:
    """Sustained matrix products on random data, FLOP/s: the best of a large square and the model's
    own four shapes, each run for `seconds`.
    """
    D, width, H = config.hidden_size, config.intermediate_size, config.head_dim
    side, rows = (8192, 16_384) if device.startswith("cuda") else (2048, 2048)
    heads = config.n_heads + 2 * config.n_kv_heads
    shapes = [(side, side, side), (rows, heads * H, D), (rows, D, config.n_heads * H)]
    shapes += [(rows, 2 * width, D), (rows, D, width)]
    return max(_rate_of(shape, dtype, device, seconds) for shape in shapes)


def _rate_of(shape: tuple[int, int, int], dtype, device: str, seconds: float) -> float:
    m, n, k = shape
    x = torch.randn(m, k, device=device).to(dtype)
    weight = torch.randn(n, k, device=device).to(dtype)

    def run(times: int) -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        run(2)
        once = seconds_of(lambda: run(3), device) / 3
        times = max(1, round(seconds / once))
        return 2 * m * n * k * times / seconds_of(lambda: run(times), device)


def forward_flop(config: ModelConfig, lengths: list[int]) -> float:
    """Floating-point operations of the forward pass of real tokens: body and attention."""
    body = config.n_parameters - config.vocab_size * config.hidden_size
    attention = 4 * config.n_heads * config.head_dim * config.n_layers
    return float(sum(2 * body * n + attention * n * n for n in lengths))


def median(values: list[float]) -> float:
    return statistics.median(values)


def write_rows(name: str, rows: list[dict], directory: Path = RESULTS) -> Path:
    """Writes rows as JSON with the machine, the versions and the time beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "utc": now, "rows": rows}, indent=1) + "\n")
    return path
