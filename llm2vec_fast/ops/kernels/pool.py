"""Sums over spans, their L2 norms, and the way back to the tokens.

A text's tokens are cut into slices of SLICE, each slice is summed in one fixed order, and the
slices of a text are added in their order. So the bits of a vector depend on its own tokens alone,
whether one program walks through a text (many texts) or each slice has one (few, long texts).

T tokens, B texts, D model, S slices of all texts (an upper bound: lengths live on the device)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import as_rows, launch, power_of_2

SLICE = 256
WIDE = 128  # texts that one round of a search asks for
FULL = 1024  # programs that fill a GPU: from here on one program takes a whole text
LAST = tl.constexpr(2**31 - 1)  # begins after every token
TINY = tl.constexpr(1e-12)  # torch.nn.functional.normalize's eps


@triton.jit
def _text_of(spans, B, wanted, SLICES: tl.constexpr, WIDE: tl.constexpr):
    # The last text whose first token, or with SLICES > 1 whose first slice, is not after `wanted`;
    # -1 if there is none. Each round asks for WIDE texts at once: one round up to WIDE texts.
    low = B * 0 - 1
    high = B + 0
    while high - low > 1:
        step = (high - low - 2) // WIDE + 1
        text = low + step * (1 + tl.arange(0, WIDE))
        start = tl.load(spans + 2 * text, mask=text < high, other=0).to(tl.int32)
        at = start
        if SLICES > 1:
            at = text + start // SLICES  # ascends by at least a text's slices: no number is shared
        low += step * tl.sum(((text < high) & (at <= wanted)).to(tl.int32))
        high = tl.minimum(high, low + step)
    return low


@triton.jit
def _span(spans, text, MODE: tl.constexpr):
    start = tl.load(spans + 2 * text).to(tl.int32)
    end = tl.load(spans + 2 * text + 1).to(tl.int32)
    if MODE == "last":
        start = tl.maximum(start, end - 1)
    if MODE == "first":
        end = tl.minimum(end, start + 1)
    return start, tl.maximum(end, start)


@triton.jit
def _slice_sum(
    hidden, row_hidden, start, count, skipped, column, D,
    WEIGHTED: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Unrolled: the loads of all tiles are under way together. Tiles past the end load nothing.
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.static_range(SLICE // ROWS):
        token = skipped + tile * ROWS + tl.arange(0, ROWS)
        at = hidden + (start + token).to(tl.int64)[:, None] * row_hidden + column[None, :]
        inside = (token < count)[:, None] & (column < D)[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            x *= (token + 1).to(tl.float32)[:, None]
        sums += x
    return tl.sum(sums, 0)


@triton.jit
def _weights(count, MODE: tl.constexpr):
    total = tl.maximum(count, 1).to(tl.float32)  # no tokens: the zero vector
    if MODE == "weighted_mean":
        total *= 0.5 * (tl.maximum(count, 1) + 1).to(tl.float32)
    return total


@triton.jit
def _texts(
    y, hidden, spans, row_hidden, D, blocks,
    MODE: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    text = program // blocks
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    start, end = _span(spans, text, MODE)
    count = end - start
    sums = tl.zeros([COLUMNS], tl.float32)
    skipped = count * 0
    while skipped < count:
        sums += _slice_sum(
            hidden, row_hidden, start, count, skipped, column, D,
            MODE == "weighted_mean", SLICE, ROWS, COLUMNS,
        )  # fmt: skip
        skipped += SLICE
    at = y + text.to(tl.int64) * D + column
    tl.store(at, sums / _weights(count, MODE), mask=column < D)


@triton.jit
def _slices(
    sums, hidden, spans, row_hidden, B, D, blocks,
    MODE: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    number = program // blocks
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    text = _text_of(spans, B, number, SLICE, WIDE)
    if text >= 0:
        start, end = _span(spans, text, MODE)
        skipped = (number - text - start // SLICE) * SLICE
        if skipped < end - start:  # some numbers belong to no slice
            total = _slice_sum(
                hidden, row_hidden, start, end - start, skipped, column, D,
                MODE == "weighted_mean", SLICE, ROWS, COLUMNS,
            )  # fmt: skip
            tl.store(sums + number.to(tl.int64) * D + column, total, mask=column < D)


@triton.jit
def _finish(
    y, sums, spans, D, blocks, MODE: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr
):
    program = tl.program_id(0)
    text = program // blocks
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    start, end = _span(spans, text, MODE)
    at = sums + (text + start // SLICE).to(tl.int64) * D + column
    total = tl.zeros([COLUMNS], tl.float32)
    skipped = start * 0
    while skipped < end - start:
        total += tl.load(at, mask=column < D, other=0.0)
        at += D
        skipped += SLICE
    to = y + text.to(tl.int64) * D + column
    tl.store(to, total / _weights(end - start, MODE), mask=column < D)


@triton.jit
def _normalise(y, norm, D, BLOCK: tl.constexpr):
    text = tl.program_id(0)
    row = y + text.to(tl.int64) * D
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        v = tl.load(row + column, mask=column < D, other=0.0)
        squares += v * v
    length = tl.sqrt(tl.sum(squares, 0))
    tl.store(norm + text, length)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        v = tl.load(row + column, mask=column < D, other=0.0)
        tl.store(row + column, v / tl.maximum(length, TINY), mask=column < D)


@triton.jit
def _unnormalise(dpooled, dy, y, norm, D, BLOCK: tl.constexpr):
    text = tl.program_id(0)
    row = text.to(tl.int64) * D
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        d = tl.load(dy + row + column, mask=column < D, other=0.0)
        products += d * tl.load(y + row + column, mask=column < D, other=0.0)
    length = tl.load(norm + text)
    # Below the clamp the vector is only scaled: nothing flows through its length.
    along = tl.where(length >= TINY, tl.sum(products, 0), 0.0)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        d = tl.load(dy + row + column, mask=column < D, other=0.0)
        d -= along * tl.load(y + row + column, mask=column < D, other=0.0)
        tl.store(dpooled + row + column, d / tl.maximum(length, TINY), mask=column < D)


@triton.jit
def _spread(
    dhidden, dpooled, spans, T, B, D, blocks,
    MODE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Every element is written once, zeros between the spans too.
    program = tl.program_id(0)
    first = program // blocks * ROWS
    row = first + tl.arange(0, ROWS)
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.zeros([ROWS, COLUMNS], tl.float32)
    text = tl.maximum(_text_of(spans, B, first, 1, WIDE), 0)
    begin = tl.load(spans + 2 * text, mask=text < B, other=LAST).to(tl.int32)
    while begin < first + ROWS:
        start, end = _span(spans, text, MODE)
        d = tl.load(dpooled + text.to(tl.int64) * D + column, mask=column < D, other=0.0)
        weight = tl.full([ROWS], 1.0, tl.float32)
        if MODE == "weighted_mean":
            weight = (row - start + 1).to(tl.float32)
        weight /= _weights(end - start, MODE)
        inside = (row >= start) & (row < end)
        value = tl.where(inside[:, None], weight[:, None] * d[None, :], value)
        text += 1
        begin = tl.load(spans + 2 * text, mask=text < B, other=LAST).to(tl.int32)
    at = dhidden + row.to(tl.int64)[:, None] * D + column[None, :]
    inside = (row < T)[:, None] & (column < D)[None, :]
    tl.store(at, value.to(dhidden.dtype.element_ty), mask=inside)


def _columns(D: int, most: int) -> tuple[int, int]:
    """Columns of a program, and programs a row."""
    columns = min(most, power_of_2(D))
    return columns, -(-D // columns)


def _row_options(D: int) -> dict:
    block = min(4096, power_of_2(D))
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 512))}


def forward(
    hidden_TD: Tensor, spans_B2: Tensor, mode: str, normalize: bool, slices: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """(B, D) fp32 and, if normalised, the norms (B,).

    slices: one program a slice and not a text; by default where whole texts do not fill a GPU
    """
    (T, D), B = hidden_TD.shape, len(spans_B2)
    hidden, spans = as_rows(hidden_TD), spans_B2.contiguous()
    y_BD = hidden_TD.new_empty(B, D, dtype=torch.float32)
    # 64 columns of bf16 are one line of 128 bytes
    columns, blocks = _columns(D, 64)
    tile = {"SLICE": SLICE, "ROWS": 64, "COLUMNS": columns, "num_warps": 4}
    if slices is None:
        slices = B * blocks < FULL and T > SLICE
    if slices and mode in ("mean", "weighted_mean"):
        S = (
            B + T // SLICE if B else 0
        )  # at most: text b's slices begin at number b + start // SLICE
        sums_SD = hidden_TD.new_empty(S, D, dtype=torch.float32)
        launch(_slices, (S * blocks,), sums_SD, hidden, spans, hidden.stride(0), B, D, blocks,
               MODE=mode, WIDE=WIDE, **tile)  # fmt: skip
        columns, blocks = _columns(D, 256)
        launch(_finish, (B * blocks,), y_BD, sums_SD, spans, D, blocks,
               MODE=mode, SLICE=SLICE, COLUMNS=columns, num_warps=2)  # fmt: skip
    else:
        launch(_texts, (B * blocks,), y_BD, hidden, spans, hidden.stride(0), D, blocks,
               MODE=mode, **tile)  # fmt: skip
    if not normalize:
        return y_BD, None
    norm_B = y_BD.new_empty(B)
    launch(_normalise, (B,), y_BD, norm_B, D, **_row_options(D))
    return y_BD, norm_B


def backward(
    dy_BD: Tensor, spans_B2: Tensor, y_BD: Tensor | None, norm_B: Tensor | None,
    tokens: int, dtype: torch.dtype, mode: str,
) -> Tensor:  # fmt: skip
    """(T, D) gradient of the hidden states in `dtype`; y_BD and norm_B if it was normalised."""
    B, D = dy_BD.shape
    dpooled = dy_BD.contiguous()
    if norm_B is not None:
        dy, dpooled = dpooled, dpooled.new_empty(B, D)
        launch(_unnormalise, (B,), dpooled, dy, y_BD, norm_B, D, **_row_options(D))
    dhidden_TD = dy_BD.new_empty(tokens, D, dtype=dtype)
    columns, blocks = _columns(D, 128)
    launch(_spread, (-(-tokens // 32) * blocks,), dhidden_TD, dpooled, spans_B2.contiguous(),
           tokens, B, D, blocks, MODE=mode, ROWS=32, COLUMNS=columns,
           WIDE=WIDE, num_warps=4)  # fmt: skip
    return dhidden_TD
