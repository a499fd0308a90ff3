"""Attention over packed texts: no padding, no leak from one text to the next.

T tokens, B texts, N query heads, K kv heads, H head dim
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops import _flash
from llm2vec_fast.ops._compiled import registered
from llm2vec_fast.ops.backend import Call, choose, kernels, register


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
                 packed projection are welcome (other columns than adjacent ones are copied).
    cu_seqlens:  (B + 1,) int32, text b holds rows cu_seqlens[b] to cu_seqlens[b + 1]; no empty text
    max_seqlen:  the longest text, known on the host
    causal:      each token sees itself and what came before; otherwise the whole text
    window:      a token sees keys less than `window` positions away (causal: itself and window - 1
                 before)
    scale:       of the scores, 1 / sqrt(H) if None
    dropout_p:   chance that a weight is dropped, in [0, 1); the kept ones grow by 1 / (1 - p)
    seed:        alone decides which weights are dropped: the same call with the same seed drops
                 the same ones (recompute), whatever else has drawn random numbers. Each backend
                 has its own masks. None draws a seed from torch's generator for the CPU.
    returns:     (T, N, H); rows past cu_seqlens[-1] are undefined
    raises:      ValueError if shapes, dtypes or numbers do not fit
    source:      Dao 2023, arXiv:2307.08691 (the varlen form); Srivastava et al. 2014 (dropout)
    """
    check(q_TNH, k_TKH, v_TKH, cu_seqlens, window, dropout_p)
    scale = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    if dropout_p:
        seed = dropout_seed(seed)
    run = _operator if torch.compiler.is_compiling() else _run
    return run(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed)


def _run(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed):
    name = choose(
        "attention", q_TNH, k_TKH, v_TKH,
        dropout=dropout_p > 0, window=window is not None, head_dim=q_TNH.shape[-1],
    )  # fmt: skip
    return _BACKENDS[name](
        q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed
    )


def dropout_seed(seed: int | None) -> int:
    """A seed as all backends take it, 0 to 2^63 - 1; drawn on the CPU, without a sync, if None."""
    if seed is None:
        return int(torch.randint(1 << 62, (), device="cpu"))
    return seed & ((1 << 63) - 1)


def check(q_TNH, k_TKH, v_TKH, cu_seqlens, window, dropout_p) -> None:
    """Raises the ValueErrors of `attention`: shapes, dtypes and numbers, no values of tensors."""
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
    fit = cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1
    if not fit or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"attention: cu_seqlens must be (B + 1,) int32 and contiguous, "
            f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, strides {cu_seqlens.stride()}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p must be in [0, 1), got {dropout_p}")


def _visible(length: int, causal: bool, window: int | None, device) -> Tensor | None:
    """(L, L) bool, True where query row may see key column; None if it may see everything."""
    if not causal and (window is None or window >= length):
        return None
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return visible if window is None else visible & (distance.abs() < window)


def attention_ref(
    q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, *,
    causal=False, window=None, dropout_p=0.0, seed=None, scale=None,
):  # fmt: skip
    """The truth: one text at a time, scores and softmax spelled out, in fp32 or wider."""
    noise = None
    if dropout_p:
        noise = torch.Generator(q_TNH.device).manual_seed(dropout_seed(seed))
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
        weight_NLL = score_NLL.softmax(-1)
        if noise is not None:
            chance = torch.rand(weight_NLL.shape, generator=noise, device=q_TNH.device)
            weight_NLL = weight_NLL * (chance >= dropout_p) / (1 - dropout_p)
        texts.append((weight_NLL @ v_NLH).transpose(0, 1))
    return torch.cat(texts).to(q_TNH.dtype) if texts else torch.empty_like(q_TNH)


def _reference(q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed):
    return attention_ref(
        q, k, v, cu_seqlens, max_seqlen,
        causal=causal, window=window, dropout_p=dropout_p, seed=seed, scale=scale,
    )  # fmt: skip


def _sdpa(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed):
    o_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    return _by_length(q_TNH, k_TKH, v_TKH, cu_seqlens, causal, window, scale, o_TNH)


def _cpu(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed):
    """Our kernel for short texts, torch's for long ones."""
    run = kernels("attention", "cpu")
    o_TNH = run.attention(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, causal, window, scale)
    longest = run.longest(q_TNH.dtype)
    if max_seqlen <= longest:
        return o_TNH
    return _by_length(q_TNH, k_TKH, v_TKH, cu_seqlens, causal, window, scale, o_TNH, longest)


def _by_length(q_TNH, k_TKH, v_TKH, cu_seqlens, causal, window, scale, o_TNH, above=0) -> Tensor:
    """torch's fused CPU attention on every run of equally long texts: a batch, but no padding.
    Fills the rows of o_TNH whose texts have more tokens than `above`.
    """
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    start, parts = 0, []
    for length, run in itertools.groupby(lengths):
        count = sum(1 for _ in run)
        at = slice(start, start + count * length)
        start = at.stop
        if length <= above:
            continue
        q, k, v = (
            x[at].unflatten(0, (count, length)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH)
        )
        mask = None if window is None else _visible(length, causal, window, q_TNH.device)
        plain_causal = causal and mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=True
        )
        parts.append((at, out.transpose(1, 2)))
    if any(out_BLNH.requires_grad for _, out_BLNH in parts):  # never with `above`
        o_TNH = torch.cat([*(out.flatten(0, 1) for _, out in parts), o_TNH[start:]])
    else:
        for at, out_BLNH in parts:
            o_TNH[at].view(out_BLNH.shape).copy_(out_BLNH)
    used = [x.detach()[:start].sum(dtype=torch.float32) for x in (q_TNH, k_TKH)]
    if not sum(used).isfinite():
        # torch's kernel writes 0 where all scores of a query are NaN, which would hide an overflow.
        truth = attention_ref(
            q_TNH, k_TKH, v_TKH, cu_seqlens, max(lengths), causal=causal, window=window, scale=scale
        )
        o_TNH = torch.cat([torch.where(truth.isfinite(), o_TNH[:start], truth), o_TNH[start:]])
    return o_TNH


def _sdpa_refuses(call: Call) -> str | None:
    if call.device != "cpu":
        return "groups texts of equal length on the host: CPU only"
    if call.dropout:
        return "draws dropout from torch's global generator, not from a seed"
    return None


def _triton_forward(q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed):
    o_TNH, lse_NT = kernels("attention").forward(
        q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed
    )
    return o_TNH, (lse_NT,)


def _triton_backward(
    do, q, k, v, o, saved, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed, into=None
):
    dq, dk, dv = into or [x.new_empty(x.shape) for x in (q, k, v)]
    kernels("attention_backward").backward(
        do, q, k, v, o, *saved, cu_seqlens, causal, window, scale, dropout_p, seed, dq, dk, dv
    )
    return dq, dk, dv


def _eager_forward(*arguments):
    return kernels("attention", "eager").forward(*arguments)


def _eager_backward(*arguments, into=None):
    return kernels("attention", "eager").backward(*arguments, into=into)


# (forward, backward) of backends that an autograd node can be built from; see _flash.py.
PAIRS = {
    "triton": (_triton_forward, _triton_backward),
    "eager": (_eager_forward, _eager_backward),
    "varlen": (_flash.aten_forward, _flash.aten_backward),
    "flash_dropout": (_flash.aten_forward, _flash.aten_backward),
    "flash_attn": (_flash.flash_attn_forward, _flash.flash_attn_backward),
}


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_TNH, k_TKH, v_TKH, cu_seqlens, pair, *options):
        o_TNH, saved = pair[0](q_TNH, k_TKH, v_TKH, cu_seqlens, *options)
        ctx.save_for_backward(q_TNH, k_TKH, v_TKH, o_TNH, cu_seqlens, *saved)
        ctx.run_backward, ctx.options = pair[1], options
        return o_TNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do_TNH):
        q, k, v, o, cu_seqlens, *saved = ctx.saved_tensors
        into = None if any(ctx.needs_input_grad[1:3]) else (torch.empty_like(q), None, None)
        gradients = ctx.run_backward(do_TNH, q, k, v, o, saved, cu_seqlens, *ctx.options, into=into)
        return *gradients, None, None, *[None] * len(ctx.options)


def as_read_by(name: str, x: Tensor) -> Tensor:
    """x itself, or a copy if a backend of `PAIRS` cannot read it as it lies. All kernels step
    through rows and heads by their strides, but not through columns.
    """
    if name == "eager":
        return x
    if name != "triton":
        return _flash.readable(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _as_node(name: str):
    """A pair as one backend of `attention`."""

    def run(q, k, v, cu_seqlens, *options):
        q, k, v = (as_read_by(name, x) for x in (q, k, v))
        if not torch.is_grad_enabled():  # a node costs microseconds even where nobody needs it
            return PAIRS[name][0](q, k, v, cu_seqlens, *options)[0]
        return _Attention.apply(q, k, v, cu_seqlens, PAIRS[name], *options)

    return run


register("sdpa", _sdpa_refuses)
register("flash_attn", _flash.flash_attn_refuses)
for _name in _flash.NEWER:
    register(_name, functools.partial(_flash.newer_refuses, _name))
register("varlen", _flash.varlen_refuses)
register("flash_dropout", _flash.flash_dropout_refuses)

_BACKENDS = {
    **{name: _flash.newer(name) for name in _flash.NEWER},
    "flash_attn": _flash.flash_attn,
    "varlen": _flash.varlen,
    "flash_dropout": _as_node("flash_dropout"),
    "triton": _as_node("triton"),
    "cpu": _cpu,
    "eager": _as_node("eager"),
    "sdpa": _sdpa,
    "reference": _reference,
}

_operator = registered(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, bool causal, "
    "int? window, float scale, float dropout_p, int? seed) -> Tensor",
    _run,
    lambda q_TNH, *_: q_TNH.new_empty(q_TNH.shape),
)
