"""fp8 inference: quantisation by traffic, products by work, beside bf16.

    python -m benchmarks.bench_fp8

Quantisation reads 2 bytes an element and writes 1 (and a scale a row). Products are the four of a
Mistral-7B layer; their bf16 twin takes turns with them, so that fp8 over bf16 is a ratio of one
run. `of_matmul` is the share of the bf16 rate there: fp8 can reach about 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, forward, importable, main, of_backends
from llm2vec_fast.ops import fp8

ARCHS = (90, 100)  # no e4m3 before 8.9
EPS = 1e-5
# q, k, v; attention's output; gate and up; down: (D, O)
PRODUCTS = [(4096, 6144), (4096, 4096), (4096, 28_672), (14_336, 4096)]


def eager_quantize(x):
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / fp8.E4M3_MAX
    return (wide / scale).to(torch.float8_e4m3fn), scale


def eager_norm(x, residual, weight):
    residual = x + residual
    wide = residual.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()
    return eager_quantize(wide), residual


def eager_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return eager_quantize(F.silu(gate.float()) * up.float())


def add_rms_norm_fp8(x, residual, weight):
    return fp8.add_rms_norm_fp8(x, residual, weight, EPS)


def cases(device: str) -> Iterator[Case]:
    tokens = 64 if device == "cpu" else 16_384
    small = device == "cpu"
    for width in [256] if small else [4096, 2048]:
        yield _quantize(tokens, width, device)
        yield _norm(tokens, width, device)
    for width in [256] if small else [14_336, 11_008, 5504]:
        yield _swiglu(tokens, width, device)
    for width, outputs in [(256, 512)] if small else PRODUCTS:
        yield _linear(tokens, width, outputs, device)


def variants() -> Iterator[Case]:
    """Narrow and odd rows, wide weights, no residual, fp32."""
    for width, dtype in [(576, torch.bfloat16), (507, torch.float16), (28_672, torch.bfloat16)]:
        yield _quantize(37, width, "meta", dtype)
        yield _norm(37, width, "meta", dtype)
        yield _swiglu(37, width, "meta", dtype)
    for width in (4096, 14_336):
        yield _quantize(37, width, "meta", torch.float32)
        yield _swiglu(37, width, "meta", torch.float32)

    def first(x, weight):
        return fp8.add_rms_norm_fp8(x, None, weight, EPS)

    def make():
        return _random(37, 4096, "meta", torch.bfloat16), _random(1, 4096, "meta")[0]

    yield _case("add_rms_norm_fp8", "D=4096, no residual", "meta", make, first, None, 1)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _random(rows, width, device, dtype=None):
    return torch.randn(rows, width, device=device).to(dtype or _dtype(device))


def _case(op, shape, device, make, ours, eager, bytes, dtype=None) -> Case:
    dtype = dtype or _dtype(device)
    rivals = of_backends(op, ours, device, dtype)
    if device != "meta":
        rivals |= {"eager": eager}
    if device == "cuda":
        rivals |= importable(compile=lambda: torch.compile(eager, dynamic=False))
    timed = {name: forward(run) for name, run in rivals.items()}
    return Case(op, "forward", shape, dtype, make, timed, bytes=bytes)


def _quantize(tokens, width, device, dtype=None) -> Case:
    size = (dtype or _dtype(device)).itemsize
    return _case(
        "quantize_rows", f"T={tokens} D={width}", device,
        lambda: (_random(tokens, width, device, dtype),), fp8.quantize_rows, eager_quantize,
        tokens * (width * (size + 1) + 4), dtype,
    )  # fmt: skip


def _norm(tokens, width, device, dtype=None) -> Case:
    size = (dtype or _dtype(device)).itemsize

    def make():
        x, residual = (_random(tokens, width, device, dtype) for _ in range(2))
        return x, residual, _random(1, width, device, dtype)[0]

    return _case(
        "add_rms_norm_fp8", f"T={tokens} D={width}", device, make, add_rms_norm_fp8, eager_norm,
        tokens * (width * (3 * size + 1) + 4), dtype,
    )  # fmt: skip


def _swiglu(tokens, width, device, dtype=None) -> Case:
    size = (dtype or _dtype(device)).itemsize
    return _case(
        "swiglu_fp8", f"T={tokens} F={width}", device,
        lambda: (_random(tokens, 2 * width, device, dtype),), fp8.swiglu_fp8, eager_swiglu,
        tokens * (width * (2 * size + 1) + 4), dtype,
    )  # fmt: skip


def _linear(tokens, width, outputs, device) -> Case:
    def make():
        x, weight = (_random(rows, width, device) for rows in (tokens, outputs))
        if device == "meta":
            return x, weight, None, None
        return x, weight, fp8.quantize_rows(x), fp8.quantize_rows(weight)

    def of_quantized(run):
        return lambda x, weight, quantized, quantized_weight: run(quantized, quantized_weight)

    def fast(x, weight):
        return fp8.fp8_linear(x, weight, fast_accum=True)

    rivals = of_backends("fp8_linear", of_quantized(fp8.fp8_linear), device, torch.float8_e4m3fn)
    if device == "cuda":
        rivals.pop("ours reference", None)  # two fp32 copies of everything and no rival
        rivals["ours fast_accum"] = of_quantized(fast)
        rivals["quantize + fp8"] = lambda x, w, _, weight: fp8.fp8_linear(
            fp8.quantize_rows(x), weight
        )
    rivals["unquantised"] = lambda x, weight, *_: F.linear(x, weight)
    if device == "meta":
        rivals = {}  # nothing of ours to compile: the library has the kernel
    return Case(
        "fp8_linear", "forward", f"T={tokens} D={width} O={outputs}", _dtype(device), make,
        {name: forward(run) for name, run in rivals.items()}, flop=2 * tokens * width * outputs,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_fp8", cases)
