"""Rotary position embedding on the packed projection, in place or into a new tensor.

T tokens, N query heads, K kv heads, H head dim, E = H/2, P positions, S = (N + 2K) H

A program turns a few rows of E pairs; a row is one (token, head), whatever the number of heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import launch, power_of_2


# What changes from batch to batch must not compile it anew: how many rows, where positions lie.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["positions"])
def _rotate(
    out, qkv, positions, cos, sin, rows, out_t, qkv_t,
    HEADS: tl.constexpr, TURNED: tl.constexpr, E: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The first TURNED of a token's first HEADS heads turn, the others are copied; the rest of the
    # token is not touched. out may be qkv.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    head = row % HEADS
    pair = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (pair < E)
    at = (head * (2 * E))[:, None] + pair
    # In int64: a token's offset passes 2^31 at 349,526 tokens of a 7B.
    at_in = qkv + token.to(tl.int64)[:, None] * qkv_t + at
    left = tl.load(at_in, mask=inside, other=0.0)
    right = tl.load(at_in + E, mask=inside, other=0.0)
    turned = inside & (head < TURNED)[:, None]
    position = tl.load(positions + token, mask=row < rows, other=0).to(tl.int64)[:, None]
    c = tl.load(cos + position * E + pair, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + position * E + pair, mask=turned, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    wide_left, wide_right = left.to(tl.float32), right.to(tl.float32)
    # Spelled out: left to itself the compiler fuses either product, and variants would differ.
    new_left = tl.fma(wide_left, c, -(wide_right * s)).to(left.dtype)
    new_right = tl.fma(wide_right, c, wide_left * s).to(right.dtype)
    if TURNED < HEADS:  # chosen, not computed: infinity * 0 is not a copy
        new_left = tl.where(turned, new_left, left)
        new_right = tl.where(turned, new_right, right)
    at_out = out + token.to(tl.int64)[:, None] * out_t + at
    tl.store(at_out, new_left, mask=inside)
    tl.store(at_out + E, new_right, mask=inside)


def _turn(out_TS, qkv_TS, positions_T, cos_PE, sin_PE, heads, turned, inverse) -> None:
    T, E = qkv_TS.shape[0], cos_PE.shape[1]
    block = power_of_2(E)
    rows = max(1, 1024 // block)  # 8 pairs a thread: one 16-byte load of bf16 on either side
    launch(
        _rotate, (-(-T * heads // rows),), out_TS, qkv_TS, positions_T.contiguous(),
        cos_PE.contiguous(), sin_PE.contiguous(), T * heads, out_TS.stride(0), qkv_TS.stride(0),
        HEADS=heads, TURNED=turned, E=E, INVERSE=inverse, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip


def rotate_(
    qkv_TS: Tensor,
    positions_T: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    n_heads: int,
    n_kv_heads: int,
    inverse: bool = False,
) -> Tensor:
    """Turns queries and keys in place, by the negative angle if `inverse`; gives qkv_TS itself.

    qkv_TS may be a projection or the gradient of one, and must be the caller's to write: nothing
    here tells autograd. Values are not touched, so their columns may be uninitialised.
    """
    turned = n_heads + n_kv_heads
    whole_TS = qkv_TS if qkv_TS.stride(1) == 1 else qkv_TS.contiguous()
    _turn(whole_TS, whole_TS, positions_T, cos_PE, sin_PE, turned, turned, inverse)
    return qkv_TS if whole_TS is qkv_TS else qkv_TS.copy_(whole_TS)


def rotated(
    qkv_TS: Tensor,
    positions_T: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    n_heads: int,
    n_kv_heads: int,
    inverse: bool = False,
) -> Tensor:
    """The same as a new tensor, values copied: one pass where a copy and `rotate_` are two."""
    turned = n_heads + n_kv_heads
    out_TS = qkv_TS.new_empty(qkv_TS.shape)
    whole_TS = qkv_TS if qkv_TS.stride(1) == 1 else qkv_TS.contiguous()
    heads = turned + n_kv_heads
    _turn(out_TS, whole_TS, positions_T, cos_PE, sin_PE, heads, turned, inverse)
    return out_TS
