"""Rotary position embedding on the CPU, in place or into a new tensor.

T tokens, N query heads, K kv heads, E = H/2, P positions, S = (N + 2K) H
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec_fast.ops.eager import blocks


def rotate_(
    qkv_TS: Tensor,
    positions_T: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    n_heads: int,
    n_kv_heads: int,
    inverse: bool = False,
) -> Tensor:
    """Turns queries and keys in place, by the negative angle if `inverse`; gives qkv_TS itself."""
    _turn(qkv_TS, qkv_TS, positions_T, cos_PE, sin_PE, n_heads + n_kv_heads, inverse)
    return qkv_TS


def rotated(
    qkv_TS: Tensor,
    positions_T: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    n_heads: int,
    n_kv_heads: int,
    inverse: bool = False,
) -> Tensor:
    """The same as a new tensor, values copied."""
    out_TS, turned = qkv_TS.new_empty(qkv_TS.shape), n_heads + n_kv_heads
    width = turned * 2 * cos_PE.shape[1]
    out_TS[:, width:] = qkv_TS[:, width:]
    _turn(out_TS, qkv_TS, positions_T, cos_PE, sin_PE, turned, inverse)
    return out_TS


def _turn(out_TS, qkv_TS, positions_T, cos_PE, sin_PE, heads, inverse) -> None:
    E = cos_PE.shape[1]
    acc = cos_PE.dtype if cos_PE.dtype == torch.float64 else torch.float32
    for at in blocks(len(qkv_TS), heads * 2 * E):
        left, right = (x.to(acc) for x in _halves(qkv_TS[at], heads, E))
        cos = cos_PE.index_select(0, positions_T[at])[:, None]
        sin = sin_PE.index_select(0, positions_T[at])[:, None]
        if inverse:
            sin = -sin
        out_left, out_right = _halves(out_TS[at], heads, E)
        new_left = torch.mul(left, cos).addcmul_(right, sin, value=-1)
        out_right.copy_(torch.mul(right, cos).addcmul_(left, sin))
        out_left.copy_(new_left)


def _halves(x_TS: Tensor, heads: int, E: int) -> tuple[Tensor, Tensor]:
    left, right = x_TS[:, : heads * 2 * E].unflatten(1, (heads, 2, E)).unbind(2)
    return left, right
