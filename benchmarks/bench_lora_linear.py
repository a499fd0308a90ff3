"""A frozen linear layer with LoRA: fused q, k, v and gate, up, against PEFT's formula.

    python -m benchmarks.bench_lora_linear

The limit is work: 2 T D O forward, the same again for the gradient of the input (the frozen weight
needs none), and the low-rank products, forward 2 T R (D + O), backward twice that. PEFT runs each
projection by itself: its GEMM, its dropout, two small GEMMs, and a pass that adds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, both, forward, importable, main, of_backends
from llm2vec_fast.ops.lora_linear import lora_linear

RANK, SCALE = 16, 2.0


def segments_of(widths: tuple[int, ...], rank: int) -> tuple:
    """A segment for each projection of a fused matrix: outputs and ranks one after the other."""
    ends = torch.tensor(widths).cumsum(0).tolist()
    return tuple(
        (end - width, end, rank * n, rank * (n + 1), SCALE)
        for n, (end, width) in enumerate(zip(ends, widths, strict=True))
    )


def peft(segments, p):
    def run(x, weight, a, b):
        parts = []
        for out0, out1, r0, r1, scale in segments:
            y = F.linear(x, weight[out0:out1])
            u = F.linear(F.dropout(x, p, training=p > 0), a[r0:r1])
            parts.append(y + F.linear(u, b[out0:out1, r0:r1]) * scale)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    return run


def ours(segments, p):
    def run(x, weight, a, b):
        return lora_linear(x, weight, None, a, b, segments, dropout_p=p, seed=1)

    return run


def cases(device: str) -> Iterator[Case]:
    sizes = [  # tokens, D, widths: q k v and gate up of Mistral-7B, q k v of SmolLM2-135M
        (16_384, 4096, (4096, 1024, 1024)),
        (16_384, 4096, (14_336, 14_336)),
        (65_536, 576, (576, 192, 192)),
    ]
    for tokens, D, widths in [(128, 576, (576, 192, 192))] if device == "cpu" else sizes:
        for p in (0.0, 0.05):
            yield _case(device, "forward", tokens, D, widths, p)
            yield _case(device, "forward+backward", tokens, D, widths, p)


def variants() -> Iterator[Case]:
    yield _case("meta", "forward+backward", 2056, 507, (252, 37), 0.3, 8, torch.float16)
    yield _case("meta", "forward+backward", 2048, 2048, (2048,), 0.3, 16, torch.float32)
    yield _case("meta", "forward+backward", 16_384, 4096, (4096,), 0.3, 64)
    yield _case("meta", "forward+backward", 16_384, 4096, (4096, 1024, 1024), 0.3, 128)
    yield _case("meta", "forward+backward", 16_384, 4096, (4096,), 0.3, 256)


def _case(device, what, tokens, D, widths, p, rank=RANK, dtype=None) -> Case:
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    segments, out = segments_of(widths, rank), sum(widths)
    ranks = rank * len(widths)
    train = what != "forward"

    def draw(*shape, grad=False):
        values = torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5
        return values.requires_grad_(grad)

    def make():
        x = torch.randn(tokens, D, device=device, dtype=dtype, requires_grad=train)
        return x, draw(out, D), draw(ranks, D, grad=train), draw(out, ranks, grad=train)

    rivals = of_backends("lora_linear", ours(segments, p), device, dtype)
    rivals |= {"peft": peft(segments, p)}
    if device == "cuda":
        rivals.pop("ours reference", None)  # fp32 on no tensor core: seconds a call, and no rival
        rivals |= importable(compile=lambda: torch.compile(peft(segments, p), dynamic=False))
    low_rank = 2 * tokens * rank * (len(widths) * D + out)
    flop = 2 * tokens * D * out * (1 + train) + low_rank * (1 + 2 * train)
    timed = both if train else forward
    return Case(
        "lora_linear", what, f"T={tokens} D={D} O={out} R={ranks} p={p}", dtype, make,
        {name: timed(run) for name, run in rivals.items()}, flop=flop,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_lora_linear", cases)
