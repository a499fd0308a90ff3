"""Cross-entropy of the masked tokens through the language-model head (MNTP), without the logits.

T packed tokens, M masked rows, D model, V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops._compiled import registered
from llm2vec_fast.ops.backend import choose, kernels

_INDICES = (torch.int32, torch.int64)


def masked_token_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    rows_M: Tensor,
    targets_M: Tensor,
    *,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
) -> Tensor:
    """Sum over m of the cross-entropy of hidden[rows[m]] @ weight^T and targets[m], / num_items.

    hidden_TD:     (T, D) bf16, fp16 or fp32: final hidden states of the packed batch
    weight_VD:     (V, D) in the same dtype: the head; its gradient is computed only if it asks for
                   one (under LoRA it does not)
    rows_M:        (M,) int32 or int64: which token predicts. MNTP predicts token i + 1 from the
                   state of token i; that shift is the caller's. A row may stand there repeatedly
                   and in any order, its gradients add up; a row outside [0, T) fails on the device
    targets_M:     (M,) int32 or int64 in [0, V), or ignore_index: no loss, no gradient, though the
                   row's logits are computed. Any other value (unchecked: that would be a host
                   sync) makes loss and gradient NaN on a GPU; plain torch raises on the CPU
    num_items:     the divisor, a positive number or 0-d tensor (on the device: no host sync), such
                   as the count over all steps of gradient accumulation. By default M, which
                   counts ignored rows too, unlike the mean of F.cross_entropy
    returns:       0-d fp32 (fp64 for fp64); 0 with gradients of zero if M = 0
    raises:        ValueError on shapes, dtypes or devices that do not fit, on num_items <= 0
    source:        LLM2Vec, arXiv:2404.05961, section 2; chunks: Liger-Kernel, arXiv:2410.10989

    The Triton backend needs less than 300 MB beside the gathered states (M, D) and the gradients,
    whatever M is: chunks of rows whose logits, in the dtype of hidden (as in Hugging Face's models:
    softmax in fp32 over rounded logits), turn into their gradient in place. Gradients are computed
    in the forward and only scaled in the backward. Bitwise repeatable as far as torch.mm is.
    """
    _check(hidden_TD, weight_VD, rows_M, targets_M)
    rows = rows_M.shape[0]
    if rows == 0 or num_items is None:
        num_items = max(rows, 1)
    elif isinstance(num_items, Tensor):
        if num_items.dim():
            raise ValueError(f"masked_token_loss: num_items must be a number or 0-d tensor, "
                             f"got shape {tuple(num_items.shape)}")  # fmt: skip
        num_items = num_items.detach()
    elif not num_items > 0:
        raise ValueError(f"masked_token_loss: num_items must be positive, got {num_items}")
    run = _operator if torch.compiler.is_compiling() else _summed
    total = run(hidden_TD, weight_VD, rows_M, targets_M, ignore_index)
    return (total / num_items).to(total.dtype)


def _summed(hidden_TD, weight_VD, rows_M, targets_M, ignore_index):
    inputs = hidden_TD, weight_VD, rows_M, targets_M, ignore_index
    backend = choose("masked_token_loss", hidden_TD, weight_VD)
    if backend == "reference":
        return _summed_ref(*inputs)
    run = kernels("masked_token_loss", backend)
    # Inside forward() grad mode is off and needs_input_grad tells what the inputs ask for, not
    # whether anyone listens: under no_grad the gradient's GEMMs would run for nothing.
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad):
        return _MaskedTokenLoss.apply(*inputs, run)
    return run.forward(*inputs, False, False)[0].sum()


class _MaskedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, rows_M, targets_M, ignore_index, run):
        losses_M, dstates_MD, dweight_VD = run.forward(
            hidden_TD, weight_VD, rows_M, targets_M, ignore_index, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(dstates_MD, dweight_VD, rows_M)
        ctx.run, ctx.tokens = run, hidden_TD.shape[0]
        return losses_M.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        # The saved gradients are those of the sum; dloss has 1 / num_items and a loss scale in it,
        # in fp32 and on the device, so that nobody waits and nothing underflows before its time.
        dhidden_TD, dweight_VD = ctx.run.backward(dloss, *ctx.saved_tensors, ctx.tokens)
        return dhidden_TD, dweight_VD, None, None, None, None


def masked_token_loss_ref(
    hidden_TD, weight_VD, rows_M, targets_M, *, ignore_index=-100, num_items=None
):
    total = _summed_ref(hidden_TD, weight_VD, rows_M, targets_M, ignore_index)
    rows = rows_M.shape[0]
    return (total / (max(rows, 1) if rows == 0 or num_items is None else num_items)).to(total.dtype)


def _summed_ref(hidden_TD, weight_VD, rows_M, targets_M, ignore_index):
    acc = torch.promote_types(hidden_TD.dtype, torch.float32)
    logits_MV = F.linear(hidden_TD.index_select(0, rows_M).to(acc), weight_VD.to(acc))
    targets_M = targets_M.long()
    return F.cross_entropy(logits_MV, targets_M, ignore_index=ignore_index, reduction="sum")


def _check(hidden_TD, weight_VD, rows_M, targets_M) -> None:
    if hidden_TD.dim() != 2 or weight_VD.dim() != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"masked_token_loss: hidden must be (T, D) and weight (V, D), got "
            f"{tuple(hidden_TD.shape)} and {tuple(weight_VD.shape)}"
        )
    if hidden_TD.dtype != weight_VD.dtype or not hidden_TD.dtype.is_floating_point:
        raise ValueError(
            f"masked_token_loss: hidden and weight must have one floating dtype, got "
            f"{hidden_TD.dtype} and {weight_VD.dtype}"
        )
    if rows_M.dim() != 1 or rows_M.shape != targets_M.shape:
        raise ValueError(
            f"masked_token_loss: rows and targets must both be (M,), got "
            f"{tuple(rows_M.shape)} and {tuple(targets_M.shape)}"
        )
    if rows_M.dtype not in _INDICES or targets_M.dtype not in _INDICES:
        raise ValueError(
            f"masked_token_loss: rows and targets must be int32 or int64, got "
            f"{rows_M.dtype} and {targets_M.dtype}"
        )
    device = hidden_TD.device
    if not (weight_VD.device == rows_M.device == targets_M.device == device):
        raise ValueError(
            f"masked_token_loss: all tensors must be on one device, got hidden {device}, weight "
            f"{weight_VD.device}, rows {rows_M.device}, targets {targets_M.device}"
        )
    if weight_VD.shape[0] == 0 or (hidden_TD.shape[0] == 0 and rows_M.shape[0]):
        raise ValueError(
            f"masked_token_loss: {rows_M.shape[0]} rows of hidden {tuple(hidden_TD.shape)} and "
            f"weight {tuple(weight_VD.shape)}: T or V is 0"
        )


def _fake(hidden_TD, *_):
    return hidden_TD.new_empty((), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))


# Under torch.compile one node, whose backward runs the forward again: half as much work again, so
# a loop that compiles the model does better to leave the loss outside.
_operator = registered(
    "masked_token_loss",
    "(Tensor hidden, Tensor weight, Tensor rows, Tensor targets, int ignore_index) -> Tensor",
    _summed,
    _fake,
)
