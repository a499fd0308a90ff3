"""add_rms_norm against the formula of the paper in fp64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2vec_fast.ops import add_rms_norm, add_rms_norm_ref

EPS = 1e-5


def truth(x, residual, weight, eps):
    """(y, r) in fp64: r is rounded to x's dtype as the residual stream is, y is not."""
    r = x if residual is None else x + residual
    wide = r.double().numpy()
    y = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight.double().numpy()
    return torch.from_numpy(y), r


def plain(r, weight, eps):
    """The same in plain torch, every step in the given dtype."""
    return r * torch.rsqrt(r.square().mean(-1, keepdim=True) + eps) * weight


def draw(shape, dtype, seed=0, scale=1.0):
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=noise, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (5, 252), (3, 507), (2, 3, 37)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_the_formula(within_rule, dtype, shape, with_residual):
    x, weight = draw(shape, dtype), draw(shape[-1:], dtype, 1)
    residual = draw(shape, dtype, 2, 3.0) if with_residual else None
    y, r = add_rms_norm(x, residual, weight, EPS)
    want, want_r = truth(x, residual, weight, EPS)
    assert y.dtype == r.dtype == dtype
    assert torch.equal(r, want_r)
    within_rule(y, plain(want_r, weight, EPS), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(rounded_once, dtype):
    x, residual, weight = draw((37, 252), dtype), draw((37, 252), dtype, 2), draw((252,), dtype, 1)
    y, _ = add_rms_norm(x, residual, weight, EPS)
    rounded_once(y, truth(x, residual, weight, EPS)[0])


def test_extreme_values_do_not_overflow(within_rule):
    x = draw((4, 252), torch.float16, scale=1.0)
    x *= 60_000 / x.abs().max()  # squares are far beyond fp16
    weight = torch.ones(252, dtype=torch.float16)
    y, _ = add_rms_norm(x, None, weight, EPS)
    want, _ = truth(x, None, weight, EPS)
    within_rule(y, y, want)
    assert (y.double() - want).abs().max() <= 2e-3 * want.abs().max()


def test_zero_rows_stay_zero_and_eps_counts():
    zeros, weight = torch.zeros(2, 8), torch.ones(8)
    assert torch.equal(add_rms_norm(zeros, None, weight, 1e-6)[0], zeros)
    small = torch.full((1, 8), 0.1)
    y, _ = add_rms_norm(small, None, weight, 1.0)
    torch.testing.assert_close(y, small / 1.01**0.5)


def test_empty_batch():
    y, r = add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), EPS)
    assert y.shape == r.shape == (0, 8)


def test_strided_inputs_give_the_same_and_are_left_alone():
    x, residual = draw((12, 37), torch.float32), draw((12, 37), torch.float32, 1)
    weight = draw((74,), torch.float32, 2)[::2]
    wide_x = torch.full((24, 74), float("nan"))[::2, ::2].copy_(x)
    columns = residual.t().contiguous().t()
    assert not wide_x.is_contiguous() and not columns.is_contiguous()
    y, r = add_rms_norm(wide_x, columns, weight, EPS)
    want_y, want_r = add_rms_norm(x, residual, weight.contiguous(), EPS)
    assert torch.equal(y, want_y) and torch.equal(r, want_r)
    assert torch.equal(wide_x, x)


def test_weight_may_be_wider_than_the_activations(within_rule):
    x, weight = draw((5, 37), torch.bfloat16), draw((37,), torch.float32, 1)
    y, _ = add_rms_norm(x, None, weight, EPS)
    assert y.dtype == torch.bfloat16
    within_rule(y, plain(x, weight.bfloat16(), EPS), truth(x, None, weight, EPS)[0])


@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients(with_residual):
    x, residual = draw((3, 7), torch.float64), draw((3, 7), torch.float64, 1)
    x[1] = residual[1] = 0  # a zero row: the norm's own derivative is undefined there
    weight = draw((7,), torch.float64, 2)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]

    def call(x, residual, weight):
        return add_rms_norm_ref(x, residual if with_residual else None, weight, 0.1)

    used = leaves if with_residual else [x, residual.detach(), weight]
    assert torch.autograd.gradcheck(call, used)


def test_wrong_shapes_and_dtypes_are_named():
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"add_rms_norm.*\(7,\).*8"):
        add_rms_norm(x, None, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(3, 8\)"):
        add_rms_norm(x, torch.zeros(2, 8), torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        add_rms_norm(x, torch.zeros(3, 8, dtype=torch.bfloat16), torch.ones(8), EPS)
