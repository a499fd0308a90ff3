"""silu(gate) * up, quantised row by row: one read of gate and up, one write of a byte an element.

T tokens, F feed-forward
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import as_rows, launch
from llm2vec_fast.ops.kernels.quantize_rows import (
    empty_quantized,
    finished,
    row_options,
    store_quantized,
)


@triton.jit
def _forward(data, scale, gate_up, row_gate_up, F, BLOCK: tl.constexpr):
    # The products of a whole row wait in registers for the largest of them. Reading gate and up a
    # second time would come from L2, but sigmoids are what a second pass would have to pay for.
    row = tl.program_id(0).to(tl.int64)  # row * 2F passes 2^31 at 75,000 tokens of a 7B
    column = tl.arange(0, BLOCK)
    inside = column < F
    at = gate_up + row * row_gate_up + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    store_quantized(data, scale, row, F, column, inside, gate * tl.sigmoid(gate) * up)


def forward(gate_up_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 2F) -> e4m3 (T, F), fp32 (T, 1); gate first, as `unpack_gate_up` reads it."""
    rows, half = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    gate_up_T2F = as_rows(gate_up_T2F)
    data, scale_T1 = empty_quantized(gate_up_T2F, rows, half)
    launch(
        _forward, (rows,), data, scale_T1, gate_up_T2F, gate_up_T2F.stride(0), half,
        **row_options(half),
    )  # fmt: skip
    return finished(data), scale_T1
