"""Rotary position embedding on the packed projection.

T tokens, N query heads, K kv heads, H head dim, E = H/2, P positions, S = (N + 2K) H
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec_fast.ops.backend import choose, kernels


def rope_(
    qkv_TS: Tensor,
    positions_T: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    n_heads: int,
    n_kv_heads: int,
) -> Tensor:
    """Rotates the queries and keys of a packed projection in place; the values stay as they are.

    qkv_TS:       (T, (N + 2K) H) bf16/fp16/fp32: N query heads, then K key heads, then K value
                  heads; rows of a wider tensor are written where they lie
    positions_T:  (T,) int32 or int64, each token's position in its own text
    cos_PE:       (P, E) fp32 table, sin_PE likewise; P > the largest position (not checked here);
                  constants: no gradient reaches them
    returns:      qkv_TS itself
    raises:       ValueError if shapes or dtypes do not fit; RuntimeError, as torch does, for a leaf
                  that requires a gradient
    source:       Su et al. 2021, arXiv:2104.09864; halves rotate as in Hugging Face's rotate_half
    """
    check("rope_", qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)
    backend = choose("rope_", qkv_TS, head_dim=2 * cos_PE.shape[1])
    if backend == "reference":
        return rope_ref_(qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)
    run, arguments = kernels("rope_", backend), (positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)
    if qkv_TS.requires_grad and torch.is_grad_enabled():
        if qkv_TS.is_leaf:  # torch would say so too, but only after the values are gone
            raise RuntimeError("rope_: a leaf that requires grad cannot be changed in place")
        return _Rope.apply(qkv_TS, run, *arguments)
    run.rotate_(qkv_TS, *arguments)
    torch.autograd.graph.increment_version(qkv_TS)  # whoever saved it before must be told
    return qkv_TS


def check(op, qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads) -> None:
    """Raises the ValueErrors of `rope_` in the name of `op`."""
    heads = n_heads + 2 * n_kv_heads
    if cos_PE.dim() != 2 or cos_PE.shape != sin_PE.shape:
        raise ValueError(
            f"{op}: cos {tuple(cos_PE.shape)} and sin {tuple(sin_PE.shape)} must both be (P, E)"
        )
    if qkv_TS.dim() != 2 or qkv_TS.shape[1] != heads * 2 * cos_PE.shape[1]:
        raise ValueError(
            f"{op}: qkv is {tuple(qkv_TS.shape)}, but {n_heads} query heads and 2 x {n_kv_heads} "
            f"kv heads, {heads} heads of dimension {2 * cos_PE.shape[1]}, need "
            f"(T, {heads * 2 * cos_PE.shape[1]})"
        )
    if positions_T.shape != qkv_TS.shape[:1]:
        raise ValueError(
            f"{op}: positions {tuple(positions_T.shape)} for qkv {tuple(qkv_TS.shape)}"
        )
    if positions_T.dtype not in (torch.int32, torch.int64) or not qkv_TS.is_floating_point():
        raise ValueError(
            f"{op}: positions are {positions_T.dtype}, qkv is {qkv_TS.dtype}; "
            "they must be int32 or int64, and floating"
        )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_TS, run, *arguments):
        # Not save_for_backward: the tables may be inference tensors, which it refuses.
        ctx.run, ctx.arguments = run, arguments
        ctx.mark_dirty(qkv_TS)
        return run.rotate_(qkv_TS, *arguments)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dqkv_TS):
        # Into a new tensor: the gradient that came in may be someone else's too.
        dqkv_TS = ctx.run.rotated(dqkv_TS, *ctx.arguments, inverse=True)
        return dqkv_TS, None, *(None for _ in ctx.arguments)


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
