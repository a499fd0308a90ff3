"""Loss and gradient of the masked tokens in chunks of rows: GEMM, one kernel in place, GEMM.

The logits of a chunk stand in one workspace of bounded size. A kernel reads each row twice and
leaves its gradient where the logits were; the GEMM for the hidden states consumes it at once.

The logits are rounded to the dtype of hidden. Kept in fp32 they would halve the chunks (a chunk of
1,024 x 128,256 fills the SMs of a Hopper GPU once in the second GEMM, 512 rows half of them) and
take the kernel from 6 to 10 bytes a logit. What it costs in bf16 (M = D = 512, V = 8,000): the
error of the states' gradient rises from 0.19 % to 0.22 % at logits of deviation 2, from 0.21 % to
1.2 % at 5; plain torch has the same.

T packed tokens, M masked rows, C rows of a chunk, D model, V vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import launch, power_of_2

WORKSPACE = 256 * 2**20  # bytes of logits at a time: large enough for GEMMs at their full rate

# The gradient of a logit is a probability: below fp16's normal range (6e-5) for most of a large
# vocabulary. It is stored times SCALE, and the GEMM's alpha takes SCALE out again in fp32, so it
# costs nothing; a power of two, so bf16 and fp32 are the same with it. Not larger: partial sums
# of an fp16 GEMM may pass through fp16 as well.
SCALE = 1024.0


@triton.jit
def _loss_and_gradient(
    losses, logits, targets, ignore_index, SCALE: tl.constexpr, V: tl.constexpr,
    STRIDE: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr, GRADIENT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and with GRADIENT its logits become SCALE * (softmax - one-hot).

    Sizes are constants because a process has one vocabulary. A block is GROUPS x VEC columns, VEC
    of them adjacent and in one thread: each group has a running maximum and sum of its own, so
    that the first pass needs no exchange between threads and 1 + 1/VEC exponentials an element.
    """
    row = tl.program_id(0).to(tl.int64)  # row * STRIDE passes 2^31 at 16,700 rows of 128,256
    at = logits + row * STRIDE
    target = tl.load(targets + row).to(tl.int64)
    column = tl.arange(0, GROUPS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    BLOCK: tl.constexpr = GROUPS * VEC
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    kind = logits.dtype.element_ty
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for block in range(0, BLOCKS):
                here = block * BLOCK + column
                zero = tl.zeros([GROUPS, VEC], tl.float32).to(kind)
                tl.store(at + here, zero, mask=here < STRIDE)
    else:
        known = (target >= 0) & (target < V)
        spot = tl.where(known, target, -1).to(tl.int32)
        hit = tl.load(at + target, mask=known, other=0.0).to(tl.float32)
        # Finite, so that a logit of -inf against it is exp(-inf) = 0 and never inf - inf.
        top = tl.full([GROUPS], -3.4028234e38, tl.float32)
        total = tl.zeros([GROUPS], tl.float32)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            here = block * BLOCK + column
            # Loads are masked at the padded width, which keeps them 16 bytes wide at any V.
            x = tl.load(at + here, mask=here < STRIDE, other=float("-inf")).to(tl.float32)
            if V < STRIDE:
                x = tl.where(here < V, x, float("-inf"))
            higher = tl.maximum(top, tl.max(x, axis=1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), axis=1)
            top = higher
        peak = tl.max(top, axis=0)
        sum_ = tl.sum(total * tl.exp(top - peak), axis=0)
        sum_ = tl.where(known, sum_, float("nan"))  # an impossible target must not go unnoticed
        tl.store(losses + row, (peak - hit) + tl.log(sum_))
        if GRADIENT:
            scale = SCALE / sum_
            for turn in tl.range(0, BLOCKS, num_stages=STAGES):
                # Backwards: what the first pass read last is what the L2 cache still has. The
                # columns between V and STRIDE get something too; no GEMM reads them.
                here = (BLOCKS - 1 - turn) * BLOCK + column
                x = tl.load(at + here, mask=here < STRIDE, other=0.0).to(tl.float32)
                gradient = tl.exp(x - peak) * scale - tl.where(here == spot, SCALE, 0.0)
                tl.store(at + here, gradient.to(kind), mask=here < STRIDE)


@triton.jit
def _add_rows(dhidden, dstates, factor, rows, order, M, D, blocks, BLOCK: tl.constexpr):
    """dhidden[r] = factor * (sum of dstates of the places where rows has r), rows sorted.

    The first place of a run of equal rows sums the run in its order; the others have nothing to do.
    """
    program = tl.program_id(0)
    place = program // blocks
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    row = tl.load(rows + place).to(tl.int64)
    before = tl.load(rows + place - 1, mask=place > 0, other=-1).to(tl.int64)
    if row != before:
        sum_ = tl.zeros([BLOCK], tl.float32)
        same = True
        while same:
            source = tl.load(order + place) * D  # int64
            sum_ += tl.load(dstates + source + column, mask=inside, other=0.0).to(tl.float32)
            place += 1
            same = tl.load(rows + place, mask=place < M, other=-1).to(tl.int64) == row
        value = sum_ * tl.load(factor)
        tl.store(dhidden + row * D + column, value.to(dhidden.dtype.element_ty), mask=inside)


@triton.jit
def _scale(y, x, factor, times, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
    value *= tl.load(factor) * times
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < size)


def chunk_rows(V: int, itemsize: int) -> int:
    """Rows of a chunk: as many as WORKSPACE holds, in whole tiles of a GEMM if it holds one."""
    rows = max(1, WORKSPACE // (_stride(V) * itemsize))
    return rows - rows % 128 if rows > 128 else rows


def _stride(V: int) -> int:
    """Columns of the workspace: rows start on 128 bytes, as fast GEMMs and wide loads want it."""
    return -(-V // 64) * 64


def _block(V: int, itemsize: int) -> dict:
    """16 elements a thread: a 16-byte load of bf16 or fp16 twice, of fp32 four times. Two further
    blocks are on their way (STAGES - 1, through shared memory) while one is computed. 64 registers
    let two programs share an SM; some compilers take a few more and leave it half empty.
    """
    vec = 16 // itemsize
    block = min(8192, max(32 * vec, power_of_2(V)))
    return {
        "GROUPS": block // vec,
        "VEC": vec,
        "STAGES": 3,
        "num_warps": max(1, block // 512),
        "maxnreg": 64,
    }


def _columns(D: int) -> tuple[int, dict]:
    block = min(1024, power_of_2(D))
    return -(-D // block), {"BLOCK": block, "num_warps": max(1, block // 256)}


def _weight_shift(M: int) -> float:
    """About the square root of M, a power of two: what dweight is kept smaller by. Its sum over M
    rows may pass fp16's 65,504 where a frequent token meets a large state; a mean would underflow.
    """
    return float(1 << M.bit_length() // 2)


def forward(
    hidden_TD: Tensor, weight_VD: Tensor, rows_M: Tensor, targets_M: Tensor, ignore_index: int,
    wants_hidden: bool, wants_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Losses (M,) fp32, and the gradients of their sum: by the gathered states (M, D), and by the
    weight (V, D) divided by `_weight_shift(M)`; None where not wanted.

    dweight adds up over the chunks in its own dtype, inside the GEMM: one more rounding a chunk.
    """
    M, V = rows_M.shape[0], weight_VD.shape[0]
    losses_M = hidden_TD.new_empty(M, dtype=torch.float32)
    states_MD = hidden_TD.index_select(0, rows_M)  # each chunk's gradient replaces it further down
    dweight_VD = None
    if wants_weight:
        dweight_VD = (weight_VD.new_empty if M else weight_VD.new_zeros)(weight_VD.shape)
    chunk, stride = chunk_rows(V, hidden_TD.element_size()), _stride(V)
    workspace = hidden_TD.new_empty(min(chunk, M), stride)
    targets_M, options = targets_M.contiguous(), _block(V, hidden_TD.element_size())
    for begin in range(0, M, chunk):
        states_CD = states_MD[begin : begin + chunk]
        logits_CV = workspace[: states_CD.shape[0], :V]
        torch.mm(states_CD, weight_VD.t(), out=logits_CV)
        launch(
            _loss_and_gradient, (states_CD.shape[0],), losses_M[begin:], logits_CV,
            targets_M[begin:], ignore_index, SCALE=SCALE, V=V, STRIDE=stride,
            GRADIENT=wants_hidden or wants_weight, **options,
        )  # fmt: skip
        if dweight_VD is not None:
            alpha = 1 / (SCALE * _weight_shift(M))
            dweight_VD.addmm_(logits_CV.t(), states_CD, beta=float(begin > 0), alpha=alpha)
        if wants_hidden:
            states_CD.addmm_(logits_CV, weight_VD, beta=0, alpha=1 / SCALE)
    return losses_M, states_MD if wants_hidden else None, dweight_VD


def backward(
    factor: Tensor, dstates_MD: Tensor | None, dweight_VD: Tensor | None, rows_M: Tensor, T: int
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by hidden (T, D) and weight (V, D): what `forward` gave, times the 0-d fp32 factor.

    What was saved stays as it is: a retained graph may ask again.
    """
    dhidden_TD = grown_VD = None
    if dstates_MD is not None:
        M, D = dstates_MD.shape
        dhidden_TD = dstates_MD.new_zeros(T, D)
        # Sorted and stable, so that equal rows are neighbours in a fixed order: about 30 us that
        # spare index_add's atomics, whose order (and rounding) differs from run to run.
        sorted_M, order_M = torch.sort(rows_M, stable=True)
        blocks, options = _columns(D)
        launch(
            _add_rows, (M * blocks,), dhidden_TD, dstates_MD, factor, sorted_M, order_M,
            M, D, blocks, **options,
        )  # fmt: skip
    if dweight_VD is not None:
        grown_VD = torch.empty_like(dweight_VD)
        size, shift = dweight_VD.numel(), _weight_shift(rows_M.shape[0])
        grid = (-(-size // 1024),)
        launch(_scale, grid, grown_VD, dweight_VD, factor, shift, size, BLOCK=1024, num_warps=4)
    return dhidden_TD, grown_VD
