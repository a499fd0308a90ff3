"""Attention over packed texts, forward; what the backward shares with it stands here too.

T tokens, B texts, N query heads, K kv heads, H head dim

A program is one block of queries of one text and head. The grid has T // BLOCK + B blocks a head,
which is enough whatever the lengths are: text b owns the blocks from cu_seqlens[b] // BLOCK + b on,
at most one of them without a row. Every program finds its text there itself, so the launch needs no
length from the device, and one long text among short ones costs nothing.

Scores are kept in units of log 2: exp2 is what the hardware has.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.backend import arch_of
from llm2vec_fast.ops.kernels.launch import launch, power_of_2

FAR = 1 << 30  # a window that hides nothing
LOG2E = 1.4426950408889634
# Whatever changes from batch to batch must not compile a kernel anew.
VARYING = {
    "do_not_specialize": ["texts", "blocks", "T", "left", "right", "seed", "limit"],
    "do_not_specialize_on_alignment": ["cu_seqlens"],  # lies behind a batch's ids and positions
}


@triton.jit
def find_block(cu_seqlens, texts, block, BLOCK: tl.constexpr):
    """(first row of the text, its length, first position of the block in it) of one block."""
    SEARCH: tl.constexpr = 256
    before = tl.zeros((SEARCH,), tl.int32)
    for first in range(0, texts, SEARCH):
        text = first + tl.arange(0, SEARCH)
        row = tl.load(cu_seqlens + text, mask=text < texts, other=0)
        before += ((row // BLOCK + text <= block) & (text < texts)).to(tl.int32)
    text = tl.sum(before, 0) - 1
    start = tl.load(cu_seqlens + text)
    length = tl.load(cu_seqlens + text + 1) - start
    return start, length, (block - start // BLOCK - text) * BLOCK


@triton.jit
def seen_range(at, length, left, right, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Which positions the block at `at` meets, if each meets those from `left` before itself to
    `right` after: [lowest, all_from) in part, [all_from, all_to) all of them, [all_to, highest) in
    part. The inner bounds are multiples of STEP.
    """
    lowest = tl.maximum(at - left, 0) // STEP * STEP
    highest = tl.minimum(at + BLOCK + right, length)
    all_to = tl.minimum(at + right + 1, length) // STEP * STEP
    all_from = (tl.maximum(at + BLOCK - 1 - left, 0) + STEP - 1) // STEP * STEP
    all_from = tl.minimum(tl.maximum(all_from, lowest), (highest + STEP - 1) // STEP * STEP)
    return lowest, all_from, tl.maximum(all_to, all_from), highest


@triton.jit
def load_rows(at, row, bound, stride, column, MASK: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """(rows, W) of a matrix with H <= W columns; rows from `bound` on and missing columns are 0."""
    to = at + row[:, None] * stride + column[None, :]
    if MASK:
        if H == W:
            return tl.load(to, mask=(row < bound)[:, None], other=0.0)
        else:
            return tl.load(to, mask=(row < bound)[:, None] & (column < H)[None, :], other=0.0)
    else:
        if H == W:
            return tl.load(to)
        else:
            return tl.load(to, mask=(column < H)[None, :], other=0.0)


@triton.jit
def is_seen(query, key, length, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether each query may see each key; the arguments broadcast against each other."""
    seen = (key < length) & (query < length)
    if LEFT:
        seen = seen & (key >= query - left)
    if RIGHT:
        seen = seen & (key <= query + right)
    return seen


@triton.jit
def random_words(seed, head, row, KIND: tl.constexpr):
    """Two random words for each row of the batch: as a query (KIND 0) or as a key (KIND 1)."""
    zero = row * 0
    # Seven rounds are the fewest that pass BigCrush (Salmon et al. 2011).
    one, two, _, _ = tl.philox(seed, row, zero + head, zero + KIND, zero, n_rounds=7)
    return one, two


@triton.jit
def is_kept(query_one, query_two, key_one, key_two, limit):
    """Whether dropout keeps a pair, from the words of its query and its key.

    Philox runs once a row, not once a pair (that would cost more than the matrix products);
    a pair only mixes the four words. So the mask depends on seed, head, query and key alone, never
    on block sizes, and a transposed block gives the transposed mask.
    """
    x = (query_one ^ key_one) * 0x9E3779B1
    x = ((x ^ (x >> 16)) + (query_two ^ key_two)) * 0x85EBCA6B
    x = (x ^ (x >> 15)) * 0xC2B2AE35
    return (x >> 1).to(tl.int32) >= limit


@triton.jit
def _meet(
    acc, top, total, q, k, v, k_row, v_row, first, at, length, left, right, scale,
    words_one, words_two, seed, head, start, limit,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of keys enters the running softmax (top, total) and the weighted sum acc."""
    row, column = tl.arange(0, KEYS), tl.arange(0, W)
    k_block = k + tl.cast(first, tl.int64) * k_row
    v_block = v + tl.cast(first, tl.int64) * v_row
    keys = load_rows(k_block, row, length - first, k_row, column, MASK, H, W)
    score = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if MASK:
        query = at + tl.arange(0, QUERIES)
        seen = is_seen(
            query[:, None], (first + row)[None, :], length, left, right, LEFT, RIGHT
        )  # fmt: skip
        score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    if MASK:  # a query that has seen no key yet: exp2(-inf - -inf) would be NaN
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        base = new_top
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weight, 1)
    if DROPOUT:
        one, two = random_words(seed, head, start + first + row, 1)
        kept = is_kept(words_one[:, None], words_two[:, None], one[None, :], two[None, :], limit)
        weight = tl.where(kept, weight, 0.0)
    values = load_rows(v_block, row, length - first, v_row, column, MASK, H, W)
    acc = acc * shrink[:, None]
    acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")
    return acc, new_top, total


@triton.jit(**VARYING)
def _forward(
    o, lse, q, k, v, cu_seqlens, texts, blocks, T, group, o_row,
    q_row, q_head, k_row, k_head, v_row, v_head, left, right, scale, seed, limit, keep,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Blocks of one head lie side by side: programs that run together share its keys in the cache.
    head = tl.program_id(0) // blocks
    start, length, at = find_block(cu_seqlens, texts, tl.program_id(0) % blocks, QUERIES)
    if at >= length:
        return
    row, column = tl.arange(0, QUERIES), tl.arange(0, W)
    # In int64: where whole heads lie one after the other, theirs are the long steps.
    kv_head = (head // group).to(tl.int64)
    q += (start + at).to(tl.int64) * q_row + head.to(tl.int64) * q_head
    k += start.to(tl.int64) * k_row + kv_head * k_head
    v += start.to(tl.int64) * v_row + kv_head * v_head
    queries = load_rows(q, row, length - at, q_row, column, True, H, W)
    acc = tl.zeros((QUERIES, W), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    one, two = row, row
    if DROPOUT:
        one, two = random_words(seed, head, start + at + row, 0)
    low, all_from, all_to, high = seen_range(at, length, left, right, QUERIES, KEYS)
    # Loops count from 0: of a loop that starts at a computed number Triton knows no alignment, and
    # loads in it are neither vectorised nor pipelined (seen in the code of Triton 3.7).
    if LEFT:
        for step in range(0, all_from - low, KEYS):
            acc, top, total = _meet(
                acc, top, total, queries, k, v, k_row, v_row, low + step, at, length, left, right,
                scale, one, two, seed, head, start, limit,
                True, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
            )  # fmt: skip
    for step in range(0, all_to - all_from, KEYS):
        acc, top, total = _meet(
            acc, top, total, queries, k, v, k_row, v_row, all_from + step, at, length, left, right,
            scale, one, two, seed, head, start, limit,
            False, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
        )  # fmt: skip
    for step in range(0, high - all_to, KEYS):
        acc, top, total = _meet(
            acc, top, total, queries, k, v, k_row, v_row, all_to + step, at, length, left, right,
            scale, one, two, seed, head, start, limit,
            True, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
        )  # fmt: skip
    inside = row < length - at
    # Rows past the end saw nothing; a real row of total 0 (scores all -inf) has to become NaN.
    total = tl.where(inside, total, 1.0)
    value = acc / (total * keep)[:, None]
    o += (start + at).to(tl.int64) * o_row + head * H
    to = o + row[:, None] * o_row + column[None, :]
    tl.store(to, value.to(o.dtype.element_ty), mask=inside[:, None] & (column < H)[None, :])
    lse += head.to(tl.int64) * T + start + at
    tl.store(lse + row, top + tl.log2(total), mask=inside)


NAMES = ("QUERIES", "KEYS", "num_warps", "num_stages")
# By padded head dimension: on 9.0 and 10.0 (227 KB of shared memory a block), on 8.0 (163 KB), on
# 8.6, 8.9 and 12.0 (99 KB). Chosen from what the compiler says: no or few spilled registers, loads
# pipelined, room for the queries and `num_stages` blocks of keys and values.
_BLOCKS = {
    64: ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3)),
    128: ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    256: ((128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
}
_BLOCKS_FP32 = {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 16, 4, 1)}
INTERPRETED = (16, 16, 4, 1)  # many small blocks test the loops


def family_of(arch: int) -> int:
    """Which column of a table of blocks an architecture reads."""
    if arch in (86, 89) or arch >= 120:
        return 2
    return 0 if arch >= 90 else 1


def row_of(width: int) -> int:
    """Which row of a table of blocks a padded head dimension reads."""
    if width > 256:
        raise ValueError(f"attention: head dimensions up to 256 on the triton backend, got {width}")
    return max(64, width)


def block_options(x: Tensor, width: int, max_seqlen: int) -> dict:
    return _options_of(arch_of(x.device), x.dtype, width, max_seqlen <= 64)


@functools.cache
def _options_of(arch: int, dtype: torch.dtype, width: int, short: bool) -> dict:
    if arch == 0:
        return dict(zip(NAMES, INTERPRETED, strict=True))
    if dtype == torch.float32:
        return dict(zip(NAMES, _BLOCKS_FP32[row_of(width)], strict=True))
    queries, keys, warps, stages = _BLOCKS[row_of(width)][family_of(arch)]
    if short and width <= 128:  # half of a larger block would be idle
        queries, warps = 64, 4
    return dict(zip(NAMES, (queries, keys, warps, stages), strict=True))


def mask_arguments(causal: bool, window: int | None, dropout_p: float, seed: int | None):
    """((left, right), (seed, limit, keep), constexprs): how far a query sees, what is dropped."""
    left = FAR if window is None else window - 1
    right = 0 if causal else left
    # A pair is dropped if its 31 random bits are below the limit.
    chance = (seed or 0, min(round(dropout_p * 2**31), 2**31 - 1), 1.0 - dropout_p)
    flags = {"LEFT": left < FAR, "RIGHT": right < FAR, "DROPOUT": dropout_p > 0}
    return (left, right), chance, flags


def forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    causal: bool, window: int | None, scale: float, dropout_p: float, seed: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o (T, N, H), lse (N, T) fp32): outputs, and log2 of the sum of exponentials of the scores.

    max_seqlen only sets the size of blocks. Rows past cu_seqlens[-1] are not written.
    """
    T, N, H = q_TNH.shape
    texts, width = len(cu_seqlens) - 1, max(16, power_of_2(H))
    o_TNH = q_TNH.new_empty((T, N, H))
    lse_NT = q_TNH.new_empty((N, T), dtype=torch.float32)
    options = block_options(q_TNH, width, max_seqlen)
    blocks = T // options["QUERIES"] + texts if T and texts else 0
    sides, chance, flags = mask_arguments(causal, window, dropout_p, seed)
    launch(
        _forward, (blocks * N,), o_TNH, lse_NT, q_TNH, k_TKH, v_TKH, cu_seqlens, texts, blocks, T,
        N // k_TKH.shape[1], N * H, q_TNH.stride(0), q_TNH.stride(1),
        k_TKH.stride(0), k_TKH.stride(1), v_TKH.stride(0), v_TKH.stride(1),
        *sides, scale * LOG2E, *chance, H=H, W=width, **flags, **options,
    )  # fmt: skip
    return o_TNH, lse_NT
