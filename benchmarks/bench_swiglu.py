"""silu(gate) * up: forward and backward against eager torch, torch.compile and Liger.

    python -m benchmarks.bench_swiglu

The limit is traffic: forward reads 2F and writes F elements a token, backward reads 3F, writes 2F.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, backward, forward, importable, main, of_backends
from llm2vec_fast import ops


def eager(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _liger():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, dim=-1))


def cases(device: str) -> Iterator[Case]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rivals = of_backends("swiglu", ops.swiglu, device, dtype) | {"eager": eager}
    if device == "cuda":
        rivals |= importable(compile=lambda: torch.compile(eager, dynamic=False), liger=_liger)
    # (tokens, F): Mistral-7B and Llama-3 8B, Llama-2-7B, Sheared-LLaMA-1.3B, SmolLM2-135M
    sizes = [(16_384, 14_336), (16_384, 11_008), (32_768, 5_504), (65_536, 1_536)]
    for tokens, width in [(256, 1_536)] if device == "cpu" else sizes:
        yield _case(rivals, "forward", forward, 3, tokens, width, dtype, device)
        yield _case(rivals, "backward", backward, 5, tokens, width, dtype, device)


def _case(rivals, what, timed, passes, tokens, width, dtype, device) -> Case:
    def make():
        return (torch.randn(tokens, 2 * width, device=device, dtype=dtype, requires_grad=True),)

    return Case(
        "swiglu", what, f"T={tokens} F={width}", dtype, make,
        {name: timed(run) for name, run in rivals.items()},
        bytes=passes * tokens * width * dtype.itemsize,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_swiglu", cases)
