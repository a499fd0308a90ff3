"""add_rms_norm against the paper's formula in fp64 numpy, its kernels against fp64 autograd."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref

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


def drawn(shape, dtype, seed=0, scale=1.0):
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=noise, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (5, 252), (3, 507), (2, 3, 37)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_the_formula(within_rule, dtype, shape, with_residual):
    x, weight = drawn(shape, dtype), drawn(shape[-1:], dtype, 1)
    residual = drawn(shape, dtype, 2, 3.0) if with_residual else None
    y, r = add_rms_norm(x, residual, weight, EPS)
    want, want_r = truth(x, residual, weight, EPS)
    assert y.dtype == r.dtype == dtype
    assert torch.equal(r, want_r)
    within_rule(y, plain(want_r, weight, EPS), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(rounded_once, dtype):
    x, residual, weight = (
        drawn((37, 252), dtype),
        drawn((37, 252), dtype, 2),
        drawn((252,), dtype, 1),
    )
    y, _ = add_rms_norm(x, residual, weight, EPS)
    rounded_once(y, truth(x, residual, weight, EPS)[0])


def test_extreme_values_do_not_overflow(within_rule):
    x = drawn((4, 252), torch.float16, scale=1.0)
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
    x, residual = drawn((12, 37), torch.float32), drawn((12, 37), torch.float32, 1)
    weight = drawn((74,), torch.float32, 2)[::2]
    wide_x = torch.full((24, 74), float("nan"))[::2, ::2].copy_(x)
    columns = residual.t().contiguous().t()
    assert not wide_x.is_contiguous() and not columns.is_contiguous()
    y, r = add_rms_norm(wide_x, columns, weight, EPS)
    want_y, want_r = add_rms_norm(x, residual, weight.contiguous(), EPS)
    assert torch.equal(y, want_y) and torch.equal(r, want_r)
    assert torch.equal(wide_x, x)


def test_weight_may_be_wider_than_the_activations(within_rule):
    x, weight = drawn((5, 37), torch.bfloat16), drawn((37,), torch.float32, 1)
    y, _ = add_rms_norm(x, None, weight, EPS)
    assert y.dtype == torch.bfloat16
    within_rule(y, plain(x, weight.bfloat16(), EPS), truth(x, None, weight, EPS)[0])


@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients(with_residual):
    x, residual = drawn((3, 7), torch.float64), drawn((3, 7), torch.float64, 1)
    x[1] = residual[1] = 0  # a zero row: the norm's own derivative is undefined there
    weight = drawn((7,), torch.float64, 2)
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
    with pytest.raises(ValueError, match=r"\(1, 8\).*\(3, 8\)"):
        add_rms_norm(x, None, torch.ones(1, 8), EPS)
    with pytest.raises(ValueError, match=r"int64.*float32"):
        add_rms_norm(x.long(), None, torch.ones(8), EPS)


# The Triton kernels, forward and backward.


@pytest.fixture
def kernel():
    return pytest.importorskip("llm2vec_fast.ops.kernels.add_rms_norm")


def plain_pair(x, residual, weight):
    r = x if residual is None else x + residual
    return plain(r, weight, EPS), r


def alike(one, other):
    """Equal but for the order of sums, which on a GPU depends on how rows lie in memory."""
    eps = torch.finfo(other.dtype).eps
    most = other.abs().max().item()
    torch.testing.assert_close(one, other, rtol=8 * eps, atol=8 * eps * most)


def through(norm, residual=True):
    """norm as a function of its differentiable inputs alone."""
    if residual:
        return lambda x, residual, weight: norm(x, residual, weight, EPS)
    return lambda x, weight: norm(x, None, weight, EPS)


def follows_the_rule(within_rule, values_and_gradients, inputs, got=None):
    """Values and gradients of x, (residual,) weight, against eager torch and the fp64 truth."""
    residual = len(inputs) == 3
    got = got or values_and_gradients(through(add_rms_norm, residual), inputs)
    eager = values_and_gradients(
        through(lambda x, r, w, eps: plain_pair(x, r, w), residual), inputs
    )
    true = values_and_gradients(through(add_rms_norm_ref, residual), inputs, torch.float64)
    for one, other, exact in zip(
        *map(itertools.chain.from_iterable, (got, eager, true)), strict=True
    ):
        within_rule(one.cpu(), other.cpu(), exact.cpu())


SHAPES = [(1, 1), (1, 37), (37, 37), (11, 252), (3, 507), (2, 2056), (2, 3, 64), (40,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernel_values_and_gradients(
    place, draw, within_rule, values_and_gradients, shape, with_residual
):
    x, residual = draw(shape, place), draw(shape, place, 3.0, 2)
    weight = draw(shape[-1:], place, 1.0, 1)
    inputs = [x, residual, weight] if with_residual else [x, weight]
    got = values_and_gradients(through(add_rms_norm, with_residual), inputs)
    assert all(t.dtype == place.dtype for t in itertools.chain.from_iterable(got))
    follows_the_rule(within_rule, values_and_gradients, inputs, got)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_kernel_at_other_scales(place, draw, within_rule, values_and_gradients, scale):
    inputs = [draw((5, 252), place, scale, seed) for seed in (0, 1)]
    inputs.append(draw((252,), place, 1.0, 2))
    follows_the_rule(within_rule, values_and_gradients, inputs)


@pytest.mark.parametrize("shape", [(37, 252), (5, 2056)])
def test_kernel_programs_that_stay_for_many_rows(
    place, kernel, monkeypatch, draw, within_rule, values_and_gradients, shape
):
    """dweight is summed by few programs over many rows each, then over the programs."""
    monkeypatch.setattr(kernel, "_stayers", lambda device, block: 2)
    inputs = [draw(shape, place), draw(shape, place, 3.0, 2), draw(shape[-1:], place)]
    got = values_and_gradients(through(add_rms_norm), inputs)
    follows_the_rule(within_rule, values_and_gradients, inputs, got)
    again = values_and_gradients(through(add_rms_norm), inputs)
    assert all(map(torch.equal, got[1], again[1]))


def test_kernel_rounds_the_residual_as_torch_does(place, draw, rounded_once):
    x, residual = draw((7, 252), place), draw((7, 252), place, 3.0, 1)
    weight = draw((252,), place, 1.0, 2)
    y, r = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(r, x + residual)
    want, _ = truth(x.cpu(), residual.cpu(), weight.cpu(), EPS)
    if place.dtype != torch.float32:
        rounded_once(y.cpu(), want)
    assert add_rms_norm(x, None, weight, EPS)[1] is x


def test_kernel_takes_a_wider_weight(place, draw, within_rule, values_and_gradients):
    x, residual = draw((5, 252), place), draw((5, 252), place, 3.0, 1)
    weight = draw((252,), place, 1.0, 2).float()
    (y, _), (dx, _, dweight) = values_and_gradients(through(add_rms_norm), [x, residual, weight])
    assert y.dtype == dx.dtype == place.dtype and dweight.dtype == torch.float32
    inputs = [x, residual, weight]
    (true_y, _), true = values_and_gradients(through(add_rms_norm_ref), inputs, torch.float64)
    rounded = [x, residual, weight.to(place.dtype)]
    (eager_y, _), eager = values_and_gradients(through(add_rms_norm_ref), rounded)
    within_rule(y.cpu(), eager_y.cpu(), true_y.cpu())
    within_rule(dx.cpu(), eager[0].cpu(), true[0].cpu())
    within_rule(dweight.cpu(), eager[2].cpu(), true[2].cpu())


def test_kernel_reads_heads_where_they_lie(place, kernel, draw, values_and_gradients):
    """Query heads are a (T, N, H) view of the fused projection; nothing around them is touched."""
    qkv = torch.full((6, 7, 36), float("nan"), dtype=place.dtype, device=place.device)
    q = qkv[:, 1:5].copy_(draw((6, 4, 36), place))
    before = qkv.clone()
    weight = draw((36,), place, 1.0, 1)
    assert kernel._walked(q, kernel._heads(q))[0] is q
    assert not q.is_contiguous()

    def heads(qkv, weight):
        return add_rms_norm(qkv[:, 1:5], None, weight, EPS)[0]

    got = values_and_gradients(heads, [qkv, weight])
    alone = [q.contiguous(), weight]
    want = values_and_gradients(lambda x, w: add_rms_norm(x, None, w, EPS)[0], alone)
    alike(got[0][0], want[0][0])
    alike(got[1][1], want[1][1])
    alike(got[1][0][:, 1:5], want[1][0])
    assert torch.equal(qkv.view(torch.uint8), before.view(torch.uint8))


def test_kernel_reads_other_views(place, draw, values_and_gradients):
    x, residual = draw((5, 36), place), draw((5, 36), place, 3.0, 1)
    weight = draw((36,), place, 1.0, 2)
    want = values_and_gradients(through(add_rms_norm), [x, residual, weight])

    def gaps(t):
        wide = torch.full((10, 40), float("nan"), dtype=place.dtype, device=place.device)
        return wide[::2, 2:38].copy_(t)

    def columns(t):
        return t.t().contiguous().t()

    def deep(t):  # no two strides reach its rows
        wide = torch.full((2, 5, 3, 36), float("nan"), dtype=place.dtype, device=place.device)
        return wide[:1, :, 1:2].copy_(t.view(1, 5, 1, 36))

    far = torch.stack([weight, weight], 1)[:, 0]
    for a, b in [(gaps, columns), (columns, gaps), (gaps, gaps), (deep, deep)]:
        # On detached views: a gradient function of their own would copy them first.
        y, r = add_rms_norm(a(x), b(residual), far, EPS)
        alike(y.reshape(5, 36), want[0][0])
        assert torch.equal(r.reshape(5, 36), want[0][1])
        leaves = [t.requires_grad_() for t in (a(x), b(residual), far.detach())]
        outputs = add_rms_norm(*leaves, EPS)
        grads = torch.autograd.grad(outputs, leaves, [columns_like(o, w) for o, w in zip(
            outputs, upstream(want[0]), strict=True)])  # fmt: skip
        for one, other in zip(grads, want[1], strict=True):
            alike(one.reshape(other.shape), other)


def upstream(outputs, seed=1):
    """The weighting of `values_and_gradients`."""
    for n, y in enumerate(outputs):
        noise = torch.Generator().manual_seed(seed + n)
        weight = torch.randn(y.shape, generator=noise, dtype=torch.float64)
        yield weight.half().to(y.dtype).to(y.device)


def columns_like(output, weight):
    """weight in the shape of output, with strides that no kernel reads directly."""
    weight = weight.reshape(output.shape)
    return weight.transpose(0, -1).contiguous().transpose(0, -1)


def test_kernel_with_one_gradient_only(place, draw):
    x, residual = draw((5, 36), place), draw((5, 36), place, 3.0, 1)
    weight, d = draw((36,), place, 1.0, 2), draw((5, 36), place, 1.0, 3)

    def gradients(used, **needs):
        named = {"x": x, "residual": residual, "weight": weight}
        leaves = {k: v.detach().requires_grad_(needs.get(k, True)) for k, v in named.items()}
        outputs = add_rms_norm(*leaves.values(), EPS)
        wanted = [v for v in leaves.values() if v.requires_grad]
        found = torch.autograd.grad([outputs[n] for n in used], wanted, [d] * len(used),
                                    allow_unused=True)  # fmt: skip
        return dict(zip([k for k, v in leaves.items() if v.requires_grad], found, strict=True))

    both = gradients([0, 1])
    assert torch.equal(both["x"], both["residual"])
    stream = gradients([1])
    assert torch.equal(stream["x"], d) and torch.equal(stream["residual"], d)
    assert stream["weight"] is None
    norm = gradients([0])
    torch.testing.assert_close(norm["x"] + d, both["x"], rtol=2e-2, atol=2e-2)
    assert not torch.equal(norm["x"], both["x"])
    alike(norm["weight"], both["weight"])
    for needs in ({"weight": False}, {"x": False}, {"residual": False},
                  {"x": False, "residual": False}):  # fmt: skip
        for name, found in gradients([0, 1], **needs).items():
            alike(found, both[name])


def test_both_inputs_get_a_gradient_of_their_own(place, draw):
    x, weight = draw((5, 36), place), draw((36,), place, 1.0, 2)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    add_rms_norm(one, other, weight, EPS)[0].sum().backward()
    assert torch.equal(one.grad, other.grad) and one.grad.data_ptr() != other.grad.data_ptr()
    twice = x.clone().requires_grad_()
    add_rms_norm(twice, twice, weight, EPS)[0].sum().backward()
    assert torch.equal(twice.grad, 2 * one.grad)


def test_kernel_extremes_zero_rows_and_eps(place):
    def at(values):
        return torch.tensor(values, dtype=torch.float64).to(place.dtype).to(place.device)

    big = at([[60_000.0, -60_000.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    weight = at([1.0, 1.0, 1.0, 1.0])
    x = big.requires_grad_()
    y = add_rms_norm(x, None, weight, 1.0)[0]
    y.sum().backward()
    want, _ = truth(big.detach().cpu(), None, weight.cpu(), 1.0)
    torch.testing.assert_close(y.detach().cpu().double(), want, rtol=1e-2, atol=1e-4)
    assert torch.equal(y[1], torch.zeros_like(y[1])) and x.grad.isfinite().all()
    torch.testing.assert_close(x.grad[1], torch.ones_like(y[1]))  # rstd is 1 / sqrt(eps)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_kernel_on_nothing(place, shape):
    x, residual = (torch.zeros(shape, dtype=place.dtype, device=place.device) for _ in range(2))
    weight = torch.ones(8, dtype=place.dtype, device=place.device, requires_grad=True)
    leaves = [x.requires_grad_(), residual.requires_grad_(), weight]
    y, r = add_rms_norm(*leaves, EPS)
    assert y.shape == r.shape == shape
    (y.sum() + r.sum()).backward()
    assert x.grad.shape == residual.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_kernel_saves_the_stream_and_one_number_a_row(place, draw):
    x, residual = (draw((5, 36), place).requires_grad_() for _ in range(2))
    weight = draw((36,), place).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, r = add_rms_norm(x, residual, weight, EPS)
    assert sorted(t.data_ptr() for t in saved if t.dim() == 2) == [r.data_ptr()]
    assert sorted(tuple(t.shape) for t in saved) == [(5,), (5, 36), (36,)]


def test_changing_the_stream_before_backward_is_noticed(place, draw):
    x, residual = (draw((5, 36), place).requires_grad_() for _ in range(2))
    y, r = add_rms_norm(x, residual, draw((36,), place), EPS)
    with torch.no_grad():
        r.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


@pytest.mark.parametrize("trained", [False, True])
def test_launches_and_no_host_sync(kernel, trained):
    """On meta tensors whatever needs a value raises. A frozen weight costs nothing at all."""
    from llm2vec_fast.ops.kernels.launch import recorded

    x, residual = (torch.empty(300_000, 64, device="meta", requires_grad=True) for _ in range(2))
    weight = torch.empty(64, device="meta", requires_grad=trained)
    with ops.use("triton"), recorded(90) as launches:
        y, r = add_rms_norm(x, residual, weight, EPS)
        torch.autograd.grad([y, r], [x], [torch.empty_like(y), torch.empty_like(r)])
    forward, backward = launches
    assert forward.grid == (300_000 // 32,)
    partial = backward.args[6]
    if trained:  # asked for x alone, but the node cannot know: dweight was needed when it was made
        assert backward.grid == (132 * 4,) and partial.shape == (132 * 4, 64)
    else:
        assert backward.grid == (300_000 // 32,) and partial is None


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 2048, 4096, 8192, 16_384])
def test_kernel_at_full_size(within_rule, values_and_gradients, width):
    """Many rows for each program that stays; the same bits again."""
    noise = torch.Generator("cuda").manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=noise, device="cuda").bfloat16()

    inputs = [drawn(4099, width), drawn(4099, width), drawn(width)]
    with ops.use("triton"):
        got = values_and_gradients(through(add_rms_norm), inputs)
        again = values_and_gradients(through(add_rms_norm), inputs)
    for one, other in zip(*map(itertools.chain.from_iterable, (got, again)), strict=True):
        assert torch.equal(one, other)
    follows_the_rule(within_rule, values_and_gradients, inputs, got)


@pytest.mark.gpu
def test_kernel_past_two_billion_elements():
    """Offsets beyond 2^31: 131,072 rows inside one fused projection of 28,672 columns."""
    wide = torch.zeros(131_072, 28_672, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(4096, device="cuda").bfloat16()
    wide[-1, -4096:] = last
    x, weight = wide[:, -4096:].requires_grad_(), torch.rand(4096, device="cuda").bfloat16()
    alone = last[None].clone().requires_grad_()
    with ops.use("triton"):
        y, _ = add_rms_norm(x, None, weight, EPS)
        expected, _ = add_rms_norm(alone, None, weight, EPS)
        slope = torch.randn(4096, device="cuda").bfloat16()
        slopes = torch.zeros_like(y)
        slopes[-1] = slope
        (dx,) = torch.autograd.grad(y, x, slopes)
        (want,) = torch.autograd.grad(expected, alone, slope[None])
    alike(y[-1], expected[0])
    alike(dx[-1], want[0])
    assert torch.equal(y[:-1], torch.zeros_like(y[:-1]))


@pytest.mark.gpu
def test_kernel_on_the_heads_of_131072_tokens(within_rule):
    """The heads of 131,072 tokens of a 7B: 4,194,304 rows at two strides."""
    qkv = torch.randn(131_072, 48, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128, device="cuda").bfloat16()
    with ops.use("triton"), torch.no_grad():
        got, _ = add_rms_norm(qkv[:, :32], None, weight, EPS)
    for part in (slice(0, 64), slice(-64, None)):
        some = qkv[part, :32].cpu()
        want, _ = truth(some, None, weight.cpu(), EPS)
        within_rule(got[part].cpu(), plain(some, weight.cpu(), EPS), want)
