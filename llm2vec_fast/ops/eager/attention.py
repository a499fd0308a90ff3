"""Attention on the CPU for training: texts of about one length at a time, and of their scores no
more than stays in the cache; the backward pass makes them anew. Nothing of it is saved.

T tokens, N query heads, K kv heads, R = N / K, H head dim; B texts of a group, L their length,
Q queries of a block
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SCORES = 4 << 20  # bytes of fp32 scores at a time
_LOW = -1e30  # finite: a padding query that sees nothing must not become NaN


class Group(NamedTuple):
    """Texts that are computed together: shorter ones are filled up with copies of their last token,
    which nobody sees and which are not written back.
    """

    shape: tuple[int, int]  # B, L
    rows: slice | Tensor  # where its tokens lie in the packed tensors, B L of them
    real_BL: Tensor | None  # which of them are no copies; None if none is a copy
    step: int  # queries of a block


@functools.lru_cache(64)
def _groups(bounds: tuple[int, ...], heads: int) -> tuple[Group, ...]:
    """All texts, the longest first, in groups that waste little and whose scores fit."""
    texts = sorted(itertools.pairwise(bounds), key=lambda text: text[0] - text[1])
    groups: list[list[tuple[int, int]]] = []
    for start, end in texts:
        if groups:
            first, last = groups[-1][0]
            longest = last - first
            fits = (len(groups[-1]) + 1) * heads * longest * longest * 4 <= SCORES
            if fits and end - start >= longest * 7 // 8 - 2:
                groups[-1].append((start, end))
                continue
        groups.append([(start, end)])
    return tuple(_group(texts, heads) for texts in groups)


def _group(texts: list[tuple[int, int]], heads: int) -> Group:
    start_B1, end_B1 = torch.tensor(texts).t()[:, :, None]
    longest = texts[0][1] - texts[0][0]
    rows_BL = start_B1 + torch.arange(longest)
    real_BL = None if bool((rows_BL < end_B1).all()) else rows_BL < end_B1
    rows = rows_BL.minimum(end_B1 - 1).flatten()
    first = texts[0][0]
    if torch.equal(rows, torch.arange(first, first + len(rows))):
        rows = slice(first, first + len(rows))
    step = SCORES // (len(texts) * heads * longest * 4)
    return Group((len(texts), longest), rows, real_BL, min(max(step, 16), longest))


def forward(q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed):
    """(o, nothing to save); the arguments of `attention`."""
    o_TNH = q.new_empty(q.shape)
    drop = _Drop(dropout_p, seed) if dropout_p else None
    with _products(q.dtype):
        for group in _groups(tuple(cu_seqlens.tolist()), q.shape[1]):
            q_BKRLH, k_BKLH, v_BKLH = _gathered(group, k.shape[1], q, k, v)
            o_BKRLH = torch.empty_like(q_BKRLH)
            for at in _blocks(group):
                weight = _weights(q_BKRLH[..., at, :], k_BKLH, group, at, causal, window, scale)
                grow = 1.0
                if drop:
                    grow, keep = drop.grow, drop.keep(weight.shape)
                    weight.view(torch.int32).bitwise_and_(keep)
                out = torch.bmm(weight, v_BKLH.flatten(0, 1)).mul_(grow)
                o_BKRLH[..., at, :] = out.view(q_BKRLH[..., at, :].shape)
            _scatter(group, o_TNH, o_BKRLH)
    return o_TNH, ()


def backward(
    do, q, k, v, o, saved, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed, into=None
):
    """(dq, dk, dv), written into the tensors of `into`; those that are None there are not."""
    into = into or [x.new_empty(x.shape) for x in (q, k, v)]
    drop = _Drop(dropout_p, seed) if dropout_p else None
    bounds = tuple(cu_seqlens.tolist())
    with _products(q.dtype):
        for group in _groups(bounds, q.shape[1]):
            inputs = _gathered(group, k.shape[1], q, k, v, do)
            if group.real_BL is not None:
                inputs[3].mul_(group.real_BL[:, None, None, :, None])
            found = _gradients(group, *inputs, causal, window, scale, drop)
            for to, gradient in zip(into, found, strict=True):
                if to is not None:
                    _scatter(group, to, gradient)
    for to in into:
        if to is not None:
            to[bounds[-1] :].zero_()  # rows that no text has
    return into


def _gradients(group, q_BKRLH, k_BKLH, v_BKLH, do_BKRLH, causal, window, scale, drop):
    dq_BKRLH = torch.empty_like(q_BKRLH)
    k_XLH, v_XLH = k_BKLH.flatten(0, 1), v_BKLH.flatten(0, 1)
    dk_XLH, dv_XLH = torch.zeros_like(k_XLH), torch.zeros_like(v_XLH)
    for at in _blocks(group):
        q_BKRQH = q_BKRLH[..., at, :]
        weight = _weights(q_BKRQH, k_BKLH, group, at, causal, window, scale)
        q_XQH, do_XQH = (x[..., at, :].flatten(2, 3).flatten(0, 1) for x in (q_BKRLH, do_BKRLH))
        dweight = torch.bmm(do_XQH, v_XLH.transpose(1, 2))
        kept, grow = weight, 1.0
        if drop:
            grow, keep = drop.grow, drop.keep(weight.shape)
            dweight.view(torch.int32).bitwise_and_(keep)
            kept = (weight.view(torch.int32) & keep).view(torch.float32)
        dv_XLH += torch.bmm(kept.transpose(1, 2), do_XQH).mul_(grow)
        dscore = torch.ops.aten._softmax_backward_data(dweight, weight, -1, torch.float32)
        dq_BKRLH[..., at, :] = torch.bmm(dscore, k_XLH).mul_(scale * grow).view(q_BKRQH.shape)
        dk_XLH += torch.bmm(dscore.transpose(1, 2), q_XQH).mul_(scale * grow)
    return dq_BKRLH, dk_XLH.view(k_BKLH.shape), dv_XLH.view(v_BKLH.shape)


def _blocks(group: Group) -> Iterator[slice]:
    length = group.shape[1]
    return (slice(n, min(n + group.step, length)) for n in range(0, length, group.step))


def _weights(q_BKRQH, k_BKLH, group: Group, at: slice, causal, window, scale) -> Tensor:
    """Softmax of a block's scores, (B K, R Q, L) fp32."""
    B, K, R, Q, H = q_BKRQH.shape
    L = k_BKLH.shape[2]
    score = torch.bmm(q_BKRQH.reshape(B * K, R * Q, H), k_BKLH.flatten(0, 1).transpose(1, 2))
    score.mul_(scale)
    if group.real_BL is not None:
        hidden = (~group.real_BL).float().mul_(_LOW)
        score.view(B, -1, L).add_(hidden[:, None])
    if causal or window is not None:
        distance_QL = torch.arange(at.start, at.stop)[:, None] - torch.arange(L)
        hidden_QL = distance_QL < 0 if causal else torch.zeros_like(distance_QL, dtype=torch.bool)
        if window is not None:
            hidden_QL |= distance_QL.abs() >= window
        score.view(B * K * R, Q, L).masked_fill_(hidden_QL, _LOW)
    return torch.softmax(score, -1)


class _Drop:
    """Dropout masks, one after the other, of a seed: drawn again they are the same. 16 random bits
    decide about a weight, so that p is met within 1 / 131,072.
    """

    def __init__(self, p: float, seed: int):
        self._least = min(round(p * 65536), 65535) - 32768
        self._noise = np.random.SFC64(seed)
        self.grow = 1 / (1 - p)

    def keep(self, shape: tuple[int, ...]) -> Tensor:
        """int32, all bits where a weight is kept, else none."""
        count = int(np.prod(shape))
        drawn = self._noise.random_raw(-(-count // 4)).view(np.int16)[:count]
        return torch.from_numpy(drawn).ge_(self._least).neg_().view(shape).to(torch.int32)


def _gathered(group: Group, K: int, *tensors: Tensor) -> list[Tensor]:
    """fp32 copies of a group's rows of q, k, v and perhaps do: (B, K, R, L, H), or (B, K, L, H) of
    k and v.
    """
    found = []
    for n, x in enumerate(tensors):
        x = x[group.rows] if isinstance(group.rows, slice) else x.index_select(0, group.rows)
        x = _by_head(x.unflatten(0, group.shape), K)
        x = x.squeeze(2) if n in (1, 2) else x
        found.append(x.to(torch.float32, memory_format=torch.contiguous_format, copy=True))
    return found


def _by_head(x_BLNH: Tensor, K: int) -> Tensor:
    return x_BLNH.unflatten(2, (K, -1)).permute(0, 2, 3, 1, 4)  # (B, K, R, L, H)


def _scatter(group: Group, to_TNH: Tensor, found: Tensor) -> None:
    """The way back of `_gathered`."""
    found = found if found.dim() == 5 else found.unsqueeze(2)
    if isinstance(group.rows, slice):
        _by_head(to_TNH[group.rows].unflatten(0, group.shape), found.shape[1]).copy_(found)
        return
    rows_XNH = to_TNH.new_empty(len(group.rows), *to_TNH.shape[1:])
    _by_head(rows_XNH.unflatten(0, group.shape), found.shape[1]).copy_(found)
    if group.real_BL is None:
        to_TNH.index_copy_(0, group.rows, rows_XNH)
    else:
        real = group.real_BL.flatten()
        to_TNH.index_copy_(0, group.rows[real], rows_XNH[real])


@contextlib.contextmanager
def _products(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products of numbers that came in bf16 run in bf16's matrix units: q, k, v and do lose
    nothing by it, weights as much as flash attention rounds off, and sums stay fp32.
    """
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        setting.fp32_precision = before
