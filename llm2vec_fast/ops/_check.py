"""Every operation and backend of a device against the fp64 reference: `llm2vec-fast doctor --gpu`.

T tokens, B texts, D model, N query heads, K kv heads, H head dim, F feed-forward, V vocab, R rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llm2vec_fast import ops
from llm2vec_fast.ops.backend import PREFERENCE

# Largest ‖out - truth‖ / ‖truth‖ that rounding explains; a wrong kernel is off by 0.1 or more.
BOUNDS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
FP8_BOUND = 5e-2


class Check(NamedTuple):
    op: str
    run: Callable  # of the inputs: a tensor or a tuple of tensors
    truth: Callable  # the same from fp64 inputs
    inputs: tuple  # floating tensors are differentiated
    gradients: bool = True
    bound: float | None = None  # by default that of the dtype


class Finding(NamedTuple):
    """One backend of one operation in one dtype."""

    op: str
    backend: str
    dtype: str
    error: float | None  # the largest relative error of values and gradients
    bound: float
    reason: str | None  # why it did not run

    @property
    def ok(self) -> bool:
        """False only if it ran and was wrong; NaN is wrong."""
        return self.error is None or self.error <= self.bound


def findings(
    device: torch.device, dtypes: list[torch.dtype], small=False, only: str | None = None
) -> Iterator[Finding]:
    """Runs every backend of every operation (or of one); `small` for an interpreter on the CPU."""
    for dtype in dtypes:
        for check in _checks(device, dtype, small):
            for backend in PREFERENCE[check.op]:
                if backend != "reference" and only in (None, check.op):
                    yield _try(check, backend, dtype)


def _try(check: Check, backend: str, dtype: torch.dtype) -> Finding:
    bound = check.bound or BOUNDS[dtype]
    gradients = check.gradients and backend != "cuda"  # csrc is for inference
    name = str(dtype).removeprefix("torch.")
    try:
        with ops.use(backend, check.op):
            got = _values(check.run, check.inputs, dtype, gradients)
    except RuntimeError as error:
        if "no backend can run" not in str(error):
            return Finding(check.op, backend, name, float("nan"), bound, f"failed: {error}")
        reason = str(error).partition("): ")[2].removeprefix(f"{backend}: ")
        return Finding(check.op, backend, name, None, bound, reason)
    true = _values(check.truth, check.inputs, torch.float64, gradients)
    worst = 0.0
    for ours, theirs in zip(got, true, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-300)
        worst = max(worst, float(error)) if error == error else float("nan")
    return Finding(check.op, backend, name, worst, bound, None)


def _values(function: Callable, inputs: tuple, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """Outputs, and the gradients of a fixed weighting of them by every floating input."""

    def own(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype).clone().requires_grad_(gradients)

    owned = [own(x) for x in inputs]
    outputs = function(*owned)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not gradients:
        return outputs
    weights = [torch.linspace(-1, 1, max(y.numel(), 1), device=y.device) for y in outputs]
    weights = [
        (w[: y.numel()].view(y.shape) + 0.5).to(y.dtype)
        for w, y in zip(weights, outputs, strict=True)
    ]
    leaves = [x for x in owned if isinstance(x, Tensor) and x.requires_grad]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, weights))


def _checks(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Check]:
    """Inputs in bf16-exact values, so that every dtype starts from the same numbers."""
    noise = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        value = (scale * torch.randn(shape, generator=noise)).bfloat16()
        return value.to(dtype).to(device)

    lengths = [1, 7, 3] if small else [1, 700, 37, 252, 2056, 507]
    T, B = sum(lengths), len(lengths)
    D, N, K, H, V = (64, 4, 2, 16, 96) if small else (2048, 16, 4, 128, 32_000)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    spans = torch.stack([bounds[:-1], bounds[1:]], 1).to(device)
    positions = torch.cat([torch.arange(n) for n in lengths]).int().to(device)
    cu_seqlens, longest = bounds.to(device), max(lengths)
    yield from _elementwise(draw, positions, spans, T, D, N, K, H)

    def attend(**options):
        return lambda q, k, v: ops.attention(q, k, v, cu_seqlens, longest, **options)

    def attend_ref(**options):
        return lambda q, k, v: ops.attention_ref(q, k, v, cu_seqlens, longest, **options)

    def dropped(q, k, v):
        """Values of one: outputs are one on average, and the same again with the same seed."""
        one, two = (attend(dropout_p=0.25, seed=3)(q, k, torch.ones_like(v)) for _ in range(2))
        return torch.stack([one.double().mean(), 1 + (one - two).abs().max().double()])

    qkv = (draw(T, N, H), draw(T, K, H), draw(T, K, H))
    for options in ({}, {"causal": True}, {"window": 5}, {"causal": True, "window": 100}):
        yield Check("attention", attend(**options), attend_ref(**options), qkv)
    ones = torch.ones(2, dtype=torch.float64, device=device)
    yield Check("attention", dropped, lambda *_: ones, qkv, False, bound=0.05)
    yield from _losses(draw, device, T, B, D, V, small)


def _elementwise(draw, positions, spans, T, D, N, K, H) -> Iterator[Check]:
    yield Check(
        "add_rms_norm",
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: ops.add_rms_norm_ref(x, r, w, 1e-5),
        (draw(T, D), draw(T, D), draw(D)),
    )
    angle = torch.outer(torch.arange(4096.0), 10_000.0 ** (-torch.arange(0, H, 2) / H))
    cos, sin = angle.cos().to(positions.device), angle.sin().to(positions.device)
    yield Check(
        "rope_",
        lambda x: ops.rope_(x.clone(), positions, cos, sin, N, K),
        lambda x: ops.rope_ref_(x.clone(), positions, cos.double(), sin.double(), N, K),
        (draw(T, (N + 2 * K) * H),),
    )
    yield Check("swiglu", ops.swiglu, ops.swiglu_ref, (draw(T, 2 * D),))
    for mode in ("mean", "weighted_mean", "last", "first"):
        yield Check(
            "pool",
            lambda x, mode=mode: ops.pool(x, spans, mode, True),
            lambda x, mode=mode: ops.pool_ref(x, spans, mode, True),
            (draw(T, D),),
        )
    half = D // 2
    segments = ((0, half, 0, 8, 2.0), (half, D, 8, 16, 0.5))
    weight = draw(D, D, scale=D**-0.5)
    yield Check(
        "lora_linear",
        lambda x, a, b: ops.lora_linear(x, weight, None, a, b, segments),
        lambda x, a, b: ops.lora_linear_ref(x, weight.double(), None, a, b, segments),
        (draw(T, D), draw(16, D, scale=D**-0.5), draw(D, 16)),
    )


def _losses(draw, device, T, B, D, V, small) -> Iterator[Check]:
    rows = torch.arange(0, T, 5, device=device)
    targets = (rows * 7919 + 13) % V
    yield Check(
        "masked_token_loss",
        lambda h, w: ops.masked_token_loss(h, w, rows, targets),
        lambda h, w: ops.masked_token_loss_ref(h, w, rows, targets),
        (draw(T, D), draw(V, D, scale=D**-0.5)),
    )
    count = 6 if small else 500
    yield Check(
        "info_nce", ops.info_nce, ops.info_nce_ref, (draw(count, D), draw(count + count // 2, D))
    )
    x, gate_up, weight = draw(T, D), draw(T, 2 * D), draw(D)

    def normed(function):
        def run(x, weight):
            quantised, residual = function(x, None, weight, 1e-5)
            return quantised.dequantize(torch.float32), residual

        return run

    yield Check(
        "quantize_rows", lambda x: ops.quantize_rows(x).dequantize(torch.float32),
        lambda x: x, (x,), gradients=False, bound=FP8_BOUND,
    )  # fmt: skip
    yield Check(
        "add_rms_norm_fp8", normed(ops.add_rms_norm_fp8),
        lambda x, w: ops.add_rms_norm_ref(x, None, w, 1e-5), (x, weight),
        gradients=False, bound=FP8_BOUND,
    )  # fmt: skip
    yield Check(
        "swiglu_fp8", lambda x: ops.swiglu_fp8(x).dequantize(torch.float32), ops.swiglu_ref,
        (gate_up,), gradients=False, bound=FP8_BOUND,
    )  # fmt: skip
    yield Check(
        "fp8_linear",
        lambda x, w: ops.fp8_linear(ops.quantize_rows(x), ops.quantize_rows(w)),
        torch.nn.functional.linear, (x, draw(D, D, scale=D**-0.5)),
        gradients=False, bound=FP8_BOUND,
    )  # fmt: skip
