"""Attention over packed texts, backward: two kernels without atomics, so bitwise repeatable.

T tokens, B texts, N query heads, K kv heads, H head dim

`_queries` takes a block of queries and walks over its keys: dq, and delta = sum(o * do) on the way.
`_keys` takes a block of keys and walks over all queries of its group of heads: dk and dv. Both
compute the scores anew from lse: seven matrix products where atomics would need five, which is the
price of the fixed order. Scores are in units of log 2, as in the forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.backend import arch_of
from llm2vec_fast.ops.kernels.attention import (
    INTERPRETED,
    LOG2E,
    NAMES,
    VARYING,
    family_of,
    find_block,
    is_kept,
    is_seen,
    load_rows,
    mask_arguments,
    random_words,
    row_of,
    seen_range,
)
from llm2vec_fast.ops.kernels.launch import launch, power_of_2


@triton.jit
def _meet_keys(
    dq, q, do, lse, delta, k, v, k_row, v_row, first, at, length, left, right, scale,
    words_one, words_two, seed, head, start, limit, keep,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, KEYS), tl.arange(0, W)
    k_block = k + tl.cast(first, tl.int64) * k_row
    v_block = v + tl.cast(first, tl.int64) * v_row
    keys = load_rows(k_block, row, length - first, k_row, column, MASK, H, W)
    values = load_rows(v_block, row, length - first, v_row, column, MASK, H, W)
    score = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    weight = tl.exp2(score - lse[:, None])
    dweight = tl.dot(do, tl.trans(values), input_precision="ieee")
    if DROPOUT:
        one, two = random_words(seed, head, start + first + row, 1)
        kept = is_kept(words_one[:, None], words_two[:, None], one[None, :], two[None, :], limit)
        dweight = tl.where(kept, dweight / keep, 0.0)
    dscore = weight * (dweight - delta[:, None])
    if MASK:
        query = at + tl.arange(0, QUERIES)
        seen = is_seen(
            query[:, None], (first + row)[None, :], length, left, right, LEFT, RIGHT
        )  # fmt: skip
        dscore = tl.where(seen, dscore, 0.0)
    return tl.dot(dscore.to(keys.dtype), keys, dq, input_precision="ieee")


@triton.jit(**VARYING)
def _queries(
    dq, delta, do, o, lse, q, k, v, cu_seqlens, texts, blocks, T, group,
    dq_row, dq_head, do_row, do_head, o_row, o_head, q_row, q_head, k_row, k_head, v_row, v_head,
    left, right, scale, natural_scale, seed, limit, keep,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // blocks
    start, length, at = find_block(cu_seqlens, texts, tl.program_id(0) % blocks, QUERIES)
    if at >= length:
        return
    row, column = tl.arange(0, QUERIES), tl.arange(0, W)
    here = (start + at).to(tl.int64)
    inside = row < length - at
    wide_head, kv_head = head.to(tl.int64), (head // group).to(tl.int64)
    q += here * q_row + wide_head * q_head
    do += here * do_row + wide_head * do_head
    o += here * o_row + wide_head * o_head
    k += start.to(tl.int64) * k_row + kv_head * k_head
    v += start.to(tl.int64) * v_row + kv_head * v_head
    douts = load_rows(do, row, length - at, do_row, column, True, H, W)
    outs = load_rows(o, row, length - at, o_row, column, True, H, W)
    deltas = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), 1)
    line = wide_head * T + here
    tl.store(delta + line + row, deltas, mask=inside)
    queries = load_rows(q, row, length - at, q_row, column, True, H, W)
    lses = tl.load(lse + line + row, mask=inside, other=0.0)
    one, two = row, row
    if DROPOUT:
        one, two = random_words(seed, head, start + at + row, 0)
    acc = tl.zeros((QUERIES, W), tl.float32)
    low, all_from, all_to, high = seen_range(at, length, left, right, QUERIES, KEYS)
    if LEFT:
        for step in range(0, all_from - low, KEYS):
            acc = _meet_keys(
                acc, queries, douts, lses, deltas, k, v, k_row, v_row, low + step, at, length,
                left, right, scale, one, two, seed, head, start, limit, keep,
                True, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
            )  # fmt: skip
    for step in range(0, all_to - all_from, KEYS):
        acc = _meet_keys(
            acc, queries, douts, lses, deltas, k, v, k_row, v_row, all_from + step, at, length,
            left, right, scale, one, two, seed, head, start, limit, keep,
            False, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
        )  # fmt: skip
    for step in range(0, high - all_to, KEYS):
        acc = _meet_keys(
            acc, queries, douts, lses, deltas, k, v, k_row, v_row, all_to + step, at, length,
            left, right, scale, one, two, seed, head, start, limit, keep,
            True, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
        )  # fmt: skip
    to = dq + here * dq_row + wide_head * dq_head + row[:, None] * dq_row + column[None, :]
    value = (acc * natural_scale).to(dq.dtype.element_ty)
    tl.store(to, value, mask=inside[:, None] & (column < H)[None, :])


@triton.jit
def _meet_queries(
    dk, dv, k, v, q, do, lse, delta, q_row, do_row, first, at, length, left, right, scale,
    words_one, words_two, seed, head, start, limit, keep,
    MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One block of queries adds to dk and dv. Queries past the end have do = delta = 0 and so add
    nothing; keys past the end are never stored.
    """
    row, column = tl.arange(0, QUERIES), tl.arange(0, W)
    queries = load_rows(
        q + tl.cast(first, tl.int64) * q_row, row, length - first, q_row, column, MASK, H, W
    )
    douts = load_rows(
        do + tl.cast(first, tl.int64) * do_row, row, length - first, do_row, column, MASK, H, W
    )
    if MASK:
        lses = tl.load(lse + first + row, mask=row < length - first, other=0.0)
        deltas = tl.load(delta + first + row, mask=row < length - first, other=0.0)
    else:
        lses = tl.load(lse + first + row)
        deltas = tl.load(delta + first + row)
    score = tl.dot(k, tl.trans(queries), input_precision="ieee") * scale
    weight = tl.exp2(score - lses[None, :])
    if MASK:
        if LEFT or RIGHT:
            key = at + tl.arange(0, KEYS)
            seen = is_seen(
                (first + row)[None, :], key[:, None], length, left, right, LEFT, RIGHT
            )  # fmt: skip
            weight = tl.where(seen, weight, 0.0)
    dweight = tl.dot(v, tl.trans(douts), input_precision="ieee")
    dropped = weight
    if DROPOUT:
        one, two = random_words(seed, head, start + first + row, 0)
        kept = is_kept(one[None, :], two[None, :], words_one[:, None], words_two[:, None], limit)
        dropped = tl.where(kept, weight / keep, 0.0)
        dweight = tl.where(kept, dweight / keep, 0.0)
    dv = tl.dot(dropped.to(douts.dtype), douts, dv, input_precision="ieee")
    dscore = weight * (dweight - deltas[None, :])
    dk = tl.dot(dscore.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit(**VARYING)
def _keys(
    dk, dv, do, lse, delta, q, k, v, cu_seqlens, texts, blocks, T, group,
    dk_row, dk_head, dv_row, dv_head, do_row, do_head, q_row, q_head, k_row, k_head, v_row, v_head,
    left, right, scale, natural_scale, seed, limit, keep,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) // blocks
    start, length, at = find_block(cu_seqlens, texts, tl.program_id(0) % blocks, KEYS)
    if at >= length:
        return
    row, column = tl.arange(0, KEYS), tl.arange(0, W)
    base, here = start.to(tl.int64), (start + at).to(tl.int64)
    wide_kv_head = kv_head.to(tl.int64)
    k += here * k_row + wide_kv_head * k_head
    v += here * v_row + wide_kv_head * v_head
    keys = load_rows(k, row, length - at, k_row, column, True, H, W)
    values = load_rows(v, row, length - at, v_row, column, True, H, W)
    dkeys = tl.zeros((KEYS, W), tl.float32)
    dvalues = tl.zeros((KEYS, W), tl.float32)
    # A key is seen from the other side: by queries up to `right` before it and `left` after it.
    low, all_from, all_to, high = seen_range(at, length, right, left, KEYS, QUERIES)
    for head in range(kv_head * group, kv_head * group + group):
        wide_head = tl.cast(head, tl.int64)
        qs = q + base * q_row + wide_head * q_head
        dos = do + base * do_row + wide_head * do_head
        line = base + wide_head * T
        one, two = row, row
        if DROPOUT:
            one, two = random_words(seed, head, start + at + row, 1)
        if RIGHT:
            for step in range(0, all_from - low, QUERIES):
                dkeys, dvalues = _meet_queries(
                    dkeys, dvalues, keys, values, qs, dos, lse + line, delta + line, q_row, do_row,
                    low + step, at, length, left, right, scale,
                    one, two, seed, head, start, limit, keep,
                    True, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
                )  # fmt: skip
        for step in range(0, all_to - all_from, QUERIES):
            dkeys, dvalues = _meet_queries(
                dkeys, dvalues, keys, values, qs, dos, lse + line, delta + line, q_row, do_row,
                all_from + step, at, length, left, right, scale,
                one, two, seed, head, start, limit, keep,
                False, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
            )  # fmt: skip
        for step in range(0, high - all_to, QUERIES):
            dkeys, dvalues = _meet_queries(
                dkeys, dvalues, keys, values, qs, dos, lse + line, delta + line, q_row, do_row,
                all_to + step, at, length, left, right, scale,
                one, two, seed, head, start, limit, keep,
                True, LEFT, RIGHT, DROPOUT, H, W, QUERIES, KEYS,
            )  # fmt: skip
    inside = (row < length - at)[:, None] & (column < H)[None, :]
    kind = dk.dtype.element_ty
    to = dk + here * dk_row + wide_kv_head * dk_head + row[:, None] * dk_row + column[None, :]
    tl.store(to, (dkeys * natural_scale).to(kind), mask=inside)
    to = dv + here * dv_row + wide_kv_head * dv_head + row[:, None] * dv_row + column[None, :]
    tl.store(to, dvalues.to(kind), mask=inside)


# Blocks of `_queries` and of `_keys`, read as those of the forward. The walked side is the narrow
# one: a block of it and the products with it live in registers beside one or two accumulators.
_BLOCKS = {
    64: (
        ((128, 64, 8, 2), (32, 128, 8, 2)),
        ((128, 64, 8, 2), (32, 128, 8, 2)),
        ((128, 64, 8, 2), (32, 128, 8, 2)),
    ),
    128: (
        ((128, 64, 8, 2), (32, 128, 8, 2)),
        ((64, 64, 8, 2), (64, 64, 8, 2)),
        ((64, 32, 4, 2), (32, 64, 8, 2)),
    ),
    256: (
        ((64, 32, 8, 2), (16, 64, 8, 2)),
        ((64, 32, 8, 2), (32, 64, 8, 2)),
        ((32, 32, 4, 2), (16, 32, 4, 2)),
    ),
}
_BLOCKS_FP32 = {
    64: ((32, 32, 4, 2), (32, 32, 4, 2)),
    128: ((32, 16, 4, 2), (32, 32, 8, 1)),
    256: ((16, 16, 8, 1), (16, 16, 4, 1)),
}


def _options(x: Tensor, width: int, dropout: bool) -> tuple[dict, dict]:
    arch = arch_of(x.device)
    if arch == 0:
        one = two = INTERPRETED
    elif x.dtype == torch.float32:
        one, two = _BLOCKS_FP32[row_of(width)]
    else:
        one, two = _BLOCKS[row_of(width)][family_of(arch)]
        if 100 <= arch < 120 and row_of(width) <= 128:
            two = (32, 64, 8, 1)  # with loads in flight besides, Triton spills hundreds of bytes
        if dropout:  # random words need registers
            two = (min(two[0], 32), *two[1:])
    return dict(zip(NAMES, one, strict=True)), dict(zip(NAMES, two, strict=True))


def backward(
    do_TNH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, o_TNH: Tensor, lse_NT: Tensor,
    cu_seqlens: Tensor, causal: bool, window: int | None, scale: float, dropout_p: float,
    seed: int | None, dq_TNH: Tensor, dk_TKH: Tensor | None, dv_TKH: Tensor | None,
) -> None:  # fmt: skip
    """Writes dq, dk and dv, which may be views of one packed gradient. dk and dv come together or
    not at all; dq is always needed, because delta falls out of its kernel.
    """
    T, N, H = q_TNH.shape
    K, texts, width = k_TKH.shape[1], len(cu_seqlens) - 1, max(16, power_of_2(H))
    if do_TNH.stride(2) != 1:
        do_TNH = do_TNH.contiguous()
    delta_NT = torch.empty_like(lse_NT)
    of_queries, of_keys = _options(q_TNH, width, dropout_p > 0)
    sides, chance, flags = mask_arguments(causal, window, dropout_p, seed)
    inputs = (*_strides(q_TNH), *_strides(k_TKH), *_strides(v_TKH))
    numbers = (*sides, scale * LOG2E, scale, *chance)
    sizes = {"H": H, "W": width}
    blocks = T // of_queries["QUERIES"] + texts if T and texts else 0
    launch(
        _queries, (blocks * N,), dq_TNH, delta_NT, do_TNH, o_TNH, lse_NT, q_TNH, k_TKH, v_TKH,
        cu_seqlens, texts, blocks, T, N // K, *_strides(dq_TNH), *_strides(do_TNH),
        *_strides(o_TNH), *inputs, *numbers, **sizes, **flags, **of_queries,
    )  # fmt: skip
    if dk_TKH is None or dv_TKH is None:
        return
    blocks = T // of_keys["KEYS"] + texts if T and texts else 0
    launch(
        _keys, (blocks * K,), dk_TKH, dv_TKH, do_TNH, lse_NT, delta_NT, q_TNH, k_TKH, v_TKH,
        cu_seqlens, texts, blocks, T, N // K, *_strides(dk_TKH), *_strides(dv_TKH),
        *_strides(do_TNH), *inputs, *numbers, **sizes, **flags, **of_keys,
    )  # fmt: skip


def _strides(x_TNH: Tensor) -> tuple[int, int]:
    return x_TNH.stride(0), x_TNH.stride(1)
