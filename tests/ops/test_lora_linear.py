"""lora_linear against its formula in fp64 numpy, its masks against the kernels' bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast import ops
from llm2vec_fast.ops.backend import kernels
from llm2vec_fast.ops.kernels.launch import recorded
from llm2vec_fast.ops.lora_linear import Drop, keep_mask, lora_linear, lora_linear_ref

SEED = 2**40 + 7
# (T, D, O, R, segments): one adapter; fused with gaps, unequal ranks and an unused rank; overlap
CASES = {
    "one value": (1, 1, 1, 1, [(0, 1, 0, 1, 1.0)]),
    "one token": (1, 37, 20, 8, [(0, 20, 0, 8, 2.0)]),
    "fused": (37, 252, 50, 18, [(0, 20, 0, 4, 2.0), (20, 30, 4, 8, 0.5), (35, 50, 10, 18, 1.5)]),
    "rows past a tile": (130, 70, 9, 20, [(0, 9, 0, 20, 0.25)]),
    "same outputs": (67, 507, 12, 6, [(0, 12, 0, 3, 1.0), (4, 12, 3, 6, -2.0)]),
}


def mask(T, D, segment, p, seed=SEED, device="cpu"):
    numbers = (torch.arange(n, dtype=torch.int32, device=device) for n in (T, D))
    return keep_mask(*numbers, segment, p, seed)


def truth(x, weight, bias, a, b, segments, p):
    y = x @ weight.T + bias
    for n, (out0, out1, r0, r1, scale) in enumerate(segments):
        kept = mask(*x.shape, n, p).numpy() / (1 - p) if p else 1.0
        y[:, out0:out1] += scale * (x * kept) @ a[r0:r1].T @ b[out0:out1, r0:r1].T
    return y


def plain(x, weight, bias, a, b, segments, p):
    """PEFT's order of things, each in the dtype of x."""
    y = F.linear(x, weight, bias)
    parts = list(y.split(1, dim=1))
    for n, (out0, out1, r0, r1, scale) in enumerate(segments):
        kept = mask(*x.shape, n, p, device=x.device).to(x.dtype) / (1 - p) if p else 1.0
        update = F.linear(F.linear(x * kept, a[r0:r1]), b[out0:out1, r0:r1]) * scale
        for n, column in enumerate(range(out0, out1)):
            parts[column] = parts[column] + update[:, n : n + 1]
    return torch.cat(parts, 1)


def drawn(case, dtype, device="cpu"):
    """x, weight, bias, a, b and the segments."""
    T, D, out, R, segments = CASES[case]
    noise = torch.Generator().manual_seed(0)
    shapes = [(T, D), (out, D), (out,), (R, D), (out, R)]
    tensors = [torch.randn(s, generator=noise, dtype=torch.float64) for s in shapes]
    return *(t.to(dtype).to(device) for t in tensors), segments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(within_rule, case, p, dtype):
    *inputs, segments = drawn(case, dtype)
    got = lora_linear(*inputs, segments, dropout_p=p, seed=SEED)
    assert got.dtype == dtype
    wide = torch.from_numpy(truth(*(t.double().numpy() for t in inputs), segments, p))
    within_rule(got, plain(*inputs, segments, p), wide)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients(p):
    T, D, out, R = 5, 4, 6, 5
    segments = [(0, 2, 0, 2, 2.0), (3, 6, 2, 4, 0.5)]
    noise = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=noise, dtype=torch.float64).requires_grad_()

    weight = make(out, D).detach()
    x, bias, a, b = make(T, D), make(out), make(R, D), make(out, R)
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: lora_linear_ref(
            x, weight, bias, a, b, segments, dropout_p=p, seed=SEED
        ),
        [x, bias, a, b],
    )


def test_no_adapter_is_a_linear_layer():
    x, weight, bias, a, b, _ = drawn("fused", torch.float32)
    want = F.linear(x, weight, bias)
    assert torch.equal(lora_linear(x, weight, bias, None, None, ()), want)
    assert torch.equal(lora_linear(x, weight, bias, a, b, ()), want)
    assert torch.equal(lora_linear(x, weight, bias, a[:0], b[:, :0], [(0, 50, 0, 0, 1.0)]), want)
    assert torch.equal(lora_linear(x, weight, None, None, None, ()), F.linear(x, weight))


# The masks.


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("seed", [0, 1, SEED, -1])
def test_masks_keep_the_right_share_everywhere(p, seed):
    T, D = 400, 500
    keep = mask(T, D, 1, p, seed).double()
    for share, count in ((keep.mean(), T * D), (keep.mean(0), T), (keep.mean(1), D)):
        deviation = (share - (1 - p)).abs().max().item()
        assert deviation < 5.5 * (p * (1 - p) / count) ** 0.5


def test_masks_are_unrelated():
    """Of neighbours, of segments and of seeds: products have the mean of independent draws."""
    T, D, p = 300, 400, 0.5
    signs = {
        (segment, seed): mask(T, D, segment, p, seed).double() * 2 - 1
        for segment in (0, 1, 2)
        for seed in (0, 1, 2**31, 2**62 - 1, SEED)
    }
    for one, other in itertools.combinations(signs.values(), 2):
        assert abs((one * other).mean().item()) < 5 / (T * D) ** 0.5
    base = signs[0, 0]
    for rows, columns in itertools.product(range(5), range(-4, 5)):
        if (rows, columns) != (0, 0):
            moved = base.roll((rows, columns), (0, 1))
            assert abs((base * moved).mean().item()) < 5 / (T * D) ** 0.5


def test_a_mask_does_not_depend_on_the_size():
    assert torch.equal(mask(3, 5, 2, 0.5), mask(40, 90, 2, 0.5)[:3, :5])


def test_no_seed_means_a_new_one_from_torch():
    *inputs, segments = drawn("fused", torch.float32)

    def run():
        return lora_linear(*inputs, segments, dropout_p=0.5)

    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, run())


@pytest.mark.parametrize("seed", [0, SEED, -1])
def test_kernel_masks_are_these_bits(place, seed):
    T, D, p = 70, 37, 0.3
    x = torch.ones(T, D, dtype=place.dtype, device=place.device)
    # each segment has one third of the columns as its ranks: u shows the mask itself
    a = torch.eye(D, dtype=place.dtype, device=place.device)
    ranks = ((0, 0, 12), (2, 12, 25), (5, 25, 37))
    u = kernels("lora_linear").down(x, a, ranks, Drop(p, seed))
    for index, r0, r1 in ranks:
        want = mask(T, D, index, p, seed)[:, r0:r1]
        assert torch.equal(u[:, r0:r1].cpu() != 0, want)
    grown = u[u != 0]
    torch.testing.assert_close(grown, torch.full_like(grown, 1 / (1 - p)))


# The node and its kernels.


def closed(function, weight, segments, p):
    """function(x, bias, a, b) in their dtype, the weight frozen."""
    return lambda x, bias, a, b: function(x, weight.to(x.dtype), bias, a, b, segments, p)


def ours(x, weight, bias, a, b, segments, p):
    return lora_linear(x, weight, bias, a, b, segments, dropout_p=p, seed=SEED)


def reference(x, weight, bias, a, b, segments, p):
    return lora_linear_ref(x, weight, bias, a, b, segments, dropout_p=p, seed=SEED)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_kernel_values_and_gradients(place, within_rule, values_and_gradients, case, p):
    x, weight, bias, a, b, segments = drawn(case, place.dtype, place.device)
    inputs = [x, bias, a, b]
    got = values_and_gradients(closed(ours, weight, segments, p), inputs)
    eager = values_and_gradients(closed(plain, weight, segments, p), inputs)
    exact = values_and_gradients(closed(reference, weight, segments, p), inputs, torch.float64)
    for one, other, true in zip(
        *map(itertools.chain.from_iterable, (got, eager, exact)), strict=True
    ):
        assert one.dtype == place.dtype
        within_rule(one, other, true)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_no_segment_names_is_never_read_and_gets_no_gradient(place, values_and_gradients, p):
    x, weight, bias, a, b, segments = drawn("fused", place.dtype, place.device)
    named = torch.zeros_like(b, dtype=torch.bool)
    for out0, out1, r0, r1, _ in segments:
        named[out0:out1, r0:r1] = True
    run = closed(ours, weight, segments, p)
    (want,), _ = values_and_gradients(run, [x, bias, a, b])
    wild = torch.where(named, b, 1e4)
    (got,), (_, _, da, db) = values_and_gradients(run, [x, bias, a, wild])
    assert torch.equal(got, want)
    assert (db[~named] == 0).all() and (db[named] != 0).all()
    assert (da[8:10] == 0).all() and (da[:8] != 0).any()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_kernel_reads_views_and_repeats_bitwise(place, values_and_gradients, p):
    x, weight, bias, a, b, segments = drawn("fused", place.dtype, place.device)
    run = closed(ours, weight, segments, p)
    want = values_and_gradients(run, [x, bias, a, b])
    wide = torch.full((74, 300), float("nan"), dtype=x.dtype, device=x.device)
    rows = wide[::2, 3:255].copy_(x)
    columns = x.t().contiguous().t()
    if place == ("cpu", torch.float16):
        rows = x.clone()  # torch's own half-precision GEMM reads beside such rows on the CPU
    for other in (x, rows, columns):
        got = values_and_gradients(run, [other, bias, a, b])
        for left, right in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
            if other is x:
                assert torch.equal(left, right)
            tolerance = 4 * torch.finfo(x.dtype).eps * right.abs().max().item()
            torch.testing.assert_close(left, right, rtol=0, atol=tolerance)
    x = x.requires_grad_()
    run(x, bias, a, b).sum().backward()  # a gradient whose strides are zero
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_kernel_without_tokens(place, p):
    x, weight, bias, a, b, segments = drawn("fused", place.dtype, place.device)
    x, a, b = x[:0].requires_grad_(), a.requires_grad_(), b.requires_grad_()
    y = ours(x, weight, bias, a, b, segments, p)
    assert y.shape == (0, 50)
    y.sum().backward()
    assert x.grad.shape == (0, 252)
    assert not a.grad.any() and not b.grad.any()


def test_adapters_may_be_kept_in_fp32(place, within_rule):
    x, weight, bias, a, b, segments = drawn("fused", place.dtype, place.device)
    wide_a, wide_b = (t.float().requires_grad_() for t in (a, b))
    narrow_a, narrow_b = (t.requires_grad_() for t in (a, b))
    got = ours(x, weight, bias, wide_a, wide_b, segments, 0.3)
    want = ours(x, weight, bias, narrow_a, narrow_b, segments, 0.3)
    assert got.dtype == x.dtype and torch.equal(got, want)
    got.float().square().mean().backward()
    want.float().square().mean().backward()
    for wide, narrow in ((wide_a, narrow_a), (wide_b, narrow_b)):
        assert wide.grad.dtype == torch.float32
        torch.testing.assert_close(wide.grad, narrow.grad.float(), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_wanted_gradients_are_computed(place, p):
    x, weight, bias, a, b, segments = drawn("fused", place.dtype, place.device)
    all_leaves = [t.clone().requires_grad_() for t in (x, bias, a, b)]
    full = torch.autograd.grad(
        ours(all_leaves[0], weight, *all_leaves[1:], segments, p).float().sum(), all_leaves
    )
    for n in range(4):
        leaves = [t.clone() for t in (x, bias, a, b)]
        leaves[n].requires_grad_()
        y = ours(leaves[0], weight, *leaves[1:], segments, p)
        (got,) = torch.autograd.grad(y.float().sum(), [leaves[n]])
        assert torch.equal(got, full[n])


def test_launches_and_saved_tensors_on_meta():
    """One launch forward and two backward for dropout of any number of segments; no mask kept."""
    pytest.importorskip("triton")
    T, D, out, R = 1000, 64, 96, 48
    segments = [(0, 32, 0, 16, 2.0), (32, 64, 16, 32, 2.0), (64, 96, 32, 48, 2.0)]
    for p, forward, backward in ((0.0, [], []), (0.1, ["_down"], ["_add_dx", "_da"])):
        saved = []
        shapes = [(T, D), (out, D), (out,), (R, D), (out, R)]
        inputs = [torch.empty(s, device="meta", dtype=torch.bfloat16) for s in shapes]
        for n in (0, 3, 4):
            inputs[n].requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        )
        with ops.use("triton"), recorded() as launches:
            with hooks:
                y = lora_linear(*inputs, segments, dropout_p=p, seed=1)
            assert [one.kernel.fn.__name__ for one in launches] == forward
            y.sum().backward()
        assert [one.kernel.fn.__name__ for one in launches] == forward + backward
        assert sum(saved) == T * D + out * D + R * D + out * R + T * R


def test_wrong_arguments_are_named():
    x, weight, bias, a, b, segments = drawn("fused", torch.float32)
    with pytest.raises(ValueError, match=r"lora_linear.*frozen"):
        lora_linear(x, weight.clone().requires_grad_(), bias, a, b, segments)
    with pytest.raises(ValueError, match=r"\(37, 251\) and \(50, 252\)"):
        lora_linear(x[:, 1:], weight, bias, a, b, segments)
    with pytest.raises(ValueError, match=r"\(1, 37, 252\)"):
        lora_linear(x[None], weight, bias, a, b, segments)
    with pytest.raises(ValueError, match=r"bias.*\(50,\).*\(49,\)"):
        lora_linear(x, weight, bias[1:], a, b, segments)
    with pytest.raises(ValueError, match=r"float32.*float16"):
        lora_linear(x, weight.half(), bias, a, b, segments)
    with pytest.raises(ValueError, match=r"\(18, 251\) and \(50, 18\)"):
        lora_linear(x, weight, bias, a[:, 1:], b, segments)
    with pytest.raises(ValueError, match=r"belong together"):
        lora_linear(x, weight, bias, None, b, segments)
    for bad in ([(0, 51, 0, 4, 1.0)], [(0, 50, 0, 19, 1.0)], [(9, 8, 0, 4, 1.0)]):
        with pytest.raises(ValueError, match=r"not within 50 outputs and 18 ranks"):
            lora_linear(x, weight, bias, a, b, bad)
    with pytest.raises(ValueError, match=r"shares ranks"):
        lora_linear(x, weight, bias, a, b, [(0, 9, 0, 4, 1.0), (9, 50, 3, 8, 1.0)])
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"dropout_p"):
            lora_linear(x, weight, bias, a, b, segments, dropout_p=p)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("T", "D", "widths"),
    [(131_072, 2048, (2048, 512, 512)), (16_384, 4096, (4096, 1024, 1024)), (2056, 4096, (507,))],
)
def test_kernel_at_real_sizes(within_rule, T, D, widths, p):
    """Against eager torch in bf16 with the same masks, truth in fp32 with fp32 products."""
    noise = torch.Generator("cuda").manual_seed(0)

    def make(*shape, scale):
        return (torch.randn(shape, generator=noise, device="cuda") * scale).bfloat16()

    ends = np.cumsum(widths).tolist()
    segments = [
        (end - width, end, 16 * n, 16 * n + 16, 2.0)
        for n, (end, width) in enumerate(zip(ends, widths, strict=True))
    ]
    R, out = 16 * len(widths), ends[-1]
    x, weight = make(T, D, scale=1.0), make(out, D, scale=D**-0.5)
    a, b = make(R, D, scale=D**-0.5), make(out, R, scale=0.25)
    dy = make(T, out, scale=1.0)

    def run(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, a, b)]
        y = F.linear(leaves[0], weight.to(dtype))
        parts = []
        for n, (out0, out1, r0, r1, scale) in enumerate(segments):
            kept = mask(T, D, n, p, device="cuda").to(dtype) / (1 - p) if p else 1.0
            u = F.linear(leaves[0] * kept, leaves[1][r0:r1])
            parts.append(y[:, out0:out1] + F.linear(u, leaves[2][out0:out1, r0:r1]) * scale)
        y = torch.cat(parts, 1)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def twice():
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = lora_linear(leaves[0], weight, None, *leaves[1:], segments, dropout_p=p, seed=SEED)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    with ops.use("triton"):
        got, again = twice(), twice()
    assert all(map(torch.equal, got, again))
    plain_ones = run(torch.bfloat16)
    exact = run(torch.float32)
    for one, other, true in zip(got, plain_ones, exact, strict=True):
        within_rule(one, other, true.double())


@pytest.mark.gpu
def test_kernel_past_two_billion_elements():
    """Offsets beyond 2^31: the last token of 131,072 before a down projection of Llama-3 8B's."""
    T, D, out, p = 131_072, 16_640, 64, 0.3
    x = torch.zeros(T, D, dtype=torch.bfloat16, device="cuda")
    noise = torch.Generator("cuda").manual_seed(0)
    x[-1] = torch.randn(D, generator=noise, device="cuda").bfloat16()
    a = torch.randn(16, D, generator=noise, device="cuda").bfloat16().requires_grad_()
    b = torch.randn(out, 16, generator=noise, device="cuda").bfloat16()
    weight = torch.zeros(out, D, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_()
    with ops.use("triton"):
        y = lora_linear(x, weight, None, a, b, [(0, out, 0, 16, 1.0)], dropout_p=p, seed=SEED)
        y.backward(torch.ones_like(y))
    rows = torch.tensor([T - 1], dtype=torch.int32, device="cuda")
    keep = keep_mask(rows, torch.arange(D, dtype=torch.int32, device="cuda"), 0, p, SEED)
    kept = keep.double() / (1 - p)
    u = (x[-1:].double() * kept) @ a.double().t()
    du = b.double().sum(0, keepdim=True)

    def near(got, want):
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < 0.02

    near(y[-1:], u @ b.double().t())
    near(x.grad[-1:], (du @ a.double()) * kept)
    near(a.grad, du.t() @ (x[-1:].double() * kept))
    assert ((x.grad[-1:] == 0) | keep).all()
