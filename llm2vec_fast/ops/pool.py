"""One vector per text from packed hidden states.

T tokens, B texts, D model
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec_fast.ops._compiled import registered
from llm2vec_fast.ops.backend import choose, kernels

POOL_MODES = ("mean", "weighted_mean", "last", "first")


def pool(
    hidden_TD: Tensor, spans_B2: Tensor, mode: str = "mean", normalize: bool = False
) -> Tensor:
    """One vector per text from packed hidden states.

    hidden_TD:  (T, D) bf16/fp16/fp32, T = total tokens of the batch
    spans_B2:   (B, 2) integer, [start, end) of the tokens that count, start < end, disjoint and
                ascending (`PackedBatch` has checked that; here it would cost a host sync)
    mode:       mean; weighted_mean = sum_i i h_i / sum_i i with i = 1..length; last; first
    normalize:  divide each vector by its L2 norm
    returns:    (B, D) fp32, summed in a fixed order (bitwise repeatable)
    raises:     ValueError on an unknown mode, wrong shapes, or spans that are not integers
    source:     LLM2Vec, arXiv:2404.05961, section 2; weighted mean: SGPT, arXiv:2202.08904
    """
    if mode not in POOL_MODES:
        raise ValueError(f"pool: unknown mode {mode!r}; known: {', '.join(POOL_MODES)}")
    if hidden_TD.dim() != 2 or spans_B2.dim() != 2 or spans_B2.shape[1] != 2:
        raise ValueError(
            f"pool: hidden must be (T, D) and spans (B, 2), "
            f"got {tuple(hidden_TD.shape)} and {tuple(spans_B2.shape)}"
        )
    if spans_B2.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"pool: spans must be int32 or int64, an integer type, got {spans_B2.dtype}"
        )
    run = _operator if torch.compiler.is_compiling() else _run
    return run(hidden_TD, spans_B2, mode, normalize)


def _run(hidden_TD, spans_B2, mode, normalize):
    backend = choose("pool", hidden_TD)
    if backend == "triton":
        if not torch.is_grad_enabled():  # a node costs microseconds even where nobody needs it
            return kernels("pool").forward(hidden_TD, spans_B2, mode, normalize)[0]
        return _Pool.apply(hidden_TD, spans_B2, mode, normalize)
    if backend == "cuda":
        return kernels("pool", backend).pool(hidden_TD, spans_B2, mode, normalize)
    return pool_ref(hidden_TD, spans_B2, mode, normalize)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, spans_B2, mode, normalize):
        y_BD, norm_B = kernels("pool").forward(hidden_TD, spans_B2, mode, normalize)
        ctx.save_for_backward(spans_B2, y_BD if normalize else None, norm_B)
        ctx.rest = hidden_TD.shape[0], hidden_TD.dtype, mode
        return y_BD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_BD):
        return kernels("pool").backward(dy_BD, *ctx.saved_tensors, *ctx.rest), None, None, None


def pool_ref(hidden_TD, spans_B2, mode="mean", normalize=False):
    acc = torch.promote_types(hidden_TD.dtype, torch.float32)
    if mode == "last":
        pooled_BD = hidden_TD[spans_B2[:, 1] - 1].to(acc)
    elif mode == "first":
        pooled_BD = hidden_TD[spans_B2[:, 0]].to(acc)
    elif spans_B2.shape[0] == 0:
        pooled_BD = hidden_TD.new_zeros(0, hidden_TD.shape[1], dtype=acc)
    else:
        rows = [hidden_TD[start:end].to(acc) for start, end in spans_B2.tolist()]
        pooled_BD = torch.stack([_mean(row, mode == "weighted_mean") for row in rows])
    if normalize:
        pooled_BD = torch.nn.functional.normalize(pooled_BD, dim=-1)
    return pooled_BD


def _mean(hidden_LD: Tensor, weighted: bool) -> Tensor:
    if not weighted:
        return hidden_LD.mean(0)
    length = hidden_LD.shape[0]
    weight_L = torch.arange(1, length + 1, device=hidden_LD.device, dtype=hidden_LD.dtype)
    return (weight_L @ hidden_LD) / (length * (length + 1) / 2)


def _fake(hidden_TD, spans_B2, *_):
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    return hidden_TD.new_empty((spans_B2.shape[0], hidden_TD.shape[1]), dtype=dtype)


_operator = registered(
    "pool", "(Tensor hidden, Tensor spans, str mode, bool normalize) -> Tensor", _run, _fake
)
