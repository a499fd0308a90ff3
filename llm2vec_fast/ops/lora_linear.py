"""A frozen linear layer with low-rank updates (LoRA) on parts of its output.

Fused projections (q, k, v; gate, up) carry one adapter per part: a *segment*
(out0, out1, r0, r1, scale) adds  scale * drop(x) A[r0:r1]^T B[out0:out1, r0:r1]^T  to the columns
out0:out1 of x W^T + bias. The parts of the backward pass stand alone below, because SwiGLU + down
projection (`swiglu_linear`) puts them together in another order.

T tokens, D in features, O out features, R rank of all segments together
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2vec_fast.ops.backend import choose, kernels

Segment = tuple[int, int, int, int, float]


class Part(NamedTuple):
    """A segment that is not empty, and its place among all segments: the seed of its mask."""

    index: int
    out: slice
    rank: slice
    scale: float


class Plan(NamedTuple):
    """What the adapters of one call do; equal calls share one."""

    parts: tuple[Part, ...]
    ranks: tuple[tuple[int, int, int], ...]  # (index, r0, r1) of the parts, for the kernels
    every_rank: bool  # each rank belongs to a part


class Drop(NamedTuple):
    """Dropout of the adapters' input."""

    p: float
    seed: int
    backend: str = "triton"
    masks: Tensor | None = None  # what the backend keeps of them; None if it makes them on the fly


def with_masks(drop: Drop | None, x_TD: Tensor, plan: Plan) -> Drop | None:
    if drop is None:
        return None
    masks = kernels("lora_linear", drop.backend).masks(x_TD, plan.ranks, drop)
    return drop._replace(masks=masks)


def lora_linear(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, a_RD: Tensor | None,
    b_OR: Tensor | None, segments: Sequence[Segment], *,
    dropout_p: float = 0.0, seed: int | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias plus the low-rank update of each segment; W gets no gradient.

    x_TD:       (T, D), any strides
    weight_OD:  (O, D), frozen, in the dtype of x; so is bias_O (O,), which may be None
    a_RD, b_OR: (R, D) and (O, R), all adapters stacked; computed in the dtype of x whatever they
                are kept in. Only the blocks that segments name are read, others get gradient zero
    segments:   (out0, out1, r0, r1, scale) of each adapter; ranks may not be shared. Without any,
                or without a and b, this is a plain linear layer
    dropout_p:  probability that the input of an adapter loses an element, drawn for each segment on
                its own from (seed, segment, row, column): equal on every device. A GPU replays
                them in the backward pass, a CPU keeps one bit an element
    seed:       any integer; None draws one from torch's generator of the CPU
    returns:    (T, O) in the dtype of x
    raises:     ValueError on wrong shapes, dtypes, segments or probabilities, and if the weight
                asks for a gradient
    source:     LoRA, arXiv:2106.09685
    """
    if weight_OD.requires_grad:
        raise ValueError(
            "lora_linear: the weight is frozen and gets no gradient; call requires_grad_(False) "
            "on it, or use torch.nn.functional.linear to train it"
        )
    plan = check("lora_linear", x_TD, weight_OD, bias_O, a_RD, b_OR, segments, dropout_p)
    if plan is None:
        return F.linear(x_TD, weight_OD, bias_O)
    backend = choose("lora_linear", x_TD, a_RD, b_OR, bias_O, dropout=dropout_p > 0)
    drop = None if dropout_p == 0 else Drop(dropout_p, drawn(seed), backend)
    if backend != "reference":
        return _LoraLinear.apply(x_TD, weight_OD, bias_O, a_RD, b_OR, plan, drop)
    return lora_linear_ref(
        x_TD, weight_OD, bias_O, a_RD, b_OR, segments, dropout_p=dropout_p, seed=drop and drop.seed
    )


def check(op, x_TD, weight_OD, bias_O, a_RD, b_OR, segments, dropout_p) -> Plan | None:
    """The plan of a call whose arguments fit together, None if there is nothing to adapt."""
    if x_TD.dim() != 2 or weight_OD.dim() != 2 or x_TD.shape[1] != weight_OD.shape[1]:
        raise ValueError(
            f"{op}: input and weight must be (tokens, in) and (out, in), "
            f"got {tuple(x_TD.shape)} and {tuple(weight_OD.shape)}"
        )
    out, D = weight_OD.shape
    if bias_O is not None and bias_O.shape != (out,):
        raise ValueError(f"{op}: bias must be ({out},) or None, got {tuple(bias_O.shape)}")
    kinds = {x_TD.dtype, weight_OD.dtype, x_TD.dtype if bias_O is None else bias_O.dtype}
    if len(kinds) > 1:
        raise ValueError(
            f"{op}: input, weight and bias must have one dtype, got {x_TD.dtype}, "
            f"{weight_OD.dtype} and {None if bias_O is None else bias_O.dtype}"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be at least 0 and below 1, got {dropout_p}")
    if a_RD is None or b_OR is None:
        if a_RD is not b_OR or segments:
            raise ValueError(f"{op}: a, b and segments belong together, but one of them is missing")
        return None
    R = a_RD.shape[0]
    if a_RD.shape != (R, D) or b_OR.shape != (out, R):
        raise ValueError(
            f"{op}: a and b must be (rank, {D}) and ({out}, rank), "
            f"got {tuple(a_RD.shape)} and {tuple(b_OR.shape)}"
        )
    plan = _plan(op, tuple(map(tuple, segments)), out, R)
    return plan if plan.parts else None


@functools.lru_cache(256)
def _plan(op: str, segments: tuple[Segment, ...], width: int, R: int) -> Plan:
    parts: list[Part] = []
    for index, segment in enumerate(segments):
        out0, out1, r0, r1, scale = segment
        if not (0 <= out0 <= out1 <= width and 0 <= r0 <= r1 <= R):
            raise ValueError(f"{op}: segment {segment} is not within {width} outputs and {R} ranks")
        if any(r0 < p.rank.stop and p.rank.start < r1 for p in parts):
            raise ValueError(f"{op}: segment {segment} shares ranks with another of {segments}")
        if out0 < out1 and r0 < r1:
            parts.append(Part(index, slice(out0, out1), slice(r0, r1), float(scale)))
    ranks = tuple((p.index, p.rank.start, p.rank.stop) for p in parts)
    return Plan(tuple(parts), ranks, sum(r1 - r0 for _, r0, r1 in ranks) == R)


def drawn(seed: int | None) -> int:
    """The seed, or a new one from torch's CPU generator (which checkpointing restores)."""
    return int(torch.randint(2**62, ())) if seed is None else seed


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_OD, bias_O, a_RD, b_OR, plan, drop):
        drop = with_masks(drop, x_TD, plan)
        y_TO, u_TR = adapted(x_TD, weight_OD, bias_O, a_RD, b_OR, plan, drop)
        _, _, _, a_wanted, b_wanted = ctx.needs_input_grad[:5]
        ctx.save_for_backward(
            x_TD if a_wanted else None, weight_OD, a_RD, b_OR, u_TR if b_wanted else None,
            drop and drop.masks,
        )  # fmt: skip
        drop = drop and drop._replace(masks=None)
        ctx.plan, ctx.drop = plan, drop
        return y_TO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_TO):
        x_TD, weight_OD, a_RD, b_OR, u_TR, masks = ctx.saved_tensors
        plan, drop = ctx.plan, ctx.drop and ctx.drop._replace(masks=masks)
        x_wanted, _, bias_wanted, a_wanted, b_wanted = ctx.needs_input_grad[:5]
        dx_TD = da_RD = db_OR = None
        if x_wanted or a_wanted:
            du_TR = grad_u(dy_TO, b_OR, plan)
            dx_TD = grad_x(dy_TO, weight_OD, du_TR, a_RD, plan, drop) if x_wanted else None
            da_RD = grad_a(du_TR, x_TD, plan, drop).to(a_RD.dtype) if a_wanted else None
        if b_wanted:
            db_OR = grad_b(dy_TO, u_TR, b_OR, plan)
        dbias_O = dy_TO.sum(0) if bias_wanted else None
        return dx_TD, None, dbias_O, da_RD, db_OR, None, None


def adapted(x_TD, weight_OD, bias_O, a_RD, b_OR, plan, drop) -> tuple[Tensor, Tensor]:
    """(y, u): the layer's output, and drop(x) A^T before scaling."""
    y_TO = F.linear(x_TD, weight_OD, bias_O)
    a_RD, b_OR = a_RD.to(x_TD.dtype), b_OR.to(x_TD.dtype)
    if drop is None:
        u_TR = x_TD @ a_RD.t()
    else:
        u_TR = kernels("lora_linear", drop.backend).down(x_TD, a_RD, plan.ranks, drop)
    for _, out, rank, scale in plan.parts:
        y_TO[:, out].addmm_(u_TR[:, rank], b_OR[out, rank].t(), alpha=scale)
    return y_TO, u_TR


def grad_u(dy_TO, b_OR, plan) -> Tensor:
    """Gradient of u, with the scale; zero in ranks that no part has."""
    T, R = dy_TO.shape[0], b_OR.shape[1]
    du_TR = dy_TO.new_empty(T, R) if plan.every_rank else dy_TO.new_zeros(T, R)
    b_OR = b_OR.to(dy_TO.dtype)
    for _, out, rank, scale in plan.parts:
        du_TR[:, rank].addmm_(dy_TO[:, out], b_OR[out, rank], beta=0, alpha=scale)
    return du_TR


def grad_x(dy_TO, weight_OD, du_TR, a_RD, plan, drop) -> Tensor:
    dx_TD = dy_TO @ weight_OD
    a_RD = a_RD.to(dx_TD.dtype)
    if drop is None:
        return dx_TD.addmm_(du_TR, a_RD)
    kernels("lora_linear", drop.backend).add_dx_(dx_TD, du_TR, a_RD, plan.ranks, drop)
    return dx_TD


def grad_a(du_TR, x_TD, plan, drop) -> Tensor:
    if drop is None:
        return du_TR.t() @ x_TD
    return kernels("lora_linear", drop.backend).da(du_TR, x_TD, plan.ranks, drop)


def grad_b(dy_TO, u_TR, b_OR, plan) -> Tensor:
    """Gradient of B in its dtype; zero outside the parts' blocks."""
    db_OR = dy_TO.new_zeros(b_OR.shape)
    for _, out, rank, scale in plan.parts:
        db_OR[out, rank].addmm_(dy_TO[:, out].t(), u_TR[:, rank], beta=0, alpha=scale)
    return db_OR.to(b_OR.dtype)


def lora_linear_ref(x_TD, weight_OD, bias_O, a_RD, b_OR, segments, *, dropout_p=0.0, seed=None):
    acc = torch.promote_types(x_TD.dtype, torch.float32)
    wide_TD = x_TD.to(acc)
    y_TO = F.linear(wide_TD, weight_OD.to(acc), None if bias_O is None else bias_O.to(acc))
    row_T, column_D = (torch.arange(n, dtype=torch.int32, device=x_TD.device) for n in x_TD.shape)
    for index, (out0, out1, r0, r1, scale) in enumerate(segments):
        in_TD = wide_TD
        if dropout_p:
            keep_TD = keep_mask(row_T, column_D, index, dropout_p, seed)
            in_TD = torch.where(keep_TD, wide_TD, 0).div_(1 - dropout_p)
        u_TR = in_TD @ a_RD[r0:r1].to(acc).t()
        y_TO[:, out0:out1] += scale * (u_TR @ b_OR[out0:out1, r0:r1].to(acc).t())
    return y_TO.to(x_TD.dtype)


def keep_mask(row_T: Tensor, column_D: Tensor, segment: int, p: float, seed: int) -> Tensor:
    """(T, D), True where dropout keeps an element, given int32 numbers of rows and columns.

    Bit for bit the kernels' `_keep`. int32 stands for uint32: additions and products wrap alike,
    shifts are made logical.
    """
    first, second = first_keys(row_T, segment, seed)
    h_TD = mixed(first ^ row_T)[:, None] + (column_D * GOLDEN)[None, :]
    h_TD ^= _shifted(h_TD, 16)
    h_TD *= MIX_1
    h_TD ^= _shifted(h_TD, 13) ^ mixed(second + row_T)[:, None]
    h_TD *= MIX_2
    return _shifted(h_TD, 1) >= round(p * 2**31)


GOLDEN, MIX_1, MIX_2 = 0x9E3779B9 - 2**32, 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32


def first_keys(row_T: Tensor, segment: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two numbers (1,) that a mask is made from, beside the rows and columns."""
    one = torch.ones(1, dtype=torch.int32, device=row_T.device)
    low, high = seed & 0x7FFFFFFF, seed >> 31 & 0x7FFFFFFF
    first = mixed(one * low ^ mixed(one * high + segment * (one * GOLDEN)))
    return first, mixed(first + GOLDEN)


def _shifted(h: Tensor, bits: int) -> Tensor:
    return (h >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def mixed(h: Tensor) -> Tensor:
    """MurmurHash3's finaliser."""
    h = (h ^ _shifted(h, 16)).mul_(MIX_1)
    h = (h ^ _shifted(h, 13)).mul_(MIX_2)
    return h ^ _shifted(h, 16)
