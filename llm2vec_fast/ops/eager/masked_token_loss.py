"""Cross-entropy through the head on the CPU: logits of a few rows at a time, in the dtype of
hidden, which turn into their gradient in place.

T packed tokens, M masked rows, C rows of a chunk, D model, V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec_fast.ops.eager import blocks

CHUNK = 32 << 20  # bytes of logits at a time


def forward(
    hidden_TD: Tensor, weight_VD: Tensor, rows_M: Tensor, targets_M: Tensor, ignore_index: int,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Losses (M,) fp32, and the gradients of their sum: by the gathered states (M, D), and by the
    weight (V, D); None where not wanted.
    """
    M, V = len(rows_M), len(weight_VD)
    states_MD = hidden_TD.index_select(0, rows_M)
    targets_M = targets_M.long()
    losses_M = hidden_TD.new_empty(M, dtype=torch.float32)
    dstates_MD = torch.empty_like(states_MD) if wants_hidden else None
    dweight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32) if wants_weight else None
    chunk = max(1, CHUNK // (V * hidden_TD.element_size()))
    for begin in range(0, M, chunk):
        at = slice(begin, begin + chunk)
        logits_CV = states_MD[at] @ weight_VD.t()
        losses_M[at] = _losses_(logits_CV, targets_M[at], ignore_index)
        if dstates_MD is not None:
            torch.mm(logits_CV, weight_VD, out=dstates_MD[at])
        if dweight_VD is not None:
            dweight_VD += logits_CV.t() @ states_MD[at]
    return losses_M, dstates_MD, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype)


def _losses_(logits_CV: Tensor, targets_C: Tensor, ignore_index: int) -> Tensor:
    """Losses (C,) fp32; the logits become their gradient. Ignored rows get 0 and 0."""
    losses_C = logits_CV.new_zeros(len(logits_CV), dtype=torch.float32)
    ignored_C1 = (targets_C == ignore_index)[:, None]
    spot_C1 = targets_C[:, None].masked_fill(ignored_C1, 0)
    for at in blocks(*logits_CV.shape):
        wide_CV = logits_CV[at].to(torch.float32, copy=True)
        hit_C1 = wide_CV.gather(1, spot_C1[at])  # raises on a target that does not exist
        peak_C1 = wide_CV.amax(1, keepdim=True)
        total_C1 = wide_CV.sub_(peak_C1).exp_().sum(1, keepdim=True)
        loss_C1 = total_C1.log() + (peak_C1 - hit_C1)
        losses_C[at] = loss_C1.masked_fill_(ignored_C1[at], 0).view(-1)
        wide_CV.div_(total_C1)
        wide_CV.scatter_add_(1, spot_C1[at], torch.full_like(hit_C1, -1))
        if ignored_C1[at].any():
            wide_CV.masked_fill_(ignored_C1[at], 0)
        logits_CV[at] = wide_CV
    return losses_C


def backward(
    factor: Tensor, dstates_MD: Tensor | None, dweight_VD: Tensor | None, rows_M: Tensor, T: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by hidden (T, D) and weight (V, D): what `forward` gave, times the 0-d fp32 factor.

    What was saved stays as it is: a retained graph may ask again.
    """
    dhidden_TD = None
    if dstates_MD is not None:
        wide_TD = dstates_MD.new_zeros(T, dstates_MD.shape[1], dtype=torch.float32)
        wide_TD.index_add_(0, rows_M, dstates_MD.float() * factor.float())
        dhidden_TD = wide_TD.to(dstates_MD.dtype)
    return dhidden_TD, None if dweight_VD is None else dweight_VD * factor
