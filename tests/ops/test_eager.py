"""The CPU's backend `eager` against plain torch in fp64; its masks, its bits, its memory."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast import ops
from llm2vec_fast.ops import eager
from llm2vec_fast.ops.backend import Call, available, choose, kernels
from llm2vec_fast.ops.lora_linear import Drop, keep_mask

T, D, WIDE, N, K, H = 41, 52, 70, 6, 2, 8
SEED = 2**40 + 7
LENGTHS = (7, 1, 9, 9, 15)
SEGMENTS = ((0, 20, 0, 4, 2.0), (20, 30, 4, 8, 0.5), (32, 36, 8, 18, 1.5))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Every loop over pieces turns several times, the last one short."""
    monkeypatch.setattr(eager, "SCRATCH", 4 * D * 9)
    monkeypatch.setattr(kernels("attention", "eager"), "SCORES", 4 * N * 40)
    monkeypatch.setattr(kernels("masked_token_loss", "eager"), "CHUNK", 5 * 97 * 2)
    kernels("attention", "eager")._groups.cache_clear()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what is allocated is NaN until it is written
    with ops.use("eager"):
        yield
    torch.use_deterministic_algorithms(before)
    kernels("attention", "eager")._groups.cache_clear()


def draw(*shape, seed=0, scale=1.0):
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=noise)).bfloat16().double()


def tables():
    angle = torch.outer(torch.arange(16.0), 10_000.0 ** (-torch.arange(0, H, 2) / H))
    return angle.cos(), angle.sin()


CU = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
NORM, HEAD = 1 + 0.3 * draw(D, seed=9), draw(97, D, seed=3, scale=D**-0.5)
WEIGHT, BIAS = draw(36, D, seed=4, scale=D**-0.5), draw(36, seed=8)
DOWN = draw(36, WIDE, seed=5, scale=WIDE**-0.5)
ROWS = torch.tensor([5, 0, 40, 5, 7, 9, 11])
TARGETS = torch.tensor([1, 96, -100, 3, 3, 0, -100])


def dropped(x, index, p):
    if not p:
        return x
    numbers = (torch.arange(n, dtype=torch.int32) for n in x.shape)
    return x * keep_mask(*numbers, index, p, SEED) / (1 - p)


def lora(x, weight, bias, a, b, p):
    """PEFT's order of things in the dtype of x."""
    y, a, b = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)), a.to(x.dtype), b.to(x.dtype)
    for index, (out0, out1, r0, r1, scale) in enumerate(SEGMENTS):
        update = F.linear(F.linear(dropped(x, index, p), a[r0:r1]), b[out0:out1, r0:r1]) * scale
        y = y + F.pad(update, (out0, y.shape[1] - out1))
    return y


def norm(x, residual):
    r = x + residual
    return F.rms_norm(r, (D,), NORM.to(x.dtype), 1e-5), r


def gated(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def ours_lora(p):
    return lambda x, bias, a, b: ops.lora_linear(
        x, WEIGHT.to(x.dtype), bias, a, b, SEGMENTS, dropout_p=p, seed=SEED
    )


def ours_down(p):
    return lambda x, a, b: ops.swiglu_linear(
        x, DOWN.to(x.dtype), BIAS.to(x.dtype), a, b, SEGMENTS, dropout_p=p, seed=SEED
    )


def loss(h, w):
    return ops.masked_token_loss(h, w, ROWS, TARGETS, num_items=3)


def plain_loss(h, w):
    return F.cross_entropy(F.linear(h[ROWS], w).float(), TARGETS, reduction="sum") / 3


# name: (ours, the same in plain torch, inputs)
CASES = {
    "add_rms_norm": (
        lambda x, r: ops.add_rms_norm(x, r, NORM.to(x.dtype), 1e-5), norm,
        (draw(T, D), draw(T, D, seed=1)),
    ),
    "norm of heads": (
        lambda x, w: ops.add_rms_norm(x[:, 1:4], None, w, 1e-5)[0],
        lambda x, w: F.rms_norm(x[:, 1:4], (D,), w, 1e-5),
        (draw(9, 5, D), NORM),
    ),
    "swiglu": (ops.swiglu, gated, (draw(T, 2 * WIDE, scale=3.0),)),
    "swiglu_linear": (
        lambda x, w: ops.swiglu_linear(x, w), lambda x, w: F.linear(gated(x), w),
        (draw(T, 2 * WIDE), DOWN),
    ),
    "masked_token_loss": (loss, plain_loss, (draw(T, D, scale=3.0), HEAD)),
    **{
        f"lora_linear {p}": (
            ours_lora(p), lambda x, bias, a, b, p=p: lora(x, WEIGHT, bias, a, b, p),
            (draw(T, D), BIAS, draw(18, D, seed=6), draw(36, 18, seed=7)),
        )
        for p in (0.0, 0.3)
    },
    **{
        f"swiglu and lora {p}": (
            ours_down(p), lambda x, a, b, p=p: lora(gated(x), DOWN, BIAS, a, b, p),
            (draw(T, 2 * WIDE), draw(18, WIDE, seed=6), draw(36, 18, seed=7)),
        )
        for p in (0.0, 0.3)
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(within_rule, values_and_gradients, name, dtype):
    run, plain, inputs = CASES[name]
    got = values_and_gradients(run, inputs, dtype)
    rough = values_and_gradients(plain, inputs, dtype)
    exact = values_and_gradients(plain, inputs, torch.float64)
    for one, other, true in zip(
        *map(itertools.chain.from_iterable, (got, rough, exact)), strict=True
    ):
        if true.dim():
            assert one.dtype == dtype
        # The truth of a loss is fp64 over fp32 logits; rounded logits are the dtype's own error.
        eps = torch.finfo(dtype).eps if name == "masked_token_loss" else 0
        assert one.isfinite().all()
        if eps and not true.dim():
            assert abs(one - true) <= 4 * eps * abs(true)
        else:
            within_rule(one, other, true)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_every_time(values_and_gradients, name):
    run, _, inputs = CASES[name]
    one, two = (values_and_gradients(run, inputs, torch.bfloat16) for _ in range(2))
    assert all(map(torch.equal, itertools.chain(*one), itertools.chain(*two)))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", [0, SEED, -1])
def test_kept_masks_are_the_bits_of_keep_mask(p, seed):
    x, ranks = torch.zeros(T, D), ((0, 0, 3), (4, 3, 5))
    bits = kernels("lora_linear", "eager").masks(x, ranks, Drop(p, seed, "eager"))
    assert bits.shape == (2, T, -(-D // 8)) and bits.dtype == torch.uint8
    numbers = [torch.arange(n, dtype=torch.int32) for n in (T, D)]
    for packed, (index, _, _) in zip(bits, ranks, strict=True):
        got = np.unpackbits(packed.numpy(), axis=1, count=D)
        assert np.array_equal(got.astype(bool), keep_mask(*numbers, index, p, seed).numpy())


def test_what_is_dropped_is_zero_whatever_it_was():
    """Not a product with zero: infinity and NaN in a dropped place go nowhere."""
    x, a = torch.full((T, D), float("inf")), torch.eye(D)
    run = kernels("lora_linear", "eager")
    drop = Drop(0.5, SEED, "eager")
    drop = drop._replace(masks=run.masks(x, ((0, 0, D),), drop))
    kept = keep_mask(*(torch.arange(n, dtype=torch.int32) for n in (T, D)), 0, 0.5, SEED)
    x = torch.where(kept, 1.0, x)
    assert torch.equal(run.down(x, a, ((0, 0, D),), drop), kept * 2.0)


# Attention.


def attend(**options):
    return lambda q, k, v: ops.attention(q, k, v, CU, max(LENGTHS), **options)


def heads():
    return [draw(sum(LENGTHS), n, H, seed=n + 10 * i) for i, n in enumerate((N, K, K))]


def spelled_out(q, k, v, keep=None, p=0.0, causal=False, window=None):
    """Text by text, scores in the dtype of q; keep: (tokens, heads, longest) of `mask_of`."""
    texts = []
    for start, end in itertools.pairwise(CU.tolist()):
        own = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        own[1:] = [x.repeat_interleave(N // K, 0) for x in own[1:]]
        at = torch.arange(end - start)
        apart = at[:, None] - at
        hidden = apart < 0 if causal else torch.zeros_like(apart, dtype=torch.bool)
        hidden = hidden | (apart.abs() >= window) if window else hidden
        weight = own[0] @ own[1].transpose(1, 2) * H**-0.5
        weight = weight.masked_fill(hidden, -torch.inf).softmax(-1)
        if keep is not None:
            weight = weight * keep[start:end, :, : end - start].transpose(0, 1) / (1 - p)
        texts.append((weight @ own[2]).transpose(0, 1))
    return torch.cat(texts)


def mask_of(**options):
    """(tokens, heads, longest): which weights dropout keeps, seen through values that are unit
    vectors, under equal weights.
    """
    longest = max(LENGTHS)
    unit = F.one_hot(POSITIONS, longest).float()[:, None].expand(-1, K, -1)
    zero_q, zero_k = torch.zeros(len(unit), N, longest), torch.zeros(len(unit), K, longest)
    return attend(**options)(zero_q, zero_k, unit) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 3}]
)
def test_attention_in_groups_and_blocks(within_rule, values_and_gradients, options, dtype):
    got = values_and_gradients(attend(**options), heads(), dtype)
    rough = values_and_gradients(lambda *x: spelled_out(*x, **options), heads(), dtype)
    exact = values_and_gradients(lambda *x: spelled_out(*x, **options), heads(), torch.float64)
    for each in zip(*map(itertools.chain.from_iterable, (got, rough, exact)), strict=True):
        within_rule(*each)


@pytest.mark.parametrize("scores", [1, 4 * N * 40, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_dropout(monkeypatch, within_rule, values_and_gradients, dtype, scores):
    """However texts are grouped: the backward pass draws the masks of the forward pass."""
    monkeypatch.setattr(kernels("attention", "eager"), "SCORES", scores)
    kernels("attention", "eager")._groups.cache_clear()
    p, options = 0.3, {"dropout_p": 0.3, "seed": 11}
    keep = mask_of(**options)
    got = values_and_gradients(attend(**options), heads(), dtype)
    rough = values_and_gradients(lambda *x: spelled_out(*x, keep, p), heads(), dtype)
    exact = values_and_gradients(lambda *x: spelled_out(*x, keep, p), heads(), torch.float64)
    for each in zip(*map(itertools.chain.from_iterable, (got, rough, exact)), strict=True):
        within_rule(*each)


def test_dropout_keeps_its_share_and_depends_on_the_seed_alone():
    count = N * sum(n * n for n in LENGTHS)
    one, two = mask_of(dropout_p=0.3, seed=5), mask_of(dropout_p=0.3, seed=6)
    for mask in (one, two):
        assert abs(mask.sum() / count - 0.7) < 4 * (0.21 / count) ** 0.5
    assert not torch.equal(one, two)
    torch.rand(3)
    assert torch.equal(mask_of(dropout_p=0.3, seed=5), one)


def test_attention_leaves_torch_as_it_was():
    before = torch.backends.mkldnn.matmul.fp32_precision
    q, k, v = (x.bfloat16().requires_grad_() for x in heads())
    attend()(q, k, v).sum().backward()
    with pytest.raises((IndexError, RuntimeError)):
        kernels("attention", "eager").forward(q, k[:3], v, CU, 15, False, None, 1.0, 0.0, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


# The choice of it, and what it is for.


def test_where_it_runs():
    with ops.use(None):
        x = torch.zeros(3, 4, requires_grad=True)  # without, C++ is faster where it was built
        assert choose("rope_", x) in ("cpu", "eager")
        for op in ("add_rms_norm", "swiglu", "masked_token_loss", "lora_linear"):
            assert choose(op, x) == choose(op, x.bfloat16()) == "eager"
            assert choose(op, x.double()) == choose(op, x.half()) == "reference"
        q = torch.zeros(3, 2, 4)
        assert choose("attention", q) in ("cpu", "sdpa")
        assert choose("attention", q, dropout=True) == "eager"
        assert choose("attention", q.requires_grad_()) == "eager"
    from llm2vec_fast.ops.backend import _REFUSALS

    refuses = _REFUSALS["eager"]
    assert "CPU" in refuses(Call("swiglu", "cuda", 90, torch.bfloat16))
    assert "CPU" in refuses(Call("swiglu", "meta", 90, torch.bfloat16))
    assert "float64" in available("swiglu", dtype=torch.float64)["eager"]


def test_what_is_saved_for_the_backward_pass():
    """Per token: the residual stream, what projections read, gate and up, and bits of masks."""
    x = draw(T, D).bfloat16().requires_grad_()
    a, b = draw(18, D).requires_grad_(), draw(36, 18).requires_grad_()
    gate_up = draw(T, 2 * WIDE).bfloat16().requires_grad_()
    a_down = draw(18, WIDE).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    given = [x, gate_up, WEIGHT, DOWN, NORM, a, b, a_down]
    weight, down, scale = WEIGHT.bfloat16(), DOWN.bfloat16(), NORM.bfloat16()
    given += [weight, down, scale]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [
            *ops.add_rms_norm(x, x.detach(), scale, 1e-5),
            ops.lora_linear(x, weight, None, a, b, SEGMENTS, dropout_p=0.1),
            ops.swiglu_linear(gate_up, down, None, a_down, b, SEGMENTS, dropout_p=0.1),
        ]
    for tensor in given:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    bits = 3 * (-(-D // 8) + -(-WIDE // 8))
    assert sum(kept.values()) == T * (2 * D + 4 + 2 * 18 * 2 + bits)
    assert all(y.isfinite().all() for y in outputs)
