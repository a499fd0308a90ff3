"""swiglu_linear against the two operations apart, and what it saves."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast import ops
from llm2vec_fast.ops.backend import kernels
from llm2vec_fast.ops.kernels.launch import recorded
from llm2vec_fast.ops.lora_linear import keep_mask
from llm2vec_fast.ops.swiglu_linear import swiglu_linear, swiglu_linear_ref

SEED, RANK, SCALE = 11, 8, 2.0
KINDS = ("plain", "full", "lora", "dropout")


def drawn(T, width, D, dtype, device="cpu", scale=1.0):
    """gate_up, weight, bias, a, b"""
    noise = torch.Generator().manual_seed(0)
    shapes = [(T, 2 * width), (D, width), (D,), (RANK, width), (D, RANK)]
    tensors = [torch.randn(s, generator=noise, dtype=torch.float64) for s in shapes]
    tensors[0] *= scale
    return [t.to(dtype).to(device) for t in tensors]


def call(function, kind, weight):
    """(function of the tensors that get gradients, which of drawn() those are)"""
    if kind == "full":
        return (lambda gate_up, w, bias: function(gate_up, w, bias)), (0, 1, 2)
    if kind == "plain":
        return (lambda gate_up: function(gate_up, weight.to(gate_up.dtype))), (0,)
    p = 0.3 if kind == "dropout" else 0.0

    def run(gate_up, bias, a, b):
        segments = [(0, len(b), 0, RANK, SCALE)]
        w = weight.to(gate_up.dtype)
        return function(gate_up, w, bias, a, b, segments, dropout_p=p, seed=SEED)

    return run, (0, 2, 3, 4)


def plain(gate_up, weight, bias=None, a=None, b=None, segments=(), dropout_p=0.0, seed=None):
    gate, up = gate_up.chunk(2, -1)
    y = F.silu(gate) * up
    out = F.linear(y, weight, bias)
    if a is None:
        return out
    if dropout_p:
        numbers = (torch.arange(n, dtype=torch.int32, device=y.device) for n in y.shape)
        y = y * keep_mask(*numbers, 0, dropout_p, seed).to(y.dtype) / (1 - dropout_p)
    return out + F.linear(F.linear(y, a), b) * segments[0][-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_two_operations(within_rule, kind, dtype):
    tensors = drawn(37, 50, 20, dtype)
    run, which = call(swiglu_linear, kind, tensors[1])
    eager, _ = call(plain, kind, tensors[1])
    inputs = [tensors[n] for n in which]
    got = run(*inputs)
    assert got.dtype == dtype
    within_rule(got, eager(*inputs), eager(*(t.double() for t in inputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    noise = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (5, 3), (5,), (RANK, 3), (5, RANK)]
    tensors = [torch.randn(s, generator=noise, dtype=torch.float64) for s in shapes]
    run, which = call(swiglu_linear_ref, kind, tensors[1])
    assert torch.autograd.gradcheck(run, [tensors[n].requires_grad_() for n in which])


SIZES = [(1, 1, 1), (1, 37, 20), (37, 252, 30), (3, 507, 5), (67, 70, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_values_and_gradients(place, within_rule, values_and_gradients, kind, size):
    tensors = drawn(*size, place.dtype, place.device)
    run, which = call(swiglu_linear, kind, tensors[1])
    eager, _ = call(plain, kind, tensors[1])
    wide, _ = call(swiglu_linear_ref, kind, tensors[1])
    inputs = [tensors[n] for n in which]
    got = values_and_gradients(run, inputs)
    near = values_and_gradients(eager, inputs)
    exact = values_and_gradients(wide, inputs, torch.float64)
    for one, other, true in zip(
        *map(itertools.chain.from_iterable, (got, near, exact)), strict=True
    ):
        assert one.dtype == place.dtype
        within_rule(one, other, true)


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_extremes_views_and_no_tokens(place, values_and_gradients, kind):
    tensors = drawn(9, 40, 6, place.dtype, place.device, scale=20.0)
    run, which = call(swiglu_linear, kind, tensors[1])
    inputs = [tensors[n] for n in which]
    want = values_and_gradients(run, inputs)
    assert all(t.isfinite().all() for t in itertools.chain(*want))
    gate_up = tensors[0]
    wide = torch.full((18, 90), float("nan"), dtype=place.dtype, device=place.device)
    for view in (wide[::2, 5:85].copy_(gate_up), gate_up.t().contiguous().t()):
        got = values_and_gradients(run, [view, *inputs[1:]])
        assert all(map(torch.equal, itertools.chain(*got), itertools.chain(*want)))
    (y,), gradients = values_and_gradients(run, [gate_up[:0], *inputs[1:]])
    assert y.shape == (0, 6)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_only_wanted_gradients_are_computed(place, kind):
    tensors = drawn(9, 40, 6, place.dtype, place.device)
    run, which = call(swiglu_linear, kind, tensors[1])
    leaves = [tensors[n].clone().requires_grad_() for n in which]
    full = torch.autograd.grad(run(*leaves).float().sum(), leaves)
    for n, want in enumerate(full):
        inputs = [t.detach().clone().requires_grad_(m == n) for m, t in enumerate(leaves)]
        (got,) = torch.autograd.grad(run(*inputs).float().sum(), [inputs[n]])
        # The product comes from the pass over gate_up or from its own: rounded alike
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(37, 74), (3, 1014)])
def test_the_backward_pass_can_write_the_product(place, draw, shape):
    swiglu = kernels("swiglu")
    gate_up = draw(shape, place)
    dy = draw((shape[0], shape[1] // 2), place, seed=1)
    want = swiglu.backward(dy.clone(), gate_up)
    kept = dy.clone()
    assert torch.equal(swiglu.backward(kept, gate_up), want)
    assert torch.equal(kept, dy)
    assert torch.equal(swiglu.backward(kept, gate_up, product=True), want)
    assert torch.equal(kept, swiglu.forward(gate_up))


@pytest.mark.parametrize(
    ("kind", "forward", "backward"),
    [
        ("plain", ["_forward"], ["_backward"]),
        ("full", ["_forward"], ["_backward"]),
        ("lora", ["_forward"], ["_backward"]),
        ("dropout", ["_forward", "_down"], ["_add_dx", "_backward", "_da"]),
    ],
)
def test_launches_and_saved_tensors_on_meta(kind, forward, backward):
    """Of the tensors with a row per token only gate and up are kept (and u, RANK wide)."""
    pytest.importorskip("triton")
    T, width, D = 1000, 96, 64
    tensors = [t.bfloat16() for t in drawn(T, width, D, torch.float32, "meta")]
    run, which = call(swiglu_linear, kind, tensors[1])
    inputs = [tensors[n].requires_grad_() for n in which]
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    )
    with ops.use("triton"), recorded() as launches:
        with hooks:
            y = run(*inputs)
        assert [one.kernel.fn.__name__ for one in launches] == forward
        y.sum().backward()
    assert [one.kernel.fn.__name__ for one in launches] == forward + backward
    rows = sorted(shape for shape in saved if shape[0] == T)
    assert rows == ([] if kind in ("plain", "full") else [(T, RANK)]) + [(T, 2 * width)]


def test_wrong_arguments_are_named():
    gate_up, weight, bias, a, b = drawn(3, 4, 5, torch.float32)
    with pytest.raises(ValueError, match=r"swiglu_linear.*8.*\(5, 4\).*\(3, 7\)"):
        swiglu_linear(gate_up[:, 1:], weight)
    with pytest.raises(ValueError, match=r"\(1, 3, 8\)"):
        swiglu_linear(gate_up[None], weight)
    with pytest.raises(ValueError, match=r"swiglu_linear.*float32.*float16"):
        swiglu_linear(gate_up, weight.half())
    with pytest.raises(ValueError, match=r"swiglu_linear.*bias"):
        swiglu_linear(gate_up, weight, bias[1:])
    with pytest.raises(ValueError, match=r"swiglu_linear.*not within 5 outputs"):
        swiglu_linear(gate_up, weight, bias, a, b, [(0, 6, 0, 8, 1.0)])
    with pytest.raises(ValueError, match=r"swiglu_linear.*frozen"):
        swiglu_linear(gate_up, weight.requires_grad_(), bias, a, b, [(0, 5, 0, 8, 1.0)])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16_384, 14_336, 4096), (65_536, 1536, 576), (2056, 5504, 2048)])
def test_kernel_at_real_sizes(within_rule, kind, size):
    """Against eager torch in bf16 with the same mask; truth in fp32 with fp32 products."""
    T, width, D = size
    noise = torch.Generator("cuda").manual_seed(0)

    def make(*shape, scale=1.0):
        return (torch.randn(shape, generator=noise, device="cuda") * scale).bfloat16()

    tensors = [make(T, 2 * width), make(D, width, scale=width**-0.5), make(D)]
    tensors += [make(RANK, width, scale=width**-0.5), make(D, RANK, scale=0.25)]
    dy = make(T, D)

    def run(function, dtype):
        call_it, which = call(function, kind, tensors[1])
        leaves = [tensors[n].detach().to(dtype).requires_grad_() for n in which]
        y = call_it(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    with ops.use("triton"):
        got, again = run(swiglu_linear, torch.bfloat16), run(swiglu_linear, torch.bfloat16)
    assert all(map(torch.equal, got, again))
    near = run(plain, torch.bfloat16)
    exact = run(plain, torch.float32)
    for one, other, true in zip(got, near, exact, strict=True):
        within_rule(one, other, true.double())


@pytest.mark.gpu
def test_kernel_past_two_billion_elements():
    """Offsets beyond 2^31: 131,072 tokens of a 7B's gate and up; only the last is not zero."""
    T, width, D = 131_072, 14_336, 64
    gate_up = torch.zeros(T, 2 * width, dtype=torch.bfloat16, device="cuda")
    _, weight, _, a, b = drawn(1, width, D, torch.bfloat16, "cuda")
    noise = torch.Generator("cuda").manual_seed(0)
    gate_up[-1] = torch.randn(2 * width, generator=noise, device="cuda").bfloat16()
    last = gate_up[-1:].clone().requires_grad_()
    gate_up.requires_grad_()
    segments = [(0, D, 0, RANK, SCALE)]
    with ops.use("triton"):
        results = []
        for x in (gate_up, last):
            factor = a.clone().requires_grad_()
            y = swiglu_linear(x, weight, None, factor, b, segments)
            y[-1:].sum().backward()
            results.append((y[-1:].detach().float(), x.grad[-1:].float(), factor.grad.float()))
    for whole, alone in zip(*results, strict=True):
        assert (whole - alone).abs().max() <= 0.02 * alone.abs().max()
