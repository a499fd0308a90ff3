"""swiglu against its formula in fp64 numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llm2vec_fast.ops import swiglu, swiglu_ref
from llm2vec_fast.ops.swiglu import unpack_gate_up


def truth(gate_up):
    gate, up = np.split(gate_up.double().numpy(), 2, axis=-1)
    return torch.from_numpy(gate / (1 + np.exp(-gate)) * up)


def drawn(shape, dtype, scale=1.0):
    noise = torch.Generator().manual_seed(0)
    return (scale * torch.randn(shape, generator=noise, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (37, 74), (3, 504), (5, 1014), (2, 3, 10), (0, 8)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_equals_the_formula(within_rule, dtype, shape, scale):
    gate_up = drawn(shape, dtype, scale)
    half = shape[-1] // 2
    got = swiglu(gate_up)
    assert got.dtype == dtype
    if gate_up.numel() == 0:
        assert got.shape == (0, half)
        return
    plain = torch.nn.functional.silu(gate_up[..., :half]) * gate_up[..., half:]
    within_rule(got, plain, truth(gate_up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(rounded_once, dtype):
    gate_up = drawn((37, 504), dtype)
    rounded_once(swiglu(gate_up), truth(gate_up))


def test_gate_comes_first():
    gate, up = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    both = torch.cat([gate, up], dim=-1)
    assert [part.item() for part in unpack_gate_up(both)] == [2.0, 3.0]
    assert swiglu(both).item() == pytest.approx(2 / (1 + np.exp(-2)) * 3)
    gate, up = unpack_gate_up(torch.arange(6)[:, None], dim=0)  # a fused weight or bias, by rows
    assert gate.flatten().tolist() == [0, 1, 2] and up.flatten().tolist() == [3, 4, 5]


def test_extreme_values_stay_finite():
    big = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]])
    got = swiglu(big)
    assert got.isfinite().all()
    torch.testing.assert_close(got, truth(big).float())
    half = torch.tensor([[300.0, 300.0]], dtype=torch.float16)  # the product is beyond fp16
    assert swiglu(half).item() == float("inf")
    assert swiglu(half.bfloat16()).item() == pytest.approx(90_000, rel=4e-3)


def test_strided_inputs_give_the_same_and_are_left_alone():
    gate_up = drawn((5, 36), torch.float32)
    strided = torch.full((10, 72), float("nan"))[::2, ::2].copy_(gate_up)
    columns = gate_up.t().contiguous().t()
    for other in (strided, columns):
        torch.testing.assert_close(swiglu(other), swiglu(gate_up), rtol=1e-6, atol=1e-7)
    assert torch.equal(strided, gate_up)


def test_gradients():
    gate_up = drawn((3, 10), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(swiglu_ref, [gate_up])


def test_an_odd_width_is_refused_by_name():
    with pytest.raises(ValueError, match=r"swiglu.*\(3, 7\)"):
        swiglu(torch.zeros(3, 7))


# The Triton kernel, forward and backward.


def plain(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


SHAPES = [(1, 2), (37, 74), (2, 3, 504), (3, 1014), (2, 4112)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_kernel_values_and_gradients(place, draw, within_rule, values_and_gradients, shape, scale):
    gate_up = draw(shape, place, scale)
    got = values_and_gradients(swiglu, [gate_up])
    eager = values_and_gradients(plain, [gate_up])
    exact = values_and_gradients(swiglu_ref, [gate_up], torch.float64)
    for one, other, true in zip(
        *map(itertools.chain.from_iterable, (got, eager, exact)), strict=True
    ):
        assert one.dtype == place.dtype
        within_rule(one, other, true)


def test_kernel_reads_views_and_leaves_them_alone(place, draw, values_and_gradients):
    gate_up = draw((5, 36), place)
    wide = torch.full((10, 40), float("nan"), dtype=place.dtype, device=place.device)
    rows = wide[::2, 2:38].copy_(gate_up)
    columns = gate_up.t().contiguous().t()
    expected = values_and_gradients(swiglu, [gate_up])
    for other in (rows, columns):
        for left, right in zip(values_and_gradients(swiglu, [other]), expected, strict=True):
            assert torch.equal(left[0], right[0])
    assert torch.equal(rows, gate_up)


def test_kernel_extremes_and_empty(place):
    big = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]], dtype=place.dtype)
    got = swiglu(big.to(place.device)).cpu()
    torch.testing.assert_close(got.double(), truth(big), rtol=1e-2, atol=1e-6)
    nothing = torch.zeros(0, 8, dtype=place.dtype, device=place.device, requires_grad=True)
    y = swiglu(nothing)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert nothing.grad.shape == (0, 8)


@pytest.mark.gpu
def test_kernel_past_two_billion_elements(draw, within_rule):
    """Offsets beyond 2^31: the last row of a 7B's gate-up projection of 131,072 tokens."""
    gate_up = torch.zeros(131_072, 28_672, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(28_672, device="cuda").bfloat16()
    gate_up[-1] = last
    gate_up.requires_grad_()
    y = swiglu(gate_up)
    y.backward(torch.ones_like(y))
    alone = last.clone()[None].requires_grad_()
    expected = swiglu(alone)
    expected.backward(torch.ones_like(expected))
    assert torch.equal(y[-1], expected[0]) and torch.equal(gate_up.grad[-1], alone.grad[0])
