"""Residual add and RMSNorm on the CPU; what is saved is the residual stream and rstd.

T rows, D width of a row
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec_fast.ops.eager import scratch


def forward(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, r, rstd) of (..., D) inputs; r is None without a residual, rstd unless it is to be saved.

    rstd is fp32, one for each row.
    """
    r = None if residual is None else x + residual
    stream_TD = _rows(x if r is None else r)
    T, D = stream_TD.shape
    y = x.new_empty(x.shape)
    y_TD, rstd_T1 = y.view(T, D), x.new_empty(T, 1, dtype=torch.float32)
    wide_D = weight_D.float()
    if x.dtype == torch.float32:  # nothing to convert: no scratch
        torch.rsqrt(_mean_square(stream_TD).add_(eps), out=rstd_T1)
        torch.mul(stream_TD, rstd_T1, out=y_TD).mul_(wide_D)
    else:
        for at, (value_TD,) in scratch(1, T, D):
            value_TD.copy_(stream_TD[at])
            torch.rsqrt(_mean_square(value_TD).add_(eps), out=rstd_T1[at])
            y_TD[at] = value_TD.mul_(rstd_T1[at]).mul_(wide_D)
    return y, r, rstd_T1.view(T) if save else None


def backward(
    dy: Tensor,
    dr: Tensor | None,
    r: Tensor,
    weight_D: Tensor,
    rstd: Tensor,
    want_dx: bool = True,
    want_dweight: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dweight) from the gradients of y and, unless it is None, of r; each only if wanted.

    dx holds for x and for the residual alike.
    """
    dx = r.new_empty(r.shape) if want_dx else None
    dy_TD, r_TD, dr_TD = _rows(dy), _rows(r), None if dr is None else _rows(dr)
    (T, D), rstd_T1, wide_D = r_TD.shape, rstd[:, None], weight_D.float()
    dweight_D = r.new_zeros(D, dtype=torch.float32) if want_dweight else None
    for at, (norm_TD, slope_TD, work_TD) in scratch(3, T, D):
        norm_TD.copy_(r_TD[at]).mul_(rstd_T1[at])
        slope_TD.copy_(dy_TD[at])
        if dweight_D is not None:
            dweight_D += torch.mul(slope_TD, norm_TD, out=work_TD).sum(0)
        if dx is None:
            continue
        slope_TD.mul_(wide_D)
        along_T1 = torch.mul(slope_TD, norm_TD, out=work_TD).sum(-1, keepdim=True).div_(D)
        slope_TD.addcmul_(norm_TD, along_T1, value=-1).mul_(rstd_T1[at])
        if dr_TD is not None:
            slope_TD.add_(work_TD.copy_(dr_TD[at]))
        dx.view(T, D)[at] = slope_TD
    return dx, None if dweight_D is None else dweight_D.to(weight_D.dtype)


def _mean_square(x_TD: Tensor) -> Tensor:
    norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
    return norm_T1.square_().div_(x_TD.shape[1])


def _rows(x: Tensor) -> Tensor:
    D = x.shape[-1]
    return x.reshape(x.numel() // max(D, 1), D)
