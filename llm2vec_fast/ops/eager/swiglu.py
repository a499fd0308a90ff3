"""silu(gate) * up on the CPU.

T tokens, F feed-forward
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops.eager import blocks, scratch


def forward(gate_up_T2F: Tensor) -> Tensor:
    """(..., 2F) -> (..., F); gate first, as `unpack_gate_up` reads it."""
    half = gate_up_T2F.shape[-1] // 2
    y_TF = gate_up_T2F.new_empty(*gate_up_T2F.shape[:-1], half)
    rows, out = _rows(gate_up_T2F), _rows(y_TF)
    if rows.dtype == torch.float32:  # nothing to convert: the output itself is the scratch
        for at in blocks(len(rows), 3 * half):
            torch.ops.aten.silu.out(rows[at, :half], out=out[at]).mul_(rows[at, half:])
        return y_TF
    for at, (gate, up) in scratch(2, len(rows), half):
        F.silu(gate.copy_(rows[at, :half]), inplace=True)
        out[at] = gate.mul_(up.copy_(rows[at, half:]))
    return y_TF


def backward(dy_TF: Tensor, gate_up_T2F: Tensor, product: bool = False) -> Tensor:
    """Gradient of gate and up, laid out as they are; nothing but gate_up has to be saved.

    product: writes silu(gate) * up over dy_TF, whose rows must be contiguous: who needs the product
             again (a weight's gradient) saves a pass over gate_up and the memory
    """
    half = dy_TF.shape[-1]
    dgate_up = torch.empty_like(gate_up_T2F, memory_format=torch.contiguous_format)
    dy, rows, into = _rows(dy_TF), _rows(gate_up_T2F), _rows(dgate_up)
    assert not product or dy.data_ptr() == dy_TF.data_ptr(), "the product would go into a copy"
    for at, (silu, up, slope, sigmoid, work) in scratch(5, len(rows), half):
        torch.sigmoid(silu.copy_(rows[at, :half]), out=sigmoid)
        silu.mul_(sigmoid)
        up.copy_(rows[at, half:])
        slope.copy_(dy[at])
        into[at, half:] = torch.mul(slope, silu, out=work)
        # d silu / d gate = sigmoid + silu (1 - sigmoid)
        sigmoid.addcmul_(silu, torch.neg(sigmoid, out=work).add_(1))
        into[at, :half] = slope.mul_(up).mul_(sigmoid)
        if product:
            dy[at] = silu.mul_(up)
    return dgate_up


def _rows(x: Tensor) -> Tensor:
    D = x.shape[-1]
    return x.reshape(x.numel() // max(D, 1), D)
