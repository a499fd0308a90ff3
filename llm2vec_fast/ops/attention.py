"""Attention over packed texts: no padding, no leak from one text to the next.

T tokens, B texts, N query heads, K kv heads, H head dim
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops import _flash
from llm2vec_fast.ops.backend import Call, choose, register


def attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention within each text of a packed batch.

    q_TNH:       (T, N, H) bf16/fp16/fp32; k_TKH, v_TKH: (T, K, H), N a multiple of K. Views of a
                 packed projection are welcome; the last dimension must be contiguous.
    cu_seqlens:  (B + 1,) int32, text b holds rows cu_seqlens[b] to cu_seqlens[b + 1]; no empty text
    max_seqlen:  the longest text, known on the host
    causal:      each token sees itself and what came before; otherwise the whole text
    window:      a token sees keys less than `window` positions away (causal: itself and window - 1
                 before)
    scale:       of the scores, 1 / sqrt(H) if None
    returns:     (T, N, H)
    raises:      ValueError if shapes or dtypes do not fit; NotImplementedError on dropout_p > 0 (no
                 backend of this version has it)
    source:      Dao 2023, arXiv:2307.08691 (the varlen form)
    """
    _check(q_TNH, k_TKH, v_TKH, cu_seqlens, window, dropout_p)
    scale = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    name = choose("attention", q_TNH, window=window is not None, head_dim=q_TNH.shape[-1])
    run = _BACKENDS[name]
    return run(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale)


def _check(q_TNH, k_TKH, v_TKH, cu_seqlens, window, dropout_p):
    fit = q_TNH.dim() == k_TKH.dim() == 3 and q_TNH.shape[::2] == k_TKH.shape[::2]
    if not fit or k_TKH.shape != v_TKH.shape:
        raise ValueError(
            f"attention: q (T, N, H), k and v (T, K, H) do not fit: {tuple(q_TNH.shape)}, "
            f"{tuple(k_TKH.shape)}, {tuple(v_TKH.shape)}"
        )
    if not k_TKH.shape[1] or q_TNH.shape[1] % k_TKH.shape[1]:
        raise ValueError(
            f"attention: {q_TNH.shape[1]} query heads are no multiple of {k_TKH.shape[1]} kv heads"
        )
    if not q_TNH.dtype == k_TKH.dtype == v_TKH.dtype:
        raise ValueError(f"attention: dtypes {q_TNH.dtype}, {k_TKH.dtype}, {v_TKH.dtype} differ")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"attention: cu_seqlens must be (B + 1,) int32, "
            f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    if dropout_p:
        raise NotImplementedError("attention: dropout is not built yet in this version")


def _visible(length: int, causal: bool, window: int | None, device) -> Tensor | None:
    """(L, L) bool, True where query row may see key column; None if it may see everything."""
    if not causal and (window is None or window >= length):
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return visible if window is None else visible & (distance.abs() < window)


def attention_ref(
    q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, *, causal=False, window=None, scale=None
):
    """The truth: one text at a time, scores and softmax spelled out, in fp32 or wider."""
    acc = torch.promote_types(q_TNH.dtype, torch.float32)
    scale = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    repeat = q_TNH.shape[1] // k_TKH.shape[1]
    texts = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        q_NLH = q_TNH[start:end].to(acc).transpose(0, 1)
        k_NLH = k_TKH[start:end].to(acc).transpose(0, 1).repeat_interleave(repeat, 0)
        v_NLH = v_TKH[start:end].to(acc).transpose(0, 1).repeat_interleave(repeat, 0)
        score_NLL = q_NLH @ k_NLH.transpose(1, 2) * scale
        visible = _visible(end - start, causal, window, q_TNH.device)
        if visible is not None:
            score_NLL = score_NLL.masked_fill(~visible, float("-inf"))
        texts.append((score_NLL.softmax(-1) @ v_NLH).transpose(0, 1))
    return torch.cat(texts).to(q_TNH.dtype) if texts else torch.empty_like(q_TNH)


def _reference(q, k, v, cu_seqlens, max_seqlen, causal, window, scale):
    return attention_ref(q, k, v, cu_seqlens, max_seqlen, causal=causal, window=window, scale=scale)


def _sdpa(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale):
    """torch's fused CPU attention on every run of equally long texts: a batch, but no padding."""
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    start, groups = 0, []
    for length, run in itertools.groupby(lengths):
        count = sum(1 for _ in run)
        end = start + count * length
        q, k, v = (
            x[start:end].unflatten(0, (count, length)).transpose(1, 2)
            for x in (q_TNH, k_TKH, v_TKH)
        )
        mask = None if window is None else _visible(length, causal, window, q_TNH.device)
        plain_causal = causal and mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=True
        )
        groups.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    o_TNH = torch.cat(groups) if groups else torch.empty_like(q_TNH)
    if not sum(x.detach().sum(dtype=torch.float32) for x in (q_TNH, k_TKH)).isfinite():
        # torch's kernel writes 0 where all scores of a query are NaN, which would hide an overflow.
        truth = _reference(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale)
        o_TNH = torch.where(truth.isfinite(), o_TNH, truth)
    return o_TNH


def _sdpa_refuses(call: Call) -> str | None:
    if call.device != "cpu":
        return "groups texts of equal length on the host: CPU only"
    return None


register("sdpa", _sdpa_refuses)
register("flash_attn", _flash.flash_attn_refuses)
register("varlen", _flash.varlen_refuses)

_BACKENDS = {
    "flash_attn": _flash.flash_attn,
    "varlen": _flash.varlen,
    "sdpa": _sdpa,
    "reference": _reference,
}
