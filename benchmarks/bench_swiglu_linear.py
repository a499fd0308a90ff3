"""SwiGLU and down projection in one autograd node, against the two apart.

    python -m benchmarks.bench_swiglu_linear

The limit is work: 2 T D F for each of forward, the gradient of the product and, if it is trained,
the weight's. Time should equal the rivals' at best; the gain is the memory between forward and
backward, in which the product (T, F) is missing (peak_mb).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, both, forward, importable, main, of_backends
from llm2vec_fast.ops.swiglu_linear import swiglu_linear

RANK, SCALE = 16, 2.0


def composed(activation, p):
    def run(gate_up, weight, a, b):
        y = activation(*gate_up.chunk(2, -1))
        out = F.linear(y, weight)
        if a is None:
            return out
        u = F.linear(F.dropout(y, p, training=p > 0), a)
        return out + F.linear(u, b) * SCALE

    return run


def eager(p):
    return composed(lambda gate, up: F.silu(gate) * up, p)


def _liger(p):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return composed(LigerSiLUMulFunction.apply, p)


def ours(p):
    def run(gate_up, weight, a, b):
        segments = () if a is None else ((0, weight.shape[0], 0, RANK, SCALE),)
        return swiglu_linear(gate_up, weight, None, a, b, segments, dropout_p=p, seed=1)

    return run


def cases(device: str) -> Iterator[Case]:
    # (tokens, F, D): Mistral-7B, SmolLM2-135M
    sizes = [(16_384, 14_336, 4096), (65_536, 1536, 576)]
    for size in [(128, 1536, 576)] if device == "cpu" else sizes:
        yield _case(device, "forward", *size, "plain")
        yield _case(device, "forward+backward", *size, "full")
        yield _case(device, "forward+backward", *size, "lora")
        yield _case(device, "forward+backward", *size, "lora", 0.05)


def variants() -> Iterator[Case]:
    yield _case("meta", "forward+backward", 2056, 507, 252, "lora", 0.3, torch.float16)
    yield _case("meta", "forward+backward", 2048, 2048, 512, "full", 0.0, torch.float32)


def _case(device, what, tokens, width, D, kind, p=0.0, dtype=None) -> Case:
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    train = what != "forward"

    def draw(*shape, grad=False):
        values = torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5
        return values.requires_grad_(grad)

    def make():
        gate_up = torch.randn(tokens, 2 * width, device=device, dtype=dtype, requires_grad=train)
        weight = draw(D, width, grad=kind == "full")
        if kind != "lora":
            return gate_up, weight, None, None
        return gate_up, weight, draw(RANK, width, grad=True), draw(D, RANK, grad=True)

    rivals = of_backends("swiglu", ours(p), device, dtype) | {"eager": eager(p)}
    if train:
        rivals.pop("ours cuda", None)  # inference only
    if device == "cuda":
        rivals.pop("ours reference", None)  # what "eager" is, with a pass more
        rivals |= importable(
            compile=lambda: torch.compile(eager(p), dynamic=False), liger=lambda: _liger(p)
        )
    rank = RANK if kind == "lora" else 0
    flop = 2 * tokens * D * width * (1 + train + (kind == "full"))
    flop += 2 * tokens * rank * (D + width) * (1 + 2 * train)
    timed = both if train else forward
    return Case(
        "swiglu_linear", what, f"T={tokens} F={width} D={D} {kind} p={p}", dtype, make,
        {name: timed(run) for name, run in rivals.items()}, flop=flop,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_swiglu_linear", cases)
