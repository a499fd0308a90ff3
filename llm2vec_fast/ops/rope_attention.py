"""Rotary embedding and attention as one node of autograd, because two cost memory.

T tokens, B texts, N query heads, K kv heads, H head dim, E = H/2, P positions, S = (N + 2K) H

What lives until the backward is the rotated projection, the output and lse. The gradients of q, k
and v are written into one packed buffer, turned back there, and that buffer is what is returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec_fast.ops import _flash
from llm2vec_fast.ops.attention import PAIRS, as_read_by, attention, check, dropout_seed
from llm2vec_fast.ops.backend import choose, kernels
from llm2vec_fast.ops.rope import check as check_rope
from llm2vec_fast.ops.rope import rope_, rope_ref_


def rope_attention(
    qkv_TS: Tensor,
    positions_T: Tensor,
    cos_PE: Tensor,
    sin_PE: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_heads: int,
    n_kv_heads: int,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`rope_` on the queries and keys of a packed projection, then `attention` on views of it.

    qkv_TS:   (T, (N + 2K) H), used up: it is rotated in place and kept for the backward, so nobody
              may read it afterwards. The gradient is that of the projection before rotation.
    returns:  (T, N, H)
    raises:   ValueError if shapes, dtypes or numbers do not fit
    The other arguments are those of `rope_` and `attention`.
    """
    check_rope("rope_attention", qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)
    if dropout_p:
        seed = dropout_seed(seed)
    H = 2 * cos_PE.shape[-1]
    name = choose("attention", qkv_TS, dropout=dropout_p > 0, window=window is not None, head_dim=H)
    trains = qkv_TS.requires_grad and torch.is_grad_enabled()
    if not trains or not _has_pair(name):
        rope_(qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)
        return attention(
            *split_heads(qkv_TS, n_heads, n_kv_heads), cu_seqlens, max_seqlen,
            causal=causal, window=window, dropout_p=dropout_p, seed=seed, scale=scale,
        )  # fmt: skip
    if qkv_TS.is_leaf:  # as torch and rope_ say it
        raise RuntimeError("rope_attention: a leaf that requires grad cannot be changed in place")
    check(*split_heads(qkv_TS.detach(), n_heads, n_kv_heads), cu_seqlens, window, dropout_p)
    scale = H**-0.5 if scale is None else scale
    rope = (positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)
    options = (max_seqlen, causal, window, scale, dropout_p, seed)
    qkv_TS = as_read_by(name, qkv_TS)
    return _RopeAttention.apply(qkv_TS, cu_seqlens, PAIRS[name], rope, options)


def split_heads(qkv_TS: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (T, N, H), (T, K, H), (T, K, H) of queries, keys and values in a packed projection."""
    size = qkv_TS.shape[1] // (n_heads + 2 * n_kv_heads)
    q, k, v = qkv_TS.unflatten(1, (-1, size)).split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    return q, k, v


class _RopeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_TS, cu_seqlens, pair, rope, options):
        # Not marked dirty: for autograd qkv stays what the projection gave, and as it is used up
        # nobody sees the difference. So a view is as welcome as a tensor of its own. (Whoever saved
        # it before still hears of the change: the version counter moves.)
        _, _, _, n_heads, n_kv_heads = rope
        _rotate_(qkv_TS, *rope, inverse=False)
        torch.autograd.graph.increment_version(qkv_TS)  # a kernel's writing is unknown to torch
        q, k, v = split_heads(qkv_TS, n_heads, n_kv_heads)
        o_TNH, saved = pair[0](q, k, v, cu_seqlens, *options)
        ctx.save_for_backward(qkv_TS, o_TNH, cu_seqlens, *saved)
        # The tables may be inference tensors, which save_for_backward refuses.
        ctx.run_backward, ctx.rope, ctx.options = pair[1], rope, options
        return o_TNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do_TNH):
        qkv_TS, o_TNH, cu_seqlens, *saved = ctx.saved_tensors
        _, _, _, n_heads, n_kv_heads = ctx.rope
        dqkv_TS = qkv_TS.new_empty(qkv_TS.shape)
        q, k, v = split_heads(qkv_TS, n_heads, n_kv_heads)
        into = split_heads(dqkv_TS, n_heads, n_kv_heads)
        ctx.run_backward(do_TNH, q, k, v, o_TNH, saved, cu_seqlens, *ctx.options, into=into)
        _rotate_(dqkv_TS, *ctx.rope, inverse=True)
        return dqkv_TS, None, None, None, None


def _has_pair(name: str) -> bool:
    return name in PAIRS and (name != "flash_attn" or _flash.has_flash_attn_pair())


def _rotate_(qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads, inverse):
    """Turns queries and keys by their positions, or back."""
    backend = choose("rope_", qkv_TS, head_dim=2 * cos_PE.shape[1])
    if backend != "reference":
        kernels("rope_", backend).rotate_(
            qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads, inverse=inverse
        )
    else:
        sin_PE = -sin_PE if inverse else sin_PE
        rope_ref_(qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads)
