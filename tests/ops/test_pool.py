"""pool against sums spelled out in fp64 numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops import pool, pool_ref
from llm2vec_fast.ops.backend import kernels
from llm2vec_fast.ops.kernels.launch import recorded

MODES = ("mean", "weighted_mean", "last", "first")
SPANS = [(0, 1), (1, 4), (6, 7), (7, 44), (50, 302)]  # gaps, one-token spans, 3, 37, 252
TOKENS = 302


def truth(hidden, spans, mode, normalize=False):
    hidden, rows = hidden.double().numpy(), []
    for start, end in spans:
        block = hidden[start:end]
        weights = {
            "mean": np.ones(end - start),
            "weighted_mean": np.arange(1, end - start + 1),
            "last": np.arange(end - start) == end - start - 1,
            "first": np.arange(end - start) == 0,
        }[mode]
        row = (block * weights[:, None]).sum(0) / weights.sum()
        rows.append(row / np.linalg.norm(row) if normalize else row)
    return torch.from_numpy(np.array(rows))


def plain(hidden, spans, mode, normalize=False):
    rows = []
    for start, end in spans:
        block = hidden[start:end]
        i = torch.arange(1, end - start + 1, dtype=hidden.dtype, device=hidden.device)[:, None]
        row = {
            "mean": block.mean(0),
            "weighted_mean": (i * block).sum(0) / i.sum(),
            "last": block[-1],
            "first": block[0],
        }[mode]
        rows.append(row / row.norm() if normalize else row)
    return torch.stack(rows)


def draw(shape, dtype=torch.float32, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)


def spans_of(pairs, dtype=torch.int32):
    return torch.tensor(pairs, dtype=dtype)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 37])
def test_equals_the_formula(within_rule, mode, dtype, size, normalize):
    hidden = draw((TOKENS, size), dtype)
    got = pool(hidden, spans_of(SPANS), mode, normalize)
    assert got.dtype == torch.float32
    within_rule(got, plain(hidden, SPANS, mode, normalize), truth(hidden, SPANS, mode, normalize))
    wide = pool(hidden.float(), spans_of(SPANS), mode, normalize)  # sums are fp32 whatever comes in
    torch.testing.assert_close(got, wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_many_one_token_texts(mode):
    hidden = draw((500, 5), torch.bfloat16)
    spans = spans_of([(i, i + 1) for i in range(500)])
    assert torch.equal(pool(hidden, spans, mode), hidden.float())


def test_weights_count_within_the_span_not_the_batch():
    hidden = torch.tensor([[100.0], [1.0], [2.0], [4.0]])
    got = pool(hidden, spans_of([(1, 4)]), "weighted_mean")
    assert got.item() == pytest.approx((1 * 1 + 2 * 2 + 3 * 4) / 6)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_outside_the_span_do_not_matter(mode):
    hidden = draw((TOKENS, 7))
    poisoned = hidden.clone()
    inside = np.concatenate([np.arange(*span) for span in SPANS])
    poisoned[np.setdiff1d(np.arange(TOKENS), inside)] = float("nan")
    assert torch.equal(pool(poisoned, spans_of(SPANS), mode), pool(hidden, spans_of(SPANS), mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_does_not_depend_on_its_neighbours_and_repeats_bitwise(mode):
    hidden = draw((TOKENS, 37))
    together = pool(hidden, spans_of(SPANS), mode)
    assert torch.equal(together, pool(hidden, spans_of(SPANS), mode))
    for row, span in enumerate(SPANS):
        assert torch.equal(pool(hidden, spans_of([span]), mode)[0], together[row])


@pytest.mark.parametrize("mode", MODES)
def test_strided_hidden_states_and_int64_spans(mode):
    hidden = draw((TOKENS, 7))
    want = pool(hidden, spans_of(SPANS), mode)
    strided = torch.full((2 * TOKENS, 14), float("nan"))[::2, ::2].copy_(hidden)
    columns = hidden.t().contiguous().t()
    spans = spans_of(SPANS, torch.int64)
    torch.testing.assert_close(pool(strided, spans, mode), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pool(columns, spans, mode), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_no_texts(mode):
    got = pool(draw((3, 7), torch.bfloat16), torch.empty(0, 2, dtype=torch.int32), mode)
    assert got.shape == (0, 7)
    assert got.dtype == torch.float32


def test_normalised_zero_stays_finite():
    assert torch.equal(
        pool(torch.zeros(3, 4), spans_of([(0, 3)]), normalize=True), torch.zeros(1, 4)
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode, normalize):
    hidden = draw((7, 3), torch.float64).requires_grad_()
    spans = spans_of([(0, 1), (2, 6)])
    assert torch.autograd.gradcheck(lambda h: pool_ref(h, spans, mode, normalize), [hidden])


def test_wrong_arguments_are_named():
    hidden, spans = torch.zeros(5, 3), spans_of([(0, 5)])
    with pytest.raises(ValueError, match=r"'median'.*mean, weighted_mean, last, first"):
        pool(hidden, spans, "median")
    with pytest.raises(ValueError, match=r"pool.*\(1, 5, 3\).*\(1, 2\)"):
        pool(hidden[None], spans)
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(2,\)"):
        pool(hidden, spans[0])
    with pytest.raises(ValueError, match=r"\(5, 3\).*\(1, 3\)"):
        pool(hidden, torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"pool.*integer.*float32"):
        pool(hidden, spans.float())


# The Triton kernels: whole texts, slices, and the way back.

# one, two and many slices, a text that ends on a slice, gaps at both ends
LONG = [(3, 4), (4, 260), (261, 517), (517, 1030), (1040, 1041), (1300, 2068)]
LONG_TOKENS = 2070


def kernel_module():
    return kernels("pool")


@pytest.mark.parametrize(
    ("size", "mode", "normalize"),
    [*itertools.product([1, 37], MODES, [False, True]), (507, "weighted_mean", True)],
)
def test_kernel_values_and_gradients(
    place, within_rule, values_and_gradients, size, mode, normalize
):
    hidden = draw((TOKENS, size), place.dtype).to(place.device)
    spans = spans_of(SPANS).to(place.device)
    (got,), (dgot,) = values_and_gradients(lambda h: pool(h, spans, mode, normalize), [hidden])
    assert got.dtype == torch.float32 and dgot.dtype == place.dtype
    (eager,), (deager,) = values_and_gradients(
        lambda h: plain(h, SPANS, mode, normalize).float(), [hidden]
    )
    (true,), (dtrue,) = values_and_gradients(
        lambda h: pool_ref(h, spans, mode, normalize), [hidden], torch.float64
    )
    within_rule(got, eager, true)
    within_rule(dgot, deager, dtrue)


@pytest.mark.parametrize("mode", ["mean", "weighted_mean"])
def test_kernel_of_slices_gives_the_bits_of_the_kernel_of_texts(place, within_rule, mode):
    hidden = draw((LONG_TOKENS, 37), place.dtype).to(place.device)
    spans = spans_of(LONG).to(place.device)
    texts, _ = kernel_module().forward(hidden, spans, mode, False, slices=False)
    slices, _ = kernel_module().forward(hidden, spans, mode, False, slices=True)
    assert torch.equal(texts, slices)
    within_rule(slices, plain(hidden.float(), LONG, mode), truth(hidden.cpu(), LONG, mode).to(
        place.device))  # fmt: skip
    for row, span in enumerate(LONG[:4]):  # alone, a text has the same bits whatever else is there
        start, end = span
        alone = spans_of([(0, end - start)]).to(place.device)
        for by_slices in (False, True):
            one, _ = kernel_module().forward(
                hidden[start:end].clone(), alone, mode, False, slices=by_slices
            )
            assert torch.equal(one[0], texts[row])


@pytest.mark.parametrize("mode", ["weighted_mean", "last"])
def test_kernel_finds_its_text_among_many(place, values_and_gradients, mode, monkeypatch):
    """More texts than one round of the search asks for, and empty stretches between them."""
    monkeypatch.setattr(kernel_module(), "WIDE", 4)
    pairs, at = [], 5
    for n in range(21):
        pairs.append((at, at + 1 + n % 3))
        at = pairs[-1][1] + (n % 10 == 0) * 40
    hidden = draw((at + 50, 3), place.dtype).to(place.device)
    spans = spans_of(pairs, torch.int64).to(place.device)
    want, (dwant,) = values_and_gradients(lambda h: pool_ref(h, spans, mode), [hidden])
    got, (dgot,) = values_and_gradients(lambda h: pool(h, spans, mode), [hidden])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dgot, dwant, rtol=1e-6, atol=torch.finfo(place.dtype).eps)
    if mode == "weighted_mean":
        by_slices, _ = kernel_module().forward(hidden, spans, mode, False, slices=True)
        assert torch.equal(by_slices, got[0])


@pytest.mark.parametrize("mode", MODES)
def test_kernel_reads_views_and_leaves_the_rest_alone(place, values_and_gradients, mode):
    hidden = draw((TOKENS, 37), place.dtype).to(place.device)
    spans = spans_of(SPANS).to(place.device)
    inside = np.concatenate([np.arange(*span) for span in SPANS])
    outside = np.setdiff1d(np.arange(TOKENS), inside)
    hidden[outside] = float("nan")

    def run(h, spans=spans):
        return pool(h, spans, mode, True)

    want = values_and_gradients(run, [hidden])
    assert want[0][0].isfinite().all()
    assert (want[1][0][outside] == 0).all()
    wide = torch.full((2 * TOKENS, 45), float("nan"), dtype=place.dtype, device=place.device)
    rows = wide[::2, 3:40].copy_(hidden)
    columns = hidden.t().contiguous().t()
    every_second = torch.stack([spans, spans], 2)[:, :, 0]
    for other, where in ((rows, spans), (columns, spans), (hidden, every_second)):
        got = values_and_gradients(lambda h, where=where: run(h, where), [other])
        assert torch.equal(got[0][0], want[0][0]) and torch.equal(got[1][0], want[1][0])
    hidden.requires_grad_()
    run(hidden).sum().backward()  # a gradient whose strides are zero
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_kernel_without_texts_or_tokens(place, mode, normalize):
    nothing = torch.empty(0, 2, dtype=torch.int32, device=place.device)
    for tokens in (0, 40):
        hidden = draw((tokens, 7), place.dtype).to(place.device).requires_grad_()
        y = pool(hidden, nothing, mode, normalize)
        assert y.shape == (0, 7) and y.dtype == torch.float32
        y.sum().backward()
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_kernel_extremes(place):
    # Sums stay in fp32: 300 times fp16's largest value; its norm too.
    hidden = torch.full((300, 4), 65_504.0, dtype=place.dtype, device=place.device)
    spans = spans_of([(0, 300)]).to(place.device)
    got = pool(hidden, spans)
    torch.testing.assert_close(got, hidden[:1].float(), rtol=1e-6, atol=0)
    got = pool(hidden, spans, normalize=True)
    torch.testing.assert_close(got, torch.full_like(got, 0.5))
    zero = torch.zeros(3, 4, dtype=place.dtype, device=place.device, requires_grad=True)
    y = pool(zero, spans_of([(0, 3)]).to(place.device), normalize=True)
    assert torch.equal(y, torch.zeros_like(y))
    y.backward(torch.zeros_like(y))
    assert torch.equal(zero.grad, torch.zeros_like(zero))


def test_launches_on_meta():
    """Few programs or many texts, the number of launches is small, and nothing asks the device."""
    pytest.importorskip("triton")
    for texts, length, forward in ((64, 512, ["_texts"]), (1, 8192, ["_slices", "_finish"])):
        for normalize in (False, True):
            hidden = torch.empty(texts * length, 4096, device="meta", requires_grad=True)
            spans = torch.empty(texts, 2, dtype=torch.int32, device="meta")
            with ops.use("triton"), recorded() as launches:
                pool(hidden, spans, "mean", normalize).sum().backward()
            expected = forward + ["_normalise", "_unnormalise"] * normalize + ["_spread"]
            assert [one.kernel.fn.__name__ for one in launches] == expected


def made_on_gpu(T, D, dtype=torch.bfloat16):
    noise = torch.Generator("cuda").manual_seed(0)
    return torch.randn(T, D, generator=noise, device="cuda", dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("D", [576, 2048, 4096])
def test_kernel_at_real_sizes(within_rule, D, mode, normalize):
    """131,072 tokens: one text of 32,768, then short ones; both kernels, bitwise, twice."""
    lengths = [32_768, 8191, 257, 256, 255, 1, *[512, 37] * 160]
    ends = np.cumsum(lengths) + 11
    pairs = [(int(end - n), int(end)) for n, end in zip(lengths, ends, strict=True)]
    hidden = made_on_gpu(131_072, D)
    hidden[:11] = hidden[ends[-1] :] = float("nan")
    spans = spans_of(pairs).cuda()

    def run(function, h):
        h = h.detach().requires_grad_()
        y = function(h, spans, mode, normalize)
        weight = made_on_gpu(len(pairs), D, torch.float32).to(y.dtype)
        return y.detach(), torch.autograd.grad(y, h, weight)[0]

    with ops.use("triton"):
        got, again = run(pool, hidden), run(pool, hidden)
        assert all(map(torch.equal, got, again))
        by_slices, _ = kernel_module().forward(hidden, spans, mode, normalize, slices=True)
        by_texts, _ = kernel_module().forward(hidden, spans, mode, normalize, slices=False)
        assert torch.equal(by_slices, by_texts) and torch.equal(by_texts, got[0])
        for row in (0, 1, 2, 5, 300):
            alone = pool(hidden, spans[row : row + 1], mode, normalize)
            assert torch.equal(alone[0], got[0][row])
    near = run(lambda h, s, m, n: plain(h.float(), pairs, m, n), hidden)
    exact = run(pool_ref, hidden.double())
    for one, other, true in zip(got, near, exact, strict=True):
        within_rule(one, other, true)


@pytest.mark.gpu
def test_kernel_past_two_billion_elements():
    """Offsets beyond 2^31 elements: 600,000 tokens of a 7B."""
    T, D = 600_000, 4096
    hidden = torch.zeros(T, D, dtype=torch.bfloat16, device="cuda")
    hidden[-300:] = made_on_gpu(300, D)
    pairs = [(0, T - 300), (T - 300, T)]
    last = hidden[-300:].clone().requires_grad_()
    hidden.requires_grad_()
    with ops.use("triton"):
        for mode in MODES:
            y = pool(hidden, spans_of(pairs).cuda(), mode)
            alone = pool(last, spans_of([(0, 300)]).cuda(), mode)
            assert not y[0].any() and torch.equal(y[1], alone[0])
            (grad,) = torch.autograd.grad(y[1].sum(), hidden)
            (want,) = torch.autograd.grad(alone.sum(), last)
            assert torch.equal(grad[-300:], want)
            assert not grad[:-300].any()
