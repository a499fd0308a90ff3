"""Residual add and RMSNorm in one operation.

T tokens (or any number of rows), D model (or head) dimension
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2vec_fast.ops.backend import choose, kernels


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The running residual r = x + residual and its norm y = r / rms(r) * weight.

    x_TD:         (..., D) bf16/fp16/fp32, the output of the layer before; a strided (T, N, H) view
                  of the heads of a projection is read where it lies
    residual_TD:  like x_TD, or None at the first layer (then r is x itself)
    weight_D:     (D,), its dtype may differ from x's
    returns:      y, r, both like x_TD; the norm is computed in fp32
    raises:       ValueError if shapes or dtypes do not fit
    source:       Zhang and Sennrich 2019, arXiv:1910.07467
    """
    if weight_D.dim() != 1 or weight_D.shape != x_TD.shape[-1:]:
        raise ValueError(
            f"add_rms_norm: weight is {tuple(weight_D.shape)}, x is {tuple(x_TD.shape)}; "
            "the weight must be as long as x's last dimension"
        )
    if not (x_TD.is_floating_point() and weight_D.is_floating_point()):
        raise ValueError(
            f"add_rms_norm: x is {x_TD.dtype}, weight is {weight_D.dtype}; both must be floating"
        )
    if residual_TD is not None and (
        residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype
    ):
        raise ValueError(
            f"add_rms_norm: residual is {tuple(residual_TD.shape)} {residual_TD.dtype}, "
            f"x is {tuple(x_TD.shape)} {x_TD.dtype}; they must be alike"
        )
    backend = choose("add_rms_norm", x_TD, residual_TD, weight_D)
    if backend in ("triton", "eager"):
        return _node(x_TD, residual_TD, weight_D, eps, kernels("add_rms_norm", backend))
    if backend in ("cuda", "cpu"):
        return kernels("add_rms_norm", backend).add_rms_norm(x_TD, residual_TD, weight_D, eps)
    return add_rms_norm_ref(x_TD, residual_TD, weight_D, eps)


def _node(x_TD, residual_TD, weight_D, eps, run):
    saves = torch.is_grad_enabled() and (
        x_TD.requires_grad
        or weight_D.requires_grad
        or (residual_TD is not None and residual_TD.requires_grad)
    )
    if not saves:
        y_TD, r_TD, _ = run.forward(x_TD, residual_TD, weight_D, eps, False)
    elif residual_TD is None:
        # x is not passed through the node: autograd adds what comes back through r by itself.
        y_TD, r_TD = _RMSNorm.apply(x_TD, weight_D, eps, run), None
    else:
        y_TD, r_TD = _AddRMSNorm.apply(x_TD, residual_TD, weight_D, eps, run)
    return y_TD, x_TD if r_TD is None else r_TD


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, residual_TD, weight_D, eps, run):
        ctx.set_materialize_grads(False)
        y_TD, r_TD, rstd = run.forward(x_TD, residual_TD, weight_D, eps, True)
        ctx.save_for_backward(r_TD, weight_D, rstd)
        ctx.run = run
        return y_TD, r_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TD, dr_TD):
        wants_x, wants_residual, wants_weight = ctx.needs_input_grad[:3]
        if dy_TD is None:  # only the residual stream went on
            dx_TD, dweight_D = dr_TD, None
        else:
            dx_TD, dweight_D = ctx.run.backward(
                dy_TD, dr_TD, *ctx.saved_tensors, wants_x or wants_residual, wants_weight
            )
        return dx_TD if wants_x else None, dx_TD if wants_residual else None, dweight_D, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps, run):
        y_TD, _, rstd = run.forward(x_TD, None, weight_D, eps, True)
        ctx.save_for_backward(x_TD, weight_D, rstd)
        ctx.run = run
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TD):
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        dx_TD, dweight_D = ctx.run.backward(dy_TD, None, *ctx.saved_tensors, wants_x, wants_weight)
        return dx_TD, dweight_D, None, None


def add_rms_norm_ref(x_TD, residual_TD, weight_D, eps):
    residual_TD = x_TD if residual_TD is None else x_TD + residual_TD
    acc = torch.promote_types(x_TD.dtype, torch.float32)
    wide_TD = residual_TD.to(acc)
    norm_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True)
    rstd_T1 = torch.rsqrt(norm_T1.square() / x_TD.shape[-1] + eps)
    y_TD = (wide_TD * rstd_T1).mul_(weight_D.to(acc))
    return y_TD.to(x_TD.dtype), residual_TD
