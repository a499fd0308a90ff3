"""Rotation and attention as one autograd node, against the two apart: forward and backward.

    python -m benchmarks.bench_rope_attention

Work is attention's, 4 L^2 H FLOP a head and text forward, 2.5 times that backward. `apart` is
`rope_` and `attention`, each its own node, so that three gradients are packed into one by autograd;
`eager` is Hugging Face's rotate_half and torch's dense attention, on texts of equal length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.bench_attention import HEADS
from benchmarks.compare import Case, both, forward, main, of_backends
from llm2vec_fast import ops


def cases(device: str) -> Iterator[Case]:
    if device == "cpu":
        yield _case(device, "forward", forward, 4, 64, HEADS[-1])
        return
    for heads in HEADS[:2]:
        yield _case(device, "forward", forward, 32, 512, heads)
        yield _case(device, "forward+backward", both, 32, 512, heads)


def _case(device, what, timed, texts, length, heads) -> Case:
    (N, K, H), T = heads, texts * length
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    positions = torch.arange(length, dtype=torch.int32).repeat(texts).to(device)
    bounds = itertools.accumulate([length] * texts)
    cu_seqlens = torch.tensor([0, *bounds], dtype=torch.int32).to(device)
    angle = torch.outer(torch.arange(float(length)), 10_000.0 ** (-torch.arange(0, H, 2) / H))
    cos, sin = angle.cos().to(device), angle.sin().to(device)

    def make():
        shape = (T, (N + 2 * K) * H)
        return (torch.randn(shape, device=device, dtype=dtype, requires_grad=True),)

    def node(qkv):  # times one: what is used up must not be the leaf; all rivals do the same
        return ops.rope_attention(qkv * 1, positions, cos, sin, cu_seqlens, length, N, K)

    def apart(qkv):
        qkv = ops.rope_(qkv * 1, positions, cos, sin, N, K)
        return ops.attention(*ops.split_heads(qkv, N, K), cu_seqlens, length)

    def eager(qkv):
        q, k, v = ops.split_heads(qkv * 1, N, K)
        c, s = (torch.cat([t, t], -1)[positions.long()][:, None].to(dtype) for t in (cos, sin))
        q, k = (x * c + torch.cat([-x[..., H // 2 :], x[..., : H // 2]], -1) * s for x in (q, k))
        q, k, v = (x.unflatten(0, (texts, length)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    rivals = of_backends("attention", node, device, dtype)
    if device != "meta":
        if device == "cuda":
            rivals.pop("ours reference", None)
        rivals |= {"apart": apart, "eager": eager}
    else:  # both of its kernels
        rivals = {name: _all_triton(node) for name in rivals}
    factor = 3.5 if what == "forward+backward" else 1
    return Case(
        "rope_attention", what, f"{texts}x{length} {N}/{K}x{H}", dtype, make,
        {name: timed(run) for name, run in rivals.items()},
        flop=4 * length**2 * H * N * texts * factor,
    )  # fmt: skip


def _all_triton(function):
    def run(*inputs):
        with ops.use("triton"):
            return function(*inputs)

    return run


if __name__ == "__main__":
    main("bench_rope_attention", cases)
