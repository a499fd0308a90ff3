"""silu(gate) * up and its backward, one pass each.

T tokens (or any number of rows), F feed-forward
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import as_rows, launch, power_of_2


@triton.jit
def _forward(y, gate_up, row_gate_up, F, blocks, BLOCK: tl.constexpr):
    # One axis holds rows and blocks of columns: only the first axis of a grid may pass 65,535.
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)  # row * 2F passes 2^31 at 75,000 tokens of a 7B
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    at = gate_up + row * row_gate_up + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(y + row * F + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dgate_up, dy, gate_up, row_dy, row_gate_up, F, blocks,
    PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    at = gate_up + row * row_gate_up + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    d_at = dy + row * row_dy + column
    d = tl.load(d_at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    to = dgate_up + row * 2 * F + column
    kind = dgate_up.dtype.element_ty
    tl.store(to, (d * up * (s + silu * (1 - s))).to(kind), mask=inside)
    tl.store(to + F, (d * silu).to(kind), mask=inside)
    if PRODUCT:  # this program alone reads these elements of dy, and has read them
        tl.store(d_at, (silu * up).to(dy.dtype.element_ty), mask=inside)


def _grid(rows: int, F: int) -> tuple[tuple[int], int, dict]:
    """Grid, blocks a row, and block options: 8 elements (16 bytes of bf16) a thread."""
    block = min(1024, power_of_2(F))
    blocks = -(-F // block)
    return (rows * blocks,), blocks, {"BLOCK": block, "num_warps": max(1, block // 256)}


def forward(gate_up_T2F: Tensor) -> Tensor:
    """(..., 2F) -> (..., F); gate first, as `unpack_gate_up` reads it."""
    half = gate_up_T2F.shape[-1] // 2
    y_TF = gate_up_T2F.new_empty(*gate_up_T2F.shape[:-1], half)
    rows = as_rows(gate_up_T2F)
    grid, blocks, options = _grid(len(rows), half)
    launch(_forward, grid, y_TF, rows, rows.stride(0), half, blocks, **options)
    return y_TF


def backward(dy_TF: Tensor, gate_up_T2F: Tensor, product: bool = False) -> Tensor:
    """Gradient of gate and up, laid out as they are; nothing but gate_up has to be saved.

    product: writes silu(gate) * up over dy_TF, whose rows must be contiguous: who needs the product
             again (a weight's gradient) saves a pass over gate_up and the memory
    """
    half = dy_TF.shape[-1]
    dgate_up = torch.empty_like(gate_up_T2F, memory_format=torch.contiguous_format)
    dy, rows = as_rows(dy_TF), as_rows(gate_up_T2F)
    assert not product or dy is dy_TF, "the product would go into a copy"
    grid, blocks, options = _grid(len(rows), half)
    launch(_backward, grid, dgate_up, dy, rows, dy.stride(0), rows.stride(0), half, blocks,
           PRODUCT=product, **options)  # fmt: skip
    return dgate_up
