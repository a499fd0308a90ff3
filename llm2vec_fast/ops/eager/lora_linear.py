"""LoRA's products with dropout on the CPU. The masks are the bits of `ops.lora_linear.keep_mask`;
making them costs more than keeping them, so they are kept, one bit an element.

T tokens, D in features, R rank of all segments together, S segments
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast.ops.eager import scratch
from llm2vec_fast.ops.lora_linear import GOLDEN, MIX_1, MIX_2, Drop, first_keys, mixed

_SIGN = -(2**31)
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by the bytes of what they mask


def masks(x_TD: Tensor, segments: tuple, drop: Drop) -> Tensor:
    """(S, T, D / 8) uint8, one bit for each element that a segment keeps.

    segments: (index, r0, r1) of each, as everywhere below
    """
    T, D = x_TD.shape
    bits_STB = torch.empty(len(segments), T, -(-D // 8), dtype=torch.uint8)
    column_D = torch.arange(D, dtype=torch.int32).mul_(GOLDEN)
    row_T = torch.arange(T, dtype=torch.int32)
    for n, (index, _, _) in enumerate(segments):
        first, second = first_keys(row_T, index, drop.seed)
        begin_T1 = mixed(first ^ row_T)[:, None]
        # A flipped sign bit makes the unsigned comparison at the end a signed one; multiplying by
        # an odd number leaves it where it is.
        later_T1 = (mixed(second + row_T) ^ _SIGN)[:, None]
        for at, (h_TD, beside_TD) in scratch(2, T, D, torch.int32):
            torch.add(begin_T1[at], column_D, out=h_TD)
            keep_TD = _keep(h_TD, beside_TD, later_T1[at], drop.p)
            bits_STB[n, at] = torch.from_numpy(np.packbits(keep_TD.numpy(), axis=1))
    return bits_STB


def _keep(h_TD: Tensor, beside_TD: Tensor, later_T1: Tensor, p: float) -> Tensor:
    """The last steps of `keep_mask`, in place."""
    torch.bitwise_right_shift(h_TD, 16, out=beside_TD).bitwise_and_(0xFFFF)
    h_TD.bitwise_xor_(beside_TD).mul_(MIX_1)
    torch.bitwise_right_shift(h_TD, 13, out=beside_TD).bitwise_and_((1 << 19) - 1)
    h_TD.bitwise_xor_(beside_TD).bitwise_xor_(later_T1).mul_(MIX_2)
    # In place: comparing into another dtype would take several times as long.
    return h_TD.ge_(2 * round(p * 2**31) + _SIGN).to(torch.uint8)


def down(x_TD: Tensor, a_RD: Tensor, segments: tuple, drop: Drop) -> Tensor:
    """u (T, R): drop(x) A^T, with a mask of its own for the ranks of each segment."""
    u_TR = x_TD.new_empty(len(x_TD), len(a_RD))
    for at, (kept_TD, mask_TD) in _pieces(x_TD):
        for n, (_, r0, r1) in enumerate(segments):
            torch.bitwise_and(_bits(x_TD[at]), _mask(drop, n, at, mask_TD), out=_bits(kept_TD))
            u_TR[at, r0:r1].addmm_(kept_TD, a_RD[r0:r1].t(), beta=0, alpha=1 / (1 - drop.p))
    return u_TR


def add_dx_(dx_TD: Tensor, du_TR: Tensor, a_RD: Tensor, segments: tuple, drop: Drop) -> None:
    """dx += mask * (du A) / (1 - p), summed over the segments."""
    for at, (update_TD, mask_TD) in _pieces(dx_TD):
        for n, (_, r0, r1) in enumerate(segments):
            torch.mm(du_TR[at, r0:r1], a_RD[r0:r1], out=update_TD)
            _bits(update_TD).bitwise_and_(_mask(drop, n, at, mask_TD))
            dx_TD[at].add_(update_TD, alpha=1 / (1 - drop.p))


def da(du_TR: Tensor, x_TD: Tensor, segments: tuple, drop: Drop) -> Tensor:
    """dA (R, D) fp32: du^T drop(x); rows that no segment has are zero."""
    da_RD = x_TD.new_zeros(du_TR.shape[1], x_TD.shape[1], dtype=torch.float32)
    for at, (kept_TD, mask_TD) in _pieces(x_TD):
        for n, (_, r0, r1) in enumerate(segments):
            torch.bitwise_and(_bits(x_TD[at]), _mask(drop, n, at, mask_TD), out=_bits(kept_TD))
            da_RD[r0:r1].add_(du_TR[at, r0:r1].t() @ kept_TD, alpha=1 / (1 - drop.p))
    return da_RD


def _pieces(x_TD: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of x's rows, each with two tensors of their size and of x's dtype."""
    return scratch(2, *x_TD.shape, x_TD.dtype)


def _mask(drop: Drop, segment: int, at: slice, into_TD: Tensor) -> Tensor:
    """Integers as wide as x's numbers: all bits set where the segment keeps an element, or none."""
    ones = np.unpackbits(drop.masks[segment, at].numpy(), axis=1, count=into_TD.shape[1])
    return _bits(into_TD).copy_(torch.from_numpy(ones)).neg_()


def _bits(x_TD: Tensor) -> Tensor:
    return x_TD.view(_INTEGERS[x_TD.element_size()])
