"""Residual add and RMSNorm, forward and backward, one pass each.

T tokens, N heads (1 unless rows lie at two strides), D width of a row; a row is one (token, head)

A row is held in registers from its load to its store, so D is bounded by what a program can hold
(16,384 and a little more). Narrow rows, the heads of a query/key norm, share a program.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.backend import arch_of
from llm2vec_fast.ops.kernels.launch import launch, power_of_2

# Streaming multiprocessors of the largest GPU of an architecture: A100, A40, L40, H100/H200, B200,
# RTX 5090. Asking the device would cost more than a wrong guess does.
_PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 170}


@triton.jit
def _at(row, N, stride_t, stride_n):
    # In int64: a row's offset passes 2^31 at 524,288 tokens of a 7B, sooner in fused projections.
    return ((row // N).to(tl.int64) * stride_t + (row % N).to(tl.int64) * stride_n)[:, None]


@triton.jit
def _forward(
    y, r, rstd, x, residual, weight, rows, N, x_t, x_n, residual_t, residual_n, D, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < D)
    to = row.to(tl.int64)[:, None] * D + column
    value = tl.load(x + _at(row, N, x_t, x_n) + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + _at(row, N, residual_t, residual_n) + column
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        # The norm sees the rounded residual stream, as the layers after it will.
        rounded = value.to(r.dtype.element_ty)
        tl.store(r + to, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)
    if rstd is not None:
        tl.store(rstd + row, inverse, mask=row < rows)
    tl.store(y + to, (value * inverse[:, None] * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    dy, dr, r, scale, rstd, dx, row, rows, N, dy_t, dy_n, dr_t, dr_n, r_t, r_n, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores dx of these rows (unless it is None) and returns what they add to dweight."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < D)
    inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
    slope = tl.load(dy + _at(row, N, dy_t, dy_n) + column, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(r + _at(row, N, r_t, r_n) + column, mask=inside, other=0.0).to(tl.float32)
    norm *= inverse
    if dx is not None:
        if dr is not None:  # asked for before the sum below makes everything wait
            at = dr + _at(row, N, dr_t, dr_n) + column
            beside = tl.load(at, mask=inside, other=0.0)
        scaled = slope * scale
        along = tl.sum(scaled * norm, axis=1)[:, None] / D
        value = (scaled - norm * along) * inverse
        if dr is not None:
            value += beside.to(tl.float32)
        to = row.to(tl.int64)[:, None] * D + column
        tl.store(dx + to, value.to(dx.dtype.element_ty), mask=inside)
    return slope * norm


@triton.jit
def _backward(
    dy, dr, r, weight, rstd, dx, partial, rows, N, dy_t, dy_n, dr_t, dr_n, r_t, r_n, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    if partial is None:  # a frozen weight: one step for each program, all at once
        row = first + tl.arange(0, ROWS)
        _gradient(
            dy, dr, r, scale, rstd, dx, row, rows, N, dy_t, dy_n, dr_t, dr_n, r_t, r_n, D, BLOCK
        )
    else:  # few programs that stay, each with its own sum over every so many rows
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        while first < rows:
            row = first + tl.arange(0, ROWS)
            total += _gradient(
                dy, dr, r, scale, rstd, dx, row, rows, N, dy_t, dy_n, dr_t, dr_n, r_t, r_n, D, BLOCK
            )
            first += tl.num_programs(0) * ROWS
        to = partial + tl.program_id(0) * D + column
        tl.store(to, tl.sum(total, axis=0)[None, :], mask=column < D)


@functools.cache
def _tile(D: int) -> dict:
    """Rows and columns of a program, 16 elements a thread: two 16-byte loads of bf16 each."""
    block = power_of_2(D)
    rows = min(32, max(1, 2048 // block))
    warps = min(32 if block > 8192 else 16, max(1, rows * block // 512))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def _stayers(device: torch.device, block: int) -> int:
    """Programs of a backward that sums up dweight: as many as are resident at a time, by the about
    120 registers a thread that it takes.
    """
    return _PROCESSORS.get(arch_of(device), 128) * max(1, 8192 // max(block, 2048))


def _heads(*tensors: Tensor | None) -> int:
    """The N that walks all these tensors of one shape: that of a (T, N, D) view, else 1."""
    for x in tensors:
        if x is not None and x.dim() == 3 and not x.is_contiguous():
            return x.shape[1]
    return 1


def _walked(x: Tensor, N: int) -> tuple[Tensor, int, int]:
    """(x, stride of t, stride of n) for rows t * N + n; copied only if strides ask for it."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x, N * width, width
    if x.stride(-1) == 1 and (x.dim() == 3 or (x.dim() == 2 and N == 1)):
        return x, x.stride(0), x.stride(1) if x.dim() == 3 else 0
    return x.contiguous(), N * width, width


def forward(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, r, rstd) of (..., D) inputs; r is None without a residual, rstd unless it is to be saved.

    rstd is fp32, one for each row.
    """
    D = x.shape[-1]
    rows = x.numel() // max(D, 1)
    y, r, at = x.new_empty(x.shape), None, (0, 0)
    N = _heads(x, residual)
    if residual is not None:
        r = x.new_empty(x.shape)
        residual, *at = _walked(residual, N)
    rstd = x.new_empty(rows, dtype=torch.float32) if save else None
    x, *x_at = _walked(x, N)
    tile = _tile(D)
    launch(
        _forward, (-(-rows // tile["ROWS"]),), y, r, rstd, x, residual, weight_D.contiguous(), rows,
        N, *x_at, *at, D, float(eps), **tile,
    )  # fmt: skip
    return y, r, rstd


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

    dx holds for x and for the residual alike. dweight is a sum in a fixed order of at most a few
    hundred partial sums.
    """
    D = r.shape[-1]
    rows = rstd.shape[0]
    N = _heads(dy, dr, r)
    dx = r.new_empty(r.shape) if want_dx else None
    dy, *dy_at = _walked(dy, N)
    r, *r_at = _walked(r, N)
    dr_at = (0, 0)
    if dr is not None:
        dr, *dr_at = _walked(dr, N)
    tile = _tile(D)
    programs, partial = -(-rows // tile["ROWS"]), None
    if want_dweight:
        programs = min(programs, _stayers(r.device, tile["BLOCK"]))
        partial = r.new_empty(programs, D, dtype=torch.float32)
    launch(
        _backward, (programs,), dy, dr, r, weight_D.contiguous(), rstd, dx, partial, rows, N,
        *dy_at, *dr_at, *r_at, D, **tile,
    )  # fmt: skip
    return dx, None if partial is None else partial.sum(0).to(weight_D.dtype)
