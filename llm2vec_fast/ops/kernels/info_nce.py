"""The contrastive loss and its gradients over chunks of rows of a matrix that never exists whole.

Per chunk: cuBLAS multiplies unit vectors (fp16 in, fp32 out) into a workspace, one kernel turns
each row of logits into its loss and, in place, into its gradient in fp16, cuBLAS multiplies that
back.

B rows (queries), N columns (docs), C rows of a chunk, D model, S slots of partial column sums.
Rows and columns: with docs as rows the same code computes the direction from docs to queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llm2vec_fast.ops.kernels.launch import as_rows, launch, power_of_2

# Bytes of the fp32 workspace, unless that leaves fewer rows than the second number: each chunk
# reads and writes the fp32 sums of the docs' gradients, which takes about 12 % of the time of its
# products at 2,048 rows.
WORKSPACE = 768 << 20
FEWEST_ROWS = 2048
# Gradients of logits lie in [-1, 1] and are mostly tiny: times 2^15 they fill the range of fp16.
GRADIENT_UNIT = 2.0**15
# A fused multiply-add would subtract the highest logit, which is rounded, from a product that is
# not: the exponential of the highest itself would not be 1, nor the loss of a lone pair 0.
UNFUSED = {"enable_fp_fusion": False}
BLOCK = 4096  # most elements of a row at a time
SLOT_ROWS = 512  # rows that one program sums a block of columns over


@triton.jit
def _normalise(unit, inverse, x, row_x, D, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(0, BLOCKS):
        d = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row * row_x + d, mask=d < D, other=0.0).to(tl.float32)
        total += value * value
    norm = tl.sqrt(tl.sum(total, 0))
    # A zero vector stays zero, and its gradient too.
    scale = tl.where(norm > 1e-12, 1.0 / tl.maximum(norm, 1e-12), 0.0)
    tl.store(inverse + row, scale)
    for block in range(0, BLOCKS):
        d = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row * row_x + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(unit + row * D + d, (value * scale).to(unit.dtype.element_ty), mask=d < D)


@triton.jit
def _through_norm(dx, g, x, inverse, row_x, D, factor, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = factor * (g - (g . u) u) / |x| with u = x / |x|; dx may be g itself."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(inverse + row)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(0, BLOCKS):
        d = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row * row_x + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(g + row * D + d, mask=d < D, other=0.0) * (value * scale)
    along = tl.sum(total, 0)
    for block in range(0, BLOCKS):
        d = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + row * row_x + d, mask=d < D, other=0.0).to(tl.float32)
        ahead = tl.load(g + row * D + d, mask=d < D, other=0.0)
        gradient = (ahead - along * (value * scale)) * (scale * factor)
        tl.store(dx + row * D + d, gradient.to(dx.dtype.element_ty), mask=d < D)


@triton.jit
def _same_text(own_row, partner_row, own_column, partner_column, column, answer):
    """Equal keys beside the answer; the rule stands in `info_nce`."""
    same = (own_column == own_row) | (own_column == partner_row) | (partner_column == own_row)
    return same & (column != answer)


@triton.jit
def _rows(
    cosine, gradient, loss, true, column_high, column_inverse,
    own_row, partner_row, own_column, partner_column,
    N, B, first, stride, stride_gradient, scale, unit,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One row: its loss and true logit, then its gradient over the cosines' own memory.

    Highest logit and sum of exponentials stay apart: where the answer is the highest, as it is
    after some training, loss and gradient lose nothing to the logits' rounding.
    """
    row = tl.program_id(0).to(tl.int64)  # row * N passes 2^31 at 46,341
    answer = first + tl.program_id(0)
    at = cosine + row * stride
    truth = tl.load(at + answer) * scale
    high = truth  # some logit that is there: the sums never see exp(-inf + inf)
    total = 0.0
    if own_row is not None:
        own_here, partner_here = tl.load(own_row + row), tl.load(partner_row + row)
    for block in range(0, BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < N
        x = tl.load(at + column, mask=inside, other=-float("inf")) * scale
        if own_row is not None:
            own = tl.load(own_column + column, mask=inside, other=-2)
            partner = tl.load(partner_column + column, mask=inside, other=-2)
            same = _same_text(own_here, partner_here, own, partner, column, answer)
            x = tl.where(same, -float("inf"), x)
            if GRADIENT:  # written down, so that the second loop needs no keys
                tl.store(at + column, -float("inf"), mask=inside & same)
        higher = tl.maximum(high, tl.max(x, 0))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(x - higher), 0)
        high = higher
    tl.store(loss + row, (high - truth) + tl.log(total))
    tl.store(true + row, truth)
    if GRADIENT:
        to = gradient + row * stride_gradient
        inverse = 1.0 / total
        tl.debug_barrier()  # what other threads masked
        for block in range(0, BLOCKS):
            column = block * BLOCK + tl.arange(0, BLOCK)
            inside = column < N
            x = tl.load(at + column, mask=inside, other=-float("inf")) * scale
            here = tl.where(column == answer, 1.0, 0.0)
            value = tl.exp(x - high) * inverse - here
            if column_high is not None:
                paired = column < B
                top = tl.load(column_high + column, mask=paired, other=float("inf"))
                value += tl.exp(x - top) * tl.load(column_inverse + column, paired, 0.0) - here
            # Gradients have half the width of cosines: block n lands on block n / 2, which every
            # thread must have read by now.
            tl.debug_barrier()
            tl.store(to + column, (value * unit).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _columns(
    partial_high, partial_total, cosine, own_row, partner_row, own_column, partner_column,
    rows, B, first, stride, scale, blocks,
    SLOT: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Highest logit and sum of exponentials of a block of columns over SLOT rows of a chunk."""
    slot = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * WIDE + tl.arange(0, WIDE)
    # No logit is below -scale, and where all are masked the sum of 0 counts for nothing.
    high = tl.zeros([WIDE], tl.float32) - scale
    total = tl.zeros([WIDE], tl.float32)
    for begin in range(0, SLOT, TALL):
        row = slot * SLOT + begin + tl.arange(0, TALL)
        inside = (row < rows)[:, None] & (column < B)[None, :]
        at = cosine + row.to(tl.int64)[:, None] * stride + column[None, :]
        x = tl.load(at, mask=inside, other=-float("inf")) * scale
        if own_row is not None:
            same = _same_text(
                tl.load(own_row + row, mask=row < rows, other=-1)[:, None],
                tl.load(partner_row + row, mask=row < rows, other=-1)[:, None],
                tl.load(own_column + column, mask=column < B, other=-2)[None, :],
                tl.load(partner_column + column, mask=column < B, other=-2)[None, :],
                column[None, :],
                (first + row)[:, None],
            )
            x = tl.where(same, -float("inf"), x)
        higher = tl.maximum(high, tl.max(x, 0))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(x - higher[None, :]), 0)
        high = higher
    to = slot.to(tl.int64) * B + column
    tl.store(partial_high + to, high, mask=column < B)
    tl.store(partial_total + to, total, mask=column < B)


@triton.jit
def _times(y, x, factor, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < count)


def _options(width: int) -> dict:
    """Block options of a loop over `width` elements: 16 a thread, at most 8 warps.

    How many blocks is compiled in: Triton 3.6's interpreter has no loops up to an argument.
    """
    block = min(BLOCK, power_of_2(width))
    return {"BLOCKS": -(-width // block), "BLOCK": block, "num_warps": min(8, max(1, block // 512))}


def multiply_dtype(device: torch.device) -> torch.dtype:
    """In which unit vectors and gradients of logits are multiplied: fp16 has more bits than bf16,
    and unit vectors never need its range. The CPU has no fast fp16.
    """
    return torch.float32 if device.type == "cpu" else torch.float16


def multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, in fp32 whatever the operands' dtype."""
    if out.device.type == "meta":
        return
    if out.device.type == "cpu":
        a, b = a.float(), b.float()
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def _normalised(x_RD: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit vectors in `kind` and one over their lengths in fp32 (0 for a zero vector)."""
    rows, D = x_RD.shape
    unit_RD = x_RD.new_empty(rows, D, dtype=kind)
    inverse_R = x_RD.new_empty(rows, dtype=torch.float32)
    launch(_normalise, (rows,), unit_RD, inverse_R, x_RD, x_RD.stride(0), D, **_options(D))
    return unit_RD, inverse_R


def chunks_of(B: int, N: int) -> list[tuple[int, int]]:
    """[begin, end) of the chunks of rows, sized by the workspace's bytes."""
    rows = max(FEWEST_ROWS, WORKSPACE // (4 * max(N, 1)) // 256 * 256)
    return [(begin, min(begin + rows, B)) for begin in range(0, B, rows)]


class _Matrix:
    """The B x N matrix of cosines, a chunk of rows at a time in one reused workspace."""

    def __init__(self, query_BD, docs_ND, scale, first, symmetric, keys):
        self.query_BD, self.docs_ND = as_rows(query_BD), as_rows(docs_ND)
        self.scale, self.first, self.symmetric, self.keys = scale, first, symmetric, keys
        (self.B, self.D), self.N = self.query_BD.shape, len(docs_ND)
        self.kind = multiply_dtype(query_BD.device)
        self.unit_ND, self.inverse_N = _normalised(self.docs_ND, self.kind)
        self.chunks = chunks_of(self.B, self.N)
        most = max((end - begin for begin, end in self.chunks), default=0)
        padded = -(-self.N // 8) * 8  # rows start at 16 bytes, as cuBLAS likes them
        self.work = query_BD.new_empty(most, padded, dtype=torch.float32)
        self.loss_B = query_BD.new_empty(self.B, dtype=torch.float32)
        self.true_B = torch.empty_like(self.loss_B)
        self.high_B = self.inverse_B = None  # of columns: highest, one over sum

    def fill(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk's cosines; its unit queries and one over their lengths."""
        unit_CD, inverse_C = _normalised(self.query_BD[begin:end], self.kind)
        cosine_CN = self.work[: end - begin, : self.N]
        multiply(cosine_CN, unit_CD, self.unit_ND.t())
        return cosine_CN, unit_CD, inverse_C

    def _keys(self, begin: int, end: int) -> tuple:
        if self.keys is None:
            return (None,) * 4
        own, partner, *columns = self.keys
        return (own[begin:end], partner[begin:end], *columns)

    def rows(self, cosine_CN: Tensor, begin: int, end: int, gradient: bool) -> Tensor:
        """Fills the rows' losses; gives the gradient of the logits, in the cosines' memory."""
        gradient_CN = self.work.view(self.kind)[: end - begin, : self.N]
        launch(
            _rows, (end - begin,), cosine_CN, gradient_CN, self.loss_B[begin:end],
            self.true_B[begin:end], self.high_B, self.inverse_B, *self._keys(begin, end),
            self.N, self.B, self.first + begin, cosine_CN.stride(0), gradient_CN.stride(0),
            self.scale, GRADIENT_UNIT / (2 if self.symmetric else 1),
            GRADIENT=gradient, **_options(self.N), **UNFUSED,
        )  # fmt: skip
        return gradient_CN

    def columns(self, cosine_CN: Tensor, begin: int, end: int) -> Tensor:
        """(2, S, B): highest logits and sums of the first B columns over parts of this chunk."""
        slots = -(-(end - begin) // SLOT_ROWS)
        wide = min(128, power_of_2(self.B))
        blocks = -(-self.B // wide)
        partial_2SB = cosine_CN.new_empty(2, slots, self.B)
        launch(
            _columns, (slots * blocks,), *partial_2SB, cosine_CN, *self._keys(begin, end),
            end - begin, self.B, self.first + begin, cosine_CN.stride(0), self.scale, blocks,
            SLOT=SLOT_ROWS, TALL=min(32, SLOT_ROWS), WIDE=wide, num_warps=4, **UNFUSED,
        )  # fmt: skip
        return partial_2SB

    def merge(self, partials: list[Tensor]) -> None:
        """The columns' sums over all chunks, in the order of the chunks."""
        high_SB, total_SB = torch.cat(partials, dim=1)
        self.high_B = high_SB.amax(0)
        self.inverse_B = (total_SB * (high_SB - self.high_B).exp_()).sum(0).reciprocal_()

    def loss(self) -> Tensor:
        if self.high_B is None:
            return self.loss_B.mean()
        return (self.loss_B + (self.high_B - self.true_B) - self.inverse_B.log()).mean() / 2


def forward(
    query_BD: Tensor,
    docs_ND: Tensor,
    scale: float,
    first: int = 0,
    symmetric: bool = False,
    keys: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    want_query: bool = False,
    want_docs: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and its gradients by queries and docs, None where they are not wanted.

    first:  row i's answer is column first + i (symmetric: 0)
    keys:   int32 own and partner of rows (B,) and of columns (N,); -1 and -2 equal nothing

    fp16's gradients are given in fp32: a mean over 65,536 rows lies below fp16's range until it is
    multiplied by what autograd (a loss scaler) sends back.
    """
    matrix = _Matrix(query_BD, docs_ND, scale, first, symmetric, keys)
    wanted = want_query or want_docs
    cosine_CN = unit_CD = inverse_C = None
    partials = []
    for begin, end in matrix.chunks if symmetric or not wanted else ():
        cosine_CN, unit_CD, inverse_C = matrix.fill(begin, end)
        if symmetric:
            partials.append(matrix.columns(cosine_CN, begin, end))
        if not wanted:
            matrix.rows(cosine_CN, begin, end, gradient=False)
    if symmetric:
        matrix.merge(partials)
    if not wanted:
        return matrix.loss(), None, None
    kept = (cosine_CN, unit_CD, inverse_C) if symmetric and len(matrix.chunks) == 1 else None
    dquery_BD, ddocs_ND = _gradients(matrix, kept, want_query, want_docs)
    return matrix.loss(), dquery_BD, ddocs_ND


def _gradients(matrix: _Matrix, kept, want_query, want_docs) -> tuple[Tensor | None, Tensor | None]:
    """kept: what `fill` gave for the only chunk, if the workspace still has it."""
    query_BD, docs_ND, D = matrix.query_BD, matrix.docs_ND, matrix.D
    kind = torch.bfloat16 if query_BD.dtype == torch.bfloat16 else torch.float32
    dquery_BD = query_BD.new_empty(matrix.B, D, dtype=kind) if want_query else None
    sums_ND = docs_ND.new_empty(matrix.N, D, dtype=torch.float32) if want_docs else None
    factor = matrix.scale / (matrix.B * GRADIENT_UNIT)
    scratch = query_BD.new_empty(len(matrix.work), D, dtype=torch.float32) if want_query else None
    for begin, end in matrix.chunks:
        cosine_CN, unit_CD, inverse_C = kept or matrix.fill(begin, end)
        gradient_CN = matrix.rows(cosine_CN, begin, end, gradient=True)
        if want_query:
            g_CD, x_CD = scratch[: end - begin], query_BD[begin:end]
            multiply(g_CD, gradient_CN, matrix.unit_ND)
            _to_inputs(dquery_BD[begin:end], g_CD, x_CD, inverse_C, factor)
        if want_docs:
            multiply(sums_ND, gradient_CN.t(), unit_CD, add=begin > 0)
    if not want_docs:
        return dquery_BD, None
    # Into memory that is there already: the sums' own, or the unit vectors', needed no more.
    ddocs_ND = sums_ND
    if kind != torch.float32:
        unit_ND = matrix.unit_ND
        fits = unit_ND.dtype.itemsize == kind.itemsize
        ddocs_ND = unit_ND.view(kind) if fits else torch.empty_like(unit_ND, dtype=kind)
    _to_inputs(ddocs_ND, sums_ND, docs_ND, matrix.inverse_N, factor)
    return dquery_BD, ddocs_ND


def _to_inputs(dx_RD: Tensor, g_RD: Tensor, x_RD: Tensor, inverse_R: Tensor, factor: float) -> None:
    """The gradient of unit vectors back through the normalisation, into dx."""
    rows, D = x_RD.shape
    launch(
        _through_norm, (rows,), dx_RD, g_RD, x_RD, inverse_R, x_RD.stride(0), D, factor,
        **_options(D),
    )  # fmt: skip


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor in `dtype`, multiplied in fp32; torch would round the factor to x's dtype."""
    y = torch.empty_like(x, dtype=dtype)
    launch(
        _times, (-(-x.numel() // 4096),), y, x, factor.float(), x.numel(), BLOCK=4096, num_warps=8
    )
    return y
