"""LoRA's products with dropout made on the fly: no mask and no dropped input is ever stored.

`keep` decides about an element from (seed, segment, row, column) alone, so that the backward pass
and a recomputed forward pass see the same mask. `ops.lora_linear.keep_mask` is the same arithmetic
in plain torch.

T tokens, D in features, R rank of all segments together, P partial sums
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import as_rows, launch, power_of_2

GOLDEN = tl.constexpr(0x9E3779B9)
MIX_1, MIX_2 = tl.constexpr(0x85EBCA6B), tl.constexpr(0xC2B2AE35)
# Their values differ from call to call and must not lead to new compilations.
PLAIN = ["seed_0", "seed_1", "threshold"]


@triton.jit
def _mix(h):
    # The finaliser of MurmurHash3: every bit of the result depends on every bit of h.
    h ^= h >> 16
    h *= MIX_1
    h ^= h >> 13
    h *= MIX_2
    return h ^ (h >> 16)


@triton.jit
def _keep(row, column, segment, seed_0, seed_1, threshold):
    # 64 key bits a row, so that no two rows share a sequence; then one short mix an element.
    first = _mix(seed_1.to(tl.uint32) + segment.to(tl.uint32) * GOLDEN)
    first = _mix(seed_0.to(tl.uint32) ^ first)
    second = _mix(first + GOLDEN)
    row = row.to(tl.uint32)
    h = _mix(first ^ row)[:, None] + (column.to(tl.uint32) * GOLDEN)[None, :]
    h ^= h >> 16
    h *= MIX_1
    h ^= (h >> 13) ^ _mix(second + row)[:, None]
    h *= MIX_2
    return (h >> 1).to(tl.int32) >= threshold


@triton.jit
def _segment(number, SEGMENTS: tl.constexpr):
    # (index for the mask, first and last + 1 column of u) of one of the segments
    index, start, end = number * 0, number * 0, number * 0
    for n in tl.static_range(len(SEGMENTS)):
        index = tl.where(number == n, SEGMENTS[n][0], index)
        start = tl.where(number == n, SEGMENTS[n][1], start)
        end = tl.where(number == n, SEGMENTS[n][2], end)
    return index, start, end


@triton.jit(do_not_specialize=PLAIN)
def _down(
    u, x, a, row_x, T, D, R, seed_0, seed_1, threshold, grow,
    SEGMENTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Programs of the same rows and different segments are neighbours: x comes from L2 but once.
    program = tl.program_id(0)
    index, start, end = _segment(program % len(SEGMENTS), SEGMENTS)
    row = program // len(SEGMENTS) * ROWS + tl.arange(0, ROWS)
    rank = start + tl.arange(0, RANK)
    x += row.to(tl.int64)[:, None] * row_x
    a += rank.to(tl.int64)[:, None] * D
    acc = tl.zeros([ROWS, RANK], tl.float32)
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < D)[None, :]
        x_TD = tl.load(x + column[None, :], mask=(row < T)[:, None] & inside, other=0.0)
        a_RD = tl.load(a + column[None, :], mask=(rank < end)[:, None] & inside, other=0.0)
        keep = _keep(row, column, index, seed_0, seed_1, threshold)
        x_TD = tl.where(keep, x_TD, 0.0).to(x_TD.dtype)
        acc = tl.dot(x_TD, tl.trans(a_RD), acc, input_precision="ieee")
    at = u + row.to(tl.int64)[:, None] * R + rank[None, :]
    inside = (row < T)[:, None] & (rank < end)[None, :]
    tl.store(at, (acc * grow).to(u.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def _add_dx(
    dx, du, a, T, D, R, blocks, seed_0, seed_1, threshold, grow,
    SEGMENTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    at = dx + row.to(tl.int64)[:, None] * D + column[None, :]
    inside = (row < T)[:, None] & (column < D)[None, :]
    acc = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for n in tl.static_range(len(SEGMENTS)):
        index, start, end = _segment(program * 0 + n, SEGMENTS)
        rank = start + tl.arange(0, RANK)
        du_TR = tl.load(du + row.to(tl.int64)[:, None] * R + rank[None, :],
                        mask=(row < T)[:, None] & (rank < end)[None, :], other=0.0)  # fmt: skip
        a_RD = tl.load(a + rank.to(tl.int64)[:, None] * D + column[None, :],
                       mask=(rank < end)[:, None] & (column < D)[None, :], other=0.0)  # fmt: skip
        update = tl.dot(du_TR, a_RD, input_precision="ieee")
        keep = _keep(row, column, index, seed_0, seed_1, threshold)
        acc += tl.where(keep, update * grow, 0.0)
    tl.store(at, acc.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def _da(
    partial, du, x, row_x, T, D, R, blocks, tokens, seed_0, seed_1, threshold, grow,
    SEGMENTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index, start, end = _segment(program % len(SEGMENTS), SEGMENTS)
    program = program // len(SEGMENTS)
    part = program // blocks
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    rank = start + tl.arange(0, RANK)
    acc = tl.zeros([RANK, COLUMNS], tl.float32)
    for done in range(0, tokens, ROWS):
        row = part * tokens + done + tl.arange(0, ROWS)
        x_TD = tl.load(x + row.to(tl.int64)[:, None] * row_x + column[None, :],
                       mask=(row < T)[:, None] & (column < D)[None, :], other=0.0)  # fmt: skip
        du_TR = tl.load(du + row.to(tl.int64)[:, None] * R + rank[None, :],
                        mask=(row < T)[:, None] & (rank < end)[None, :], other=0.0)  # fmt: skip
        keep = _keep(row, column, index, seed_0, seed_1, threshold)
        x_TD = tl.where(keep, x_TD, 0.0).to(x_TD.dtype)
        acc = tl.dot(tl.trans(du_TR), x_TD, acc, input_precision="ieee")
    at = partial + (part.to(tl.int64) * R + rank)[:, None] * D + column[None, :]
    tl.store(at, acc * grow, mask=(rank < end)[:, None] & (column < D)[None, :])


def halves(seed: int) -> tuple[int, int]:
    """62 bits of the seed as two numbers that are int32 to every compiler."""
    return seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF


def _dropout(drop) -> tuple[int, int, int, float]:
    return *halves(drop.seed), round(drop.p * 2**31), 1 / (1 - drop.p)


def _tile(segments: tuple, columns: int = 64) -> dict:
    """segments: (index, r0, r1) of each; a matrix instruction has 16 ranks at least."""
    rank = max(16, power_of_2(max(r1 - r0 for _, r0, r1 in segments)))
    columns = min(columns, max(16, 8192 // rank))  # shared memory grows with the rank
    return {"SEGMENTS": segments, "RANK": rank, "ROWS": 64, "COLUMNS": columns, "num_warps": 4}


def masks(x_TD: Tensor, segments: tuple, drop) -> None:
    """Nothing to keep: masks are made where they are applied."""


def down(x_TD: Tensor, a_RD: Tensor, segments: tuple, drop) -> Tensor:
    """u (T, R): drop(x) A^T, with a mask of its own for the ranks of each segment."""
    (T, D), R = x_TD.shape, len(a_RD)
    u_TR = x_TD.new_empty(T, R)
    x, a = as_rows(x_TD), a_RD.contiguous()
    options = _tile(segments)
    grid = (-(-T // 64) * len(segments),)
    launch(_down, grid, u_TR, x, a, x.stride(0), T, D, R, *_dropout(drop), **options)
    return u_TR


def add_dx_(dx_TD: Tensor, du_TR: Tensor, a_RD: Tensor, segments: tuple, drop):
    """dx += mask * (du A) / (1 - p), the sum of all segments in one pass over dx."""
    (T, D), R = dx_TD.shape, len(a_RD)
    assert dx_TD.is_contiguous() and du_TR.is_contiguous()
    options = _tile(segments)
    blocks = -(-D // options["COLUMNS"])
    launch(_add_dx, (-(-T // 64) * blocks,), dx_TD, du_TR, a_RD.contiguous(), T, D, R, blocks,
           *_dropout(drop), **options)  # fmt: skip


def da(du_TR: Tensor, x_TD: Tensor, segments: tuple, drop) -> Tensor:
    """dA (R, D) fp32: du^T drop(x); rows that no segment has are zero."""
    (T, D), R = x_TD.shape, du_TR.shape[1]
    assert du_TR.is_contiguous()
    x = as_rows(x_TD)
    # fp32 goes through no matrix unit, and needs more registers for the same tile.
    options = _tile(segments, 128 if x.element_size() == 2 else 32)
    blocks = -(-D // options["COLUMNS"])
    tiles = -(-T // 64)
    # Enough parts to fill a GPU: about 512 programs.
    per_part = max(1, tiles * blocks * len(segments) // 512)
    parts = -(-tiles // per_part)
    whole = sum(r1 - r0 for _, r0, r1 in segments) == R
    partial_PRD = (x.new_empty if whole else x.new_zeros)(parts, R, D, dtype=torch.float32)
    grid = (parts * blocks * len(segments),)
    launch(_da, grid, partial_PRD, du_TR, x, x.stride(0), T, D, R, blocks, 64 * per_part,
           *_dropout(drop), **options)  # fmt: skip
    return partial_PRD.sum(0)
