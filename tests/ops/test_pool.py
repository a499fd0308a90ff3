"""pool against sums spelled out in fp64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2vec_fast.ops import pool, pool_ref

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
        i = torch.arange(1, end - start + 1, dtype=hidden.dtype)[:, None]
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
