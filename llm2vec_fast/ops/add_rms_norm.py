"""Residual add and RMSNorm in one operation.

T tokens (or any number of rows), D model
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The running residual r = x + residual and its norm y = r / rms(r) * weight.

    x_TD:         (..., D) bf16/fp16/fp32, the output of the layer before
    residual_TD:  like x_TD, or None at the first layer (then r = x)
    weight_D:     (D,)
    returns:      y, r, both like x_TD; the norm is computed in fp32
    raises:       ValueError if shapes or dtypes do not fit
    source:       Zhang and Sennrich 2019, arXiv:1910.07467
    """
    if weight_D.shape != x_TD.shape[-1:]:
        raise ValueError(
            f"add_rms_norm: weight is {tuple(weight_D.shape)}, x ends in {x_TD.shape[-1]}"
        )
    if residual_TD is not None and (
        residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype
    ):
        raise ValueError(
            f"add_rms_norm: residual is {tuple(residual_TD.shape)} {residual_TD.dtype}, "
            f"x is {tuple(x_TD.shape)} {x_TD.dtype}; they must be alike"
        )
    return add_rms_norm_ref(x_TD, residual_TD, weight_D, eps)


def add_rms_norm_ref(x_TD, residual_TD, weight_D, eps):
    residual_TD = x_TD if residual_TD is None else x_TD + residual_TD
    acc = torch.promote_types(x_TD.dtype, torch.float32)
    wide_TD = residual_TD.to(acc)
    norm_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
    rstd_T1 = torch.rsqrt(norm_T1.square() / x_TD.shape[-1] + eps)
    y_TD = (wide_TD * rstd_T1).mul_(weight_D.to(acc))
    return y_TD.to(x_TD.dtype), residual_TD
