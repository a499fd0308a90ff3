"""Rotary embedding of the packed projection against eager torch, torch.compile, Liger, flash_attn.

    python -m benchmarks.bench_rope

The limit is traffic: forward reads and writes the queries and keys where they are, backward reads
the gradient of the projection and writes a new one, values included. Rivals get their cosines and
sines already gathered for every token, as Hugging Face does once for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.compare import Case, backward, forward, importable, main, of_backends
from llm2vec_fast.ops.rope import rope_


def _heads(qkv, n, k):
    """Queries, keys and values as Hugging Face has them: (1, heads, T, H) views."""
    heads = qkv.unflatten(1, (n + 2 * k, -1)).transpose(0, 1)[None]
    return heads.split([n, k, k], 1)


def _half_turned(x):
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def eager(qkv, positions, cos, sin, n, k, cos_T, sin_T):
    """As Hugging Face's apply_rotary_pos_emb."""
    q, key, v = _heads(qkv, n, k)
    q = q * cos_T[:, None] + _half_turned(q) * sin_T[:, None]
    return q, key * cos_T[:, None] + _half_turned(key) * sin_T[:, None], v


def _compiled():
    torch._dynamo.reset()  # after 8 shapes of one function it would quietly stay eager
    return torch.compile(eager, dynamic=False)


def _liger():
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(qkv, positions, cos, sin, n, k, cos_T, sin_T):
        q, key, v = _heads(qkv, n, k)
        return *LigerRopeFunction.apply(q, key, cos_T, sin_T), v

    return run


def _flash_attn():
    from flash_attn.layers.rotary import apply_rotary_emb

    def run(qkv, positions, cos, sin, n, k, cos_T, sin_T):
        qkv = qkv.clone() if qkv.requires_grad else qkv
        qk = qkv.unflatten(1, (n + 2 * k, -1))[None, :, : n + k]
        half = cos.shape[1]
        apply_rotary_emb(qk, cos_T[0, :, :half], sin_T[0, :, :half], inplace=True)
        return qkv

    return run


def ours(qkv, positions, cos, sin, n, k, cos_T, sin_T):
    # Only a leaf of a benchmark needs the copy; its backward passes the gradient on for nothing.
    return rope_(qkv.clone() if qkv.requires_grad else qkv, positions, cos, sin, n, k)


def cases(device: str) -> Iterator[Case]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    # (tokens, N, K, H): Mistral-7B and Llama-3 8B, Llama-2-7B, Sheared-LLaMA-1.3B, SmolLM2-135M
    sizes = [(16_384, 32, 8, 128), (16_384, 32, 32, 128), (32_768, 16, 16, 128), (65_536, 9, 3, 64)]
    for size in [(256, 9, 3, 64)] if device == "cpu" else sizes:
        yield _case("forward", *size, dtype, device)
        yield _case("backward", *size, dtype, device)


def variants() -> Iterator[Case]:
    """Compiled only: other head dimensions and dtypes."""
    bf16 = torch.bfloat16
    for head_dim, dtype in [(80, bf16), (96, bf16), (256, bf16), (128, torch.float16),
                            (128, torch.float32), (6, bf16)]:  # fmt: skip
        yield _case("forward", 512, 32, 8, head_dim, dtype, "meta")
        yield _case("backward", 512, 14, 2, head_dim, dtype, "meta")


def _case(what, tokens, n, k, head_dim, dtype, device) -> Case:
    def make():
        qkv = torch.randn(tokens, (n + 2 * k) * head_dim, device=device, dtype=dtype)
        texts = max(1, tokens // 512)
        positions = torch.arange(tokens // texts, device=device, dtype=torch.int32).repeat(texts)
        angle = torch.arange(512.0, device=device)[:, None] * 10_000 ** (
            -torch.arange(head_dim // 2, device=device) / (head_dim // 2)
        )
        both = torch.cat([angle, angle], 1).repeat(texts, 1)[None, :tokens]
        tables = [f(angle) for f in (torch.cos, torch.sin)]
        gathered = [f(both).to(dtype) for f in (torch.cos, torch.sin)]
        return (qkv.requires_grad_(), positions, *tables, n, k, *gathered)

    rivals = of_backends("rope_", ours, device, dtype) | {"eager": eager}
    if device == "cuda":
        rivals |= importable(
            compile=_compiled,
            liger=_liger,
            flash_attn=_flash_attn,
        )
    timed = forward if what == "forward" else backward
    heads = n + k if what == "forward" else n + 2 * k
    return Case(
        "rope_", what, f"T={tokens} N={n} K={k} H={head_dim}", dtype, make,
        {name: timed(run) for name, run in rivals.items()},
        bytes=2 * tokens * heads * head_dim * dtype.itemsize,
    )  # fmt: skip


if __name__ == "__main__":
    main("bench_rope", cases)
