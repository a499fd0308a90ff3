"""SwiGLU and the projection after it as one autograd node, because two would keep the product.

Apart, the activation keeps gate and up (T, 2F) for its backward pass and the projection keeps the
product (T, F) for its weight or adapter: a third of the feed-forward layer's memory. Here only
gate and up are kept; the pass that computes their gradient writes the product anew, in the place
of the gradient that it has consumed.

T tokens, F feed-forward, D model, R rank of all segments together
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops.backend import choose, kernels
from llm2vec_fast.ops.lora_linear import (
    Drop,
    Segment,
    adapted,
    check,
    drawn,
    grad_a,
    grad_b,
    grad_u,
    grad_x,
    lora_linear,
    lora_linear_ref,
    with_masks,
)
from llm2vec_fast.ops.swiglu import swiglu, swiglu_ref


def swiglu_linear(
    gate_up_T2F: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None,
    a_RF: Tensor | None = None, b_DR: Tensor | None = None,
    segments: Sequence[Segment] = (), *, dropout_p: float = 0.0, seed: int | None = None,
) -> Tensor:  # fmt: skip
    """(silu(gate) * up) W^T + bias, with low-rank updates as in `lora_linear`.

    gate_up_T2F: (T, 2F), gate first
    weight_DF:   (D, F); gets a gradient if it asks for one, but not together with segments
    bias_D, a_RF, b_DR, segments, dropout_p, seed: as in `lora_linear`; dropout acts on the product
    returns:     (T, D) in the dtype of gate_up
    raises:      ValueError on wrong shapes, dtypes, segments or probabilities, and on a weight that
                 asks for a gradient beside adapters
    source:      Shazeer 2020, arXiv:2002.05202; LoRA, arXiv:2106.09685
    """
    width = weight_DF.shape[-1]
    if gate_up_T2F.dim() != 2 or gate_up_T2F.shape[1] != 2 * width:
        raise ValueError(
            f"swiglu_linear: gate and up must be (tokens, {2 * width}) for a weight of "
            f"{tuple(weight_DF.shape)}, got {tuple(gate_up_T2F.shape)}"
        )
    like_TF = gate_up_T2F[:, :width]  # stands for the product: its shape and dtype
    plan = check("swiglu_linear", like_TF, weight_DF, bias_D, a_RF, b_DR, segments, dropout_p)
    if plan is not None and weight_DF.requires_grad:
        raise ValueError(
            "swiglu_linear: a weight with adapters is frozen; call requires_grad_(False) on it"
        )
    backend = choose("swiglu", gate_up_T2F, weight_DF, bias_D, a_RF, b_DR)
    if backend in ("triton", "eager"):
        run = kernels("swiglu", backend)
        drop = Drop(dropout_p, drawn(seed), backend) if plan is not None and dropout_p else None
        return _SwiGLULinear.apply(gate_up_T2F, weight_DF, bias_D, a_RF, b_DR, plan, drop, run)
    product_TF = swiglu(gate_up_T2F)
    if plan is None:
        return F.linear(product_TF, weight_DF, bias_D)
    return lora_linear(
        product_TF, weight_DF, bias_D, a_RF, b_DR, segments, dropout_p=dropout_p, seed=seed
    )


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up_T2F, weight_DF, bias_D, a_RF, b_DR, plan, drop, run):
        product_TF, u_TR = run.forward(gate_up_T2F), None
        if plan is None:
            y_TD = F.linear(product_TF, weight_DF, bias_D)
        else:
            drop = with_masks(drop, product_TF, plan)
            y_TD, u_TR = adapted(product_TF, weight_DF, bias_D, a_RF, b_DR, plan, drop)
        ctx.save_for_backward(gate_up_T2F, weight_DF, a_RF, b_DR, u_TR, drop and drop.masks)
        ctx.plan, ctx.drop, ctx.run = plan, drop and drop._replace(masks=None), run
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TD):
        gate_up_T2F, weight_DF, a_RF, b_DR, u_TR, masks = ctx.saved_tensors
        plan, drop = ctx.plan, ctx.drop and ctx.drop._replace(masks=masks)
        wanted, weight_wanted, bias_wanted, a_wanted, b_wanted = ctx.needs_input_grad[:5]
        a_wanted, b_wanted = a_wanted and plan is not None, b_wanted and plan is not None
        dgate_up_T2F = dweight_DF = da_RF = db_DR = du_TR = product_TF = None
        if plan is not None and (wanted or a_wanted):
            du_TR = grad_u(dy_TD, b_DR, plan)
        if wanted:
            if plan is None:
                dproduct_TF = dy_TD @ weight_DF
            else:
                dproduct_TF = grad_x(dy_TD, weight_DF, du_TR, a_RF, plan, drop)
            again = weight_wanted or a_wanted
            dgate_up_T2F = ctx.run.backward(dproduct_TF, gate_up_T2F, product=again)
            product_TF = dproduct_TF  # if it was asked for
        elif weight_wanted or a_wanted:
            product_TF = ctx.run.forward(gate_up_T2F)
        if weight_wanted:
            dweight_DF = dy_TD.t() @ product_TF
        if a_wanted:
            da_RF = grad_a(du_TR, product_TF, plan, drop).to(a_RF.dtype)
        if b_wanted:
            db_DR = grad_b(dy_TD, u_TR, b_DR, plan)
        dbias_D = dy_TD.sum(0) if bias_wanted else None
        return dgate_up_T2F, dweight_DF, dbias_D, da_RF, db_DR, None, None, None


def swiglu_linear_ref(
    gate_up_T2F, weight_DF, bias_D=None, a_RF=None, b_DR=None, segments=(), *,
    dropout_p=0.0, seed=None,
):  # fmt: skip
    acc = torch.promote_types(gate_up_T2F.dtype, torch.float32)
    bias_D = None if bias_D is None else bias_D.to(acc)
    y_TD = lora_linear_ref(
        swiglu_ref(gate_up_T2F.to(acc)), weight_DF.to(acc), bias_D, a_RF, b_DR, segments,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip
    return y_TD.to(gate_up_T2F.dtype)
