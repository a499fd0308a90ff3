"""Rows to e4m3 with a scale each, one pass: a program has one row and holds it in registers.

T tokens or output features, D columns
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import as_rows, launch, power_of_2


@triton.jit
def row_scale(value):
    """Largest |value| / 448, as quantize_rows_ref has it. NaN in any lane gives NaN."""
    # As integers magnitudes keep their order and NaN stands above infinity: this maximum cannot
    # lose a NaN, which a maximum of floats does.
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(magnitude, axis=0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, 448.0)
    # 2^-126: the quotient by a denormal scale would overflow, by one flushed to zero be infinite.
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    return tl.where(largest == 0.0, 1.0, scale)


@triton.jit
def store_quantized(data, scale, row, width, column, inside, value):
    """Writes a row's scale and value / scale, rounded to nearest even by the cast (saturating)."""
    row_s = row_scale(value)
    tl.store(scale + row, row_s)
    # One division a row instead of one an element, which would not hide behind the loads; the
    # product is within two ulp of fp32 of the quotient, where e4m3 has 20 bits fewer.
    quotient = value * tl.div_rn(1.0, row_s)
    at = data + row * width + column
    tl.store(at, quotient.to(data.dtype.element_ty), mask=inside)


@triton.jit
def _forward(data, scale, x, row_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * row_x + column, mask=inside, other=0.0).to(tl.float32)
    store_quantized(data, scale, row, width, column, inside, value)


def row_options(width: int, elements: int = 16) -> dict:
    """Block options of a program that has a whole row, `elements` a thread while warps suffice.

    Sixteen are two loads of 16 bytes and one store of 16 bytes of e4m3.
    """
    block = power_of_2(width)
    most = 32 if block > 16_384 else 16
    return {"BLOCK": block, "num_warps": max(1, min(most, block // (32 * elements)))}


def empty_quantized(like: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """(data, scale_T1) to be filled. On the CPU runs the interpreter, whose cast to e4m3 truncates
    and knows no saturation: there a kernel stores fp32, and `finished` rounds it.
    """
    kind = torch.float32 if like.device.type == "cpu" else torch.float8_e4m3fn
    return like.new_empty(rows, width, dtype=kind), like.new_empty(rows, 1, dtype=torch.float32)


def finished(data: Tensor) -> Tensor:
    return data if data.dtype == torch.float8_e4m3fn else data.to(torch.float8_e4m3fn)


def forward(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(T, D) -> e4m3 (T, D), fp32 (T, 1)"""
    rows, width = x_TD.shape
    x_TD = as_rows(x_TD)
    data, scale_T1 = empty_quantized(x_TD, rows, width)
    launch(_forward, (rows,), data, scale_T1, x_TD, x_TD.stride(0), width, **row_options(width))
    return finished(data), scale_T1
