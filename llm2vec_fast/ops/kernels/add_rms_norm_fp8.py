"""Residual add, RMSNorm and row-wise e4m3 in one pass; the norm is never rounded to half precision.

T tokens, D model
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
def _forward(
    data, scale, summed, x, residual, weight, row_x, row_residual, eps, D, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(x + row * row_x + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + row * row_residual + column
        total = value + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(summed.dtype.element_ty)
        tl.store(summed + row * D + column, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm is that of the residual stream as it is stored
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, axis=0) / D + eps) * w
    store_quantized(data, scale, row, D, column, inside, value)


def forward(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 (T, D), fp32 (T, 1) and x + residual; x itself where there is no residual."""
    rows, width = x_TD.shape
    data, scale_T1 = empty_quantized(x_TD, rows, width)
    x, residual, summed, row_residual = as_rows(x_TD), None, None, 0
    if residual_TD is not None:
        residual, summed = as_rows(residual_TD), x_TD.new_empty(rows, width)
        row_residual = residual.stride(0)
    # Eight elements a thread: as many as it stores of the sum at once. With sixteen, which e4m3
    # would like, the sum goes through shared memory to find its threads, behind two more barriers.
    launch(
        _forward, (rows,), data, scale_T1, summed, x, residual, weight_D.contiguous(),
        x.stride(0), row_residual, eps, width, **row_options(width, elements=8),
    )  # fmt: skip
    return finished(data), scale_T1, x_TD if summed is None else summed
