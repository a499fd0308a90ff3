"""Rotary position embedding on the packed projection.

T tokens, N query heads, K kv heads, H head dim, E = H/2, P positions, S = (N + 2K) H
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_(
    qkv_TS: Tensor,
    positions_T: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    n_heads: int,
    n_kv_heads: int,
) -> Tensor:
    """Rotates the queries and keys of a packed projection in place; the values stay as they are.

    qkv_TS:       (T, (N + 2K) H): N query heads, then K key heads, then K value heads
    positions_T:  (T,) integer, each token's position in its own text
    cos_PE:       (P, E) fp32 table, sin_PE likewise; P > the largest position (not checked here)
    returns:      qkv_TS itself
    raises:       ValueError if shapes do not fit
    source:       Su et al. 2021, arXiv:2104.09864; halves rotate as in Hugging Face's rotate_half
    """
    heads = n_heads + 2 * n_kv_heads
    if qkv_TS.dim() != 2 or qkv_TS.shape[1] != heads * 2 * cos_PE.shape[-1]:
        raise ValueError(
            f"rope_: qkv is {tuple(qkv_TS.shape)}, but {heads} heads of dimension "
            f"{2 * cos_PE.shape[-1]} need (T, {heads * 2 * cos_PE.shape[-1]})"
        )
    if positions_T.shape != qkv_TS.shape[:1] or cos_PE.shape != sin_PE.shape:
        raise ValueError(
            f"rope_: positions {tuple(positions_T.shape)} for qkv {tuple(qkv_TS.shape)}, "
            f"cos {tuple(cos_PE.shape)}, sin {tuple(sin_PE.shape)}"
        )
    return rope_ref_(qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)


def rope_ref_(qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads):
    half = cos_PE.shape[-1]
    qk = qkv_TS.unflatten(1, (-1, 2 * half))[:, : n_heads + n_kv_heads]
    acc = torch.promote_types(qkv_TS.dtype, torch.float32)
    cos = cos_PE.index_select(0, positions_T)[:, None]
    sin = sin_PE.index_select(0, positions_T)[:, None]
    left, right = qk[..., :half], qk[..., half:]
    turned_left = torch.mul(left.to(acc), cos).addcmul_(right.to(acc), sin, value=-1)
    turned_right = torch.mul(right.to(acc), cos).addcmul_(left.to(acc), sin)
    left.copy_(turned_left)
    right.copy_(turned_right)
    return qkv_TS
