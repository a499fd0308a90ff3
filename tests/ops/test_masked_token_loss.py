"""masked_token_loss against fp64 truth: values, both gradients, memory, repeated rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llm2vec_fast import ops
from llm2vec_fast.ops.backend import kernels
from llm2vec_fast.ops.kernels.launch import recorded
from llm2vec_fast.ops.masked_token_loss import masked_token_loss, masked_token_loss_ref


def indices(rows, high, device="cpu", seed=3, dtype=torch.int64):
    noise = torch.Generator().manual_seed(seed)
    return torch.randint(high, (rows,), generator=noise).to(dtype).to(device)


# The reference.


def test_equals_the_formula(draw_fp64):
    hidden, weight = draw_fp64(9, 6), draw_fp64(11, 6, seed=1)
    rows, targets = torch.tensor([7, 0, 3, 3]), torch.tensor([10, 2, 2, 0])
    logits = hidden.numpy()[rows] @ weight.numpy().T
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), targets]
    got = masked_token_loss(hidden, weight, rows, targets)
    assert got.shape == () and got.dtype == torch.float64
    assert got.item() == pytest.approx(losses.mean(), rel=1e-12)
    targets[2] = -100
    got = masked_token_loss(hidden, weight, rows, targets)
    assert got.item() == pytest.approx(losses[[0, 1, 3]].sum() / 4, rel=1e-12)  # M counts all
    targets[0] = 5
    with pytest.raises(IndexError):  # now -100 is a target like any other, and there is none
        masked_token_loss(hidden, weight, rows, targets, ignore_index=5)
    targets[2] = 5
    got = masked_token_loss(hidden, weight, rows, targets, ignore_index=5, num_items=7)
    assert got.item() == pytest.approx(losses[[1, 3]].sum() / 7, rel=1e-12)


@pytest.fixture
def draw_fp64():
    def make(*shape, seed=0):
        noise = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    return make


def test_gradients_of_the_reference(draw_fp64):
    hidden, weight = draw_fp64(5, 3).requires_grad_(), draw_fp64(7, 3, seed=1).requires_grad_()
    rows, targets = torch.tensor([4, 1, 4]), torch.tensor([0, -100, 6])

    def loss(hidden, weight):
        return masked_token_loss_ref(hidden, weight, rows, targets, num_items=2)

    assert torch.autograd.gradcheck(loss, [hidden, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reference_computes_in_fp32(draw_fp64, dtype):
    hidden, weight = draw_fp64(5, 64).to(dtype), draw_fp64(37, 64, seed=1).to(dtype)
    rows, targets = indices(4, 5), indices(4, 37)
    with ops.use("reference"):
        got = masked_token_loss(hidden, weight, rows, targets)
    assert got.dtype == torch.float32
    exact = masked_token_loss(hidden.double(), weight.double(), rows, targets)
    assert got.item() == pytest.approx(exact.item(), rel=1e-6)


def test_what_does_not_fit_is_refused_by_name():
    hidden, weight, at = torch.zeros(5, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int64)
    bad = {
        r"\(5, 4\) and \(7, 3\)": (hidden, torch.zeros(7, 3), at, at),
        r"\(1, 5, 4\) and \(7, 4\)": (hidden[None], weight, at, at),
        r"float32 and torch.float16": (hidden, weight.half(), at, at),
        r"int64 and torch.int64": (hidden.long(), weight.long(), at, at),
        r"\(3,\) and \(2,\)": (hidden, weight, at, at[:2]),
        r"\(1, 3\) and \(1, 3\)": (hidden, weight, at[None], at[None]),
        r"bool and torch.int64": (hidden, weight, at.bool(), at),
        r"int64 and torch.float32": (hidden, weight, at, at.float()),
        r"targets meta": (hidden, weight, at, at.to("meta")),
        r"T or V is 0": (hidden[:0], weight, at, at),
        r"\(0, 4\): T or V": (hidden, weight[:0], at, at),
    }
    for message, inputs in bad.items():
        with pytest.raises(ValueError, match=rf"masked_token_loss.*{message}"):
            masked_token_loss(*inputs)
    for count in (0, -1.0, float("nan"), torch.ones(1)):
        with pytest.raises(ValueError, match="num_items"):
            masked_token_loss(hidden, weight, at, at, num_items=count)


# The Triton kernels.


def plain(hidden, weight, rows, targets):
    """What Hugging Face's models do: logits in their dtype, the loss in fp32."""
    return F.cross_entropy(F.linear(hidden[rows], weight).float(), targets.long())


def check(got, eager, exact, within_rule, inputs):
    """The tolerance rule for both gradients; the loss gets beside it what differently rounded
    logits do to a mean: a half eps of the largest logit over the square root of the rows.
    """
    for one, other, true in zip(got[1], eager[1], exact[1], strict=True):
        assert one.dtype == inputs[0].dtype and one.is_contiguous()
        within_rule(one, other, true)
    (loss,), (other,), (true,) = got[0], eager[0], exact[0]
    assert loss.dtype == torch.float32 and loss.shape == ()
    top = F.linear(inputs[0].double(), inputs[1].double()).abs().max()
    allowed = 2 * (other - true).abs() + 4 * torch.finfo(torch.float32).eps * true.abs()
    allowed += 0.5 * torch.finfo(inputs[0].dtype).eps * top / inputs[2].shape[0] ** 0.5
    assert (loss - true).abs() <= allowed


def compare(inputs, within_rule, values_and_gradients):
    got = values_and_gradients(masked_token_loss, inputs)
    eager = values_and_gradients(plain, inputs)
    exact = values_and_gradients(masked_token_loss_ref, inputs, torch.float64)
    check(got, eager, exact, within_rule, inputs)


def drawn(draw, place, T, D, V, M, spread=2.0):
    hidden = draw((T, D), place)
    weight = draw((V, D), place, spread / D**0.5, seed=1)
    return [hidden, weight, indices(M, T, place.device), indices(M, V, place.device, 4)]


@pytest.mark.parametrize(
    "T, D, V, M",
    [(1, 1, 1, 1), (4, 37, 37, 3), (9, 8, 252, 5), (6, 64, 507, 7), (3, 37, 2056, 4), (2, 8, 1, 2)],
)
def test_kernel_values_and_gradients(place, draw, within_rule, values_and_gradients, T, D, V, M):
    """Rows repeat: M of T are drawn with replacement, in no order."""
    compare(drawn(draw, place, T, D, V, M), within_rule, values_and_gradients)


@pytest.mark.parametrize("spread", [0.1, 60.0])
def test_kernel_flat_and_peaked(place, draw, within_rule, values_and_gradients, spread):
    compare(drawn(draw, place, 5, 16, 300, 4, spread), within_rule, values_and_gradients)


def test_kernel_loops_over_blocks(place, draw, within_rule, values_and_gradients):
    """A row of two and a bit of the kernel's blocks (8,192 columns); the target in each of them."""
    inputs = drawn(draw, place, 3, 16, 16_500, 3)
    inputs[3] = torch.tensor([16_499, 8_192, 5], device=place.device)
    compare(inputs, within_rule, values_and_gradients)


def chunks_of(monkeypatch, rows, V, dtype):
    module = kernels("masked_token_loss")
    monkeypatch.setattr(module, "WORKSPACE", rows * -(-V // 64) * 64 * dtype.itemsize)
    assert module.chunk_rows(V, dtype.itemsize) == rows


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_kernel_over_chunks(monkeypatch, place, draw, within_rule, values_and_gradients, rows):
    inputs = drawn(draw, place, 20, 16, 100, 9)
    chunks_of(monkeypatch, rows, 100, place.dtype)
    compare(inputs, within_rule, values_and_gradients)


def test_ignored_rows_and_the_divisor(place, draw, values_and_gradients):
    hidden, weight, rows, targets = drawn(draw, place, 8, 16, 100, 5)
    targets[1] = targets[4] = -100
    kept = targets != -100

    def of(rows, targets, **options):
        return values_and_gradients(
            lambda *x: masked_token_loss(*x, rows, targets, **options), [hidden, weight]
        )

    expected = of(rows[kept], targets[kept], num_items=10)
    for count in (10, 10.0, torch.tensor(10, device=place.device), torch.tensor(10.0)):
        got = of(rows, targets, num_items=count)
        for one, other in zip(got[0] + got[1], expected[0] + expected[1], strict=True):
            torch.testing.assert_close(one, other, rtol=3e-3, atol=1e-5)
    default = of(rows, targets)
    torch.testing.assert_close(default[0][0], 2 * expected[0][0], rtol=3e-3, atol=1e-5)
    free = next(token for token in range(100) if token not in targets)
    again = of(rows.int(), targets.masked_fill(~kept, free).int(), ignore_index=free, num_items=10)
    for one, other in zip(again[0] + again[1], got[0] + got[1], strict=True):
        assert torch.equal(one, other)
    nothing = of(rows, torch.full_like(targets, -100))
    assert nothing[0][0] == 0 and not any(x.any() for x in nothing[1])


def test_repeated_rows_add_up_and_others_are_zero(place, draw, within_rule):
    hidden, weight, _, _ = drawn(draw, place, 9, 16, 100, 1)
    rows = torch.tensor([5, 2, 5, 0, 5, 2], device=place.device)
    targets = torch.tensor([1, 2, 3, 4, 99, 2], device=place.device)

    def gradient(function, dtype):
        leaf = hidden.detach().to(dtype).requires_grad_()
        function(leaf, weight.to(dtype), rows, targets).backward()
        return leaf.grad

    got = gradient(masked_token_loss, place.dtype)
    exact = gradient(masked_token_loss_ref, torch.float64)
    within_rule(got, gradient(plain, place.dtype), exact)
    assert got[[5, 2, 0]].abs().amax(1).min() > 1e-3
    assert not got[[1, 3, 4, 6, 7, 8]].any()
    order = torch.tensor([3, 1, 5, 0, 2, 4], device=place.device)  # the rows ascending
    rows, targets = rows[order], targets[order]
    torch.testing.assert_close(gradient(masked_token_loss, place.dtype), got)


def test_no_rows_give_zero(place, draw):
    hidden, weight, rows, targets = drawn(draw, place, 4, 8, 20, 0)
    for tokens, count in ((4, None), (4, 0), (4, torch.tensor(0)), (0, None)):
        leaf = hidden[:tokens].clone().fill_(float("nan")).requires_grad_()
        head = weight.clone().requires_grad_()
        loss = masked_token_loss(leaf, head, rows, targets, num_items=count)
        loss.backward()
        assert loss.item() == 0 and loss.dtype == torch.float32
        assert leaf.grad.shape == leaf.shape and not leaf.grad.any()
        assert head.grad.shape == head.shape and not head.grad.any()
        with torch.no_grad():
            assert masked_token_loss(leaf, head, rows, targets, num_items=count).item() == 0


def test_strided_inputs_give_the_same_and_are_left_alone(place, draw, values_and_gradients):
    hidden, weight, rows, targets = drawn(draw, place, 6, 16, 100, 5)
    expected = values_and_gradients(masked_token_loss, [hidden, weight, rows, targets])

    def spread_out(x):
        if x.dim() == 1:
            wide = x.new_zeros(2 * len(x))
            wide[::2] = x
            return wide[::2]
        wide = x.new_full((2 * x.shape[0], x.shape[1] + 3), float("nan"))
        wide[::2, 1:-2] = x
        return wide[::2, 1:-2]

    wide = [spread_out(x) for x in (hidden, weight, rows, targets)]
    leaves = [x.detach().requires_grad_() for x in wide[:2]]
    loss = masked_token_loss(*leaves, *wide[2:])
    for given, x in zip(wide, (hidden, weight, rows, targets), strict=True):
        assert torch.equal(given, x)
    torch.testing.assert_close(loss.detach(), expected[0][0], rtol=1e-5, atol=1e-5)
    columns = [x.t().contiguous().t() for x in (hidden, weight)]
    got = values_and_gradients(masked_token_loss, [*columns, rows, targets])
    for one, other in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)
    loss.backward()
    assert [x.grad.shape for x in leaves] == [hidden.shape, weight.shape]


def test_a_retained_graph_gives_the_same_twice_and_scales(place, draw):
    hidden, weight, rows, targets = drawn(draw, place, 6, 16, 100, 5)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = masked_token_loss(hidden, weight, rows, targets)
    first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    scaled = torch.autograd.grad(1024 * loss, [hidden, weight])
    for one, two, three in zip(first, again, scaled, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(three, 1024 * one, rtol=1e-3, atol=1e-3 * three.abs().max())


def test_small_probabilities_do_not_vanish(place):
    """2,000 tokens of probability 3e-7, five units of fp16's last place, with a large weight."""
    if place.dtype == torch.bfloat16:
        pytest.skip("fp32's range; its 8 bits are coarser than what is asked here")
    weight = torch.tensor([[0.0, 0.0]] + 2_000 * [[-15.0, 100.0]], dtype=place.dtype)
    hidden = torch.tensor([[1.0, 0.0]], dtype=place.dtype, device=place.device).requires_grad_()
    zero = torch.zeros(1, dtype=torch.int64, device=place.device)
    masked_token_loss(hidden, weight.to(place.device), zero, zero).backward()
    p = np.exp(-15.0) / (1 + 2_000 * np.exp(-15.0))
    assert hidden.grad[0, 1].item() == pytest.approx(2_000 * 100 * p, rel=2e-3)


def test_a_frequent_token_does_not_overflow(place):
    """40 rows predict one token from a large state: its weight's gradient sums to 81,920 in fp16's
    65,504, though their mean is harmless.
    """
    hidden = torch.full((1, 2), 2048.0, dtype=place.dtype, device=place.device)
    weight = torch.zeros(2, 2, dtype=place.dtype, device=place.device)
    weight[0] = 1.0 / 16
    weight.requires_grad_()
    rows = torch.zeros(40, dtype=torch.int64, device=place.device)
    masked_token_loss(hidden, weight, rows, rows + 1).backward()
    expected = torch.tensor([[2048.0, 2048.0], [-2048.0, -2048.0]])
    torch.testing.assert_close(weight.grad.cpu().float(), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about infinities
def test_extreme_logits(place, draw):
    """As torch: infinities and NaN stay with their row, finite ones of any size do no harm."""
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=place.dtype, device=place.device)
    states = [200.0, -200.0, 6e4, -6e4, 0.0, float("inf"), float("nan")]
    hidden = torch.tensor(states, dtype=place.dtype, device=place.device)[:, None]
    for row, state in enumerate(states):
        for target in range(3):
            at = torch.tensor([row], device=place.device)
            leaf = hidden.clone().requires_grad_()
            loss = masked_token_loss(leaf, weight, at, torch.full_like(at, target))
            loss.backward()
            expected = plain(hidden, weight, at, torch.full_like(at, target))
            torch.testing.assert_close(
                loss.detach(), expected, rtol=1e-5, atol=1e-5, equal_nan=True
            )
            assert leaf.grad[row].isfinite().all() == bool(np.isfinite(state))
            assert not leaf.grad[torch.arange(7) != row].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_forbidden_tokens(place):
    """Logits of -inf (a weight of -inf): probability 0; as a target an infinite loss."""
    weight = torch.tensor([[1.0], [float("-inf")], [2.0]], dtype=place.dtype, device=place.device)
    hidden = torch.ones(1, 1, dtype=place.dtype, device=place.device)
    at = torch.zeros(1, dtype=torch.int64, device=place.device)
    assert masked_token_loss(hidden, weight, at, at + 1).item() == float("inf")
    expected = np.log(np.exp(1) + np.exp(2)) - 1
    assert masked_token_loss(hidden, weight, at, at).item() == pytest.approx(expected, rel=1e-5)
    nothing = torch.full_like(weight, float("-inf"))
    assert masked_token_loss(hidden, nothing, at, at).isnan()


@pytest.mark.parametrize("target", [-1, 100, 127, 2**40, -(2**40)])
def test_an_impossible_target_is_noticed_and_touches_nothing(place, draw, target):
    hidden, weight, rows, targets = drawn(draw, place, 4, 16, 100, 3)
    rows = torch.tensor([0, 1, 2], device=place.device)
    targets[1] = target
    hidden.requires_grad_()
    loss = masked_token_loss(hidden, weight, rows, targets)
    loss.backward()
    assert loss.isnan() and hidden.grad[1].isnan().all()
    assert hidden.grad[[0, 2, 3]].isfinite().all()


def test_a_row_outside_is_refused(place, draw):
    if place.device == "cuda":
        pytest.skip("a device-side assertion ends the process")
    hidden, weight, _, _ = drawn(draw, place, 4, 16, 100, 3)
    for row in (4, -1):
        with pytest.raises((IndexError, RuntimeError)):
            masked_token_loss(hidden, weight, torch.tensor([row]), torch.tensor([0]))


class Outputs(TorchDispatchMode):
    """Names of what runs, and the largest result in bytes."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out


def on_meta(T, D, V, M, hidden=True, weight=False, grad=True):
    """What a call does on a GPU: outputs and launches of forward and backward."""
    kind = {"device": "meta", "dtype": torch.bfloat16}
    h_TD = torch.empty(T, D, **kind, requires_grad=hidden)
    w_VD = torch.empty(V, D, **kind, requires_grad=weight)
    at = torch.empty(M, dtype=torch.int64, device="meta")
    count = torch.empty((), device="meta")
    with ops.use("triton"), recorded() as launches, Outputs() as outputs:
        with torch.set_grad_enabled(grad):
            loss = masked_token_loss(h_TD, w_VD, at, at, num_items=count)
        if loss.requires_grad:
            loss.backward()
    return outputs, [(x.kernel.__name__, x.options.get("GRADIENT")) for x in launches]


@pytest.mark.parametrize("V", [32_000, 128_256, 262_144])
def test_memory_is_bounded_and_nothing_waits(V):
    """26,214 masked rows would have up to 13.7 GB of logits; a sync raises on meta tensors."""
    pytest.importorskip("triton")
    outputs, launches = on_meta(131_072, 512, V, 26_214)
    assert outputs.largest < 300e6
    chunks = -(-26_214 // kernels("masked_token_loss").chunk_rows(V, 2))
    assert launches == chunks * [("_loss_and_gradient", True)] + [("_add_rows", None)]
    assert outputs.names.count("mm") == outputs.names.count("addmm_") == chunks


def test_only_what_is_asked_for_is_computed():
    pytest.importorskip("triton")
    size = (512, 64, 32_000, 100)
    loss, add, scale = "_loss_and_gradient", "_add_rows", "_scale"
    outputs, launches = on_meta(*size, hidden=True, weight=True)
    assert outputs.names.count("addmm_") == 2
    assert launches == [(loss, True), (add, None), (scale, None)]
    outputs, launches = on_meta(*size, hidden=False, weight=True)
    assert outputs.names.count("addmm_") == 1
    assert launches == [(loss, True), (scale, None)] and "sort" not in outputs.names
    for options in ({"hidden": False}, {"grad": False}, {"grad": False, "weight": True}):
        outputs, launches = on_meta(*size, **options)
        assert "addmm_" not in outputs.names and launches == [(loss, False)]


def test_the_loss_is_the_same_with_and_without_gradients(place, draw):
    hidden, weight, rows, targets = drawn(draw, place, 6, 16, 507, 5)
    alone = masked_token_loss(hidden, weight, rows, targets)
    assert not alone.requires_grad
    hidden.requires_grad_()
    with torch.no_grad():
        quiet = masked_token_loss(hidden, weight, rows, targets)
    loss = masked_token_loss(hidden, weight, rows, targets)
    loss.backward()
    assert torch.equal(alone, loss) and torch.equal(quiet, loss) and not quiet.requires_grad
    assert weight.grad is None


@pytest.mark.parametrize("V", [1, 37, 32_000, 128_256, 262_144, 10**6, 2**28])
def test_chunks_are_whole_tiles_within_the_workspace(V):
    module = pytest.importorskip("llm2vec_fast.ops.kernels.masked_token_loss")
    for itemsize in (2, 4):
        rows = module.chunk_rows(V, itemsize)
        assert rows >= 1 and (rows % 128 == 0 or rows < 128)
        assert rows == 1 or rows * V * itemsize <= module.WORKSPACE < 300e6


# Real sizes, on a GPU.


def real(T, M, D, V, dtype=torch.bfloat16, spread=2.0):
    noise = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(T, D, device="cuda", dtype=dtype, generator=noise)
    weight = torch.randn(V, D, device="cuda", dtype=dtype, generator=noise)
    rows = torch.randperm(T, device="cuda", generator=noise)[:M].sort().values
    targets = torch.randint(V, (M,), device="cuda", generator=noise)
    return hidden, weight.mul_(spread / D**0.5), rows, targets


@torch.no_grad()
def truth_of(hidden, weight, rows, targets):
    """Losses (M,) and gradients of their sum by the gathered rows, in fp64, 32 rows at a time."""
    losses, gradients, wide = [], [], weight.double()
    for some, wanted in zip(rows.split(32), targets.split(32), strict=True):
        logits = hidden[some].double() @ wide.t()
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        p = logits.softmax(-1)
        p[torch.arange(len(some), device=p.device), wanted] -= 1
        gradients.append(p @ wide)
    return torch.cat(losses), torch.cat(gradients)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, M, D, V", [(16_384, 3_277, 4_096, 32_000), (16_384, 1_300, 4_096, 128_256),
                   (131_072, 26_214, 2_048, 32_000), (4_096, 700, 2_048, 32_001)],
)  # fmt: skip
def test_real_sizes(within_rule, T, M, D, V):
    hidden, weight, rows, targets = real(T, M, D, V)
    hidden.requires_grad_()
    with ops.use("triton"):
        loss = masked_token_loss(hidden, weight, rows, targets, num_items=1)
        loss.backward()
    with torch.no_grad():
        logits = [F.linear(hidden[some], weight).float() for some in rows.split(1024)]
        parts = zip(logits, targets.split(1024), strict=True)
        other = sum(F.cross_entropy(x, y, reduction="sum") for x, y in parts).item()
    del logits
    some = torch.randperm(M, device="cuda")[:64]
    few = hidden.detach()[rows[some]].requires_grad_()
    F.cross_entropy(F.linear(few, weight).float(), targets[some], reduction="sum").backward()
    _, exact = truth_of(hidden, weight, rows[some], targets[some])
    within_rule(hidden.grad[rows[some]], few.grad, exact)
    assert loss.item() == pytest.approx(other, rel=5e-5)
    untouched = torch.ones(T, dtype=torch.bool, device="cuda")
    untouched[rows] = False
    assert not hidden.grad[untouched].any()


@pytest.mark.gpu
def test_the_head_gradient_over_chunks(within_rule):
    hidden, weight, rows, targets = real(16_384, 3_277, 1_024, 128_256)

    def gradient(function, dtype):
        leaf = weight.detach().to(dtype).requires_grad_()
        function(hidden.to(dtype), leaf, rows, targets).backward()
        return leaf.grad.double()

    exact = gradient(masked_token_loss_ref, torch.float32)  # 1e-6 off: four digits below bf16
    eager = gradient(plain, torch.bfloat16)
    with ops.use("triton"):
        got = gradient(masked_token_loss, torch.bfloat16)
    within_rule(got.bfloat16(), eager, exact)
    relative = (got - exact).norm() / exact.norm()
    assert relative <= 2 * (eager - exact).norm() / exact.norm()


@pytest.mark.gpu
def test_offsets_past_two_billion(monkeypatch):
    """In the workspace (were it larger), in the states' gradient and in its rows."""
    hidden, weight, rows, targets = real(20_000, 17_000, 64, 128_256)
    hidden.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss, hidden)[0][rows[-300:]].float()

    with ops.use("triton"):
        expected = gradient(masked_token_loss(hidden, weight, rows, targets))
        monkeypatch.setattr(kernels("masked_token_loss"), "WORKSPACE", 2**33)
        got = gradient(masked_token_loss(hidden, weight, rows, targets))
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max())
        tall = torch.zeros(540_000, 4_096, device="cuda", dtype=torch.bfloat16).requires_grad_()
        head = torch.randn(256, 4_096, device="cuda", dtype=torch.bfloat16)
        last = torch.tensor([0, 539_999], device="cuda")
        masked_token_loss(tall, head, last, last % 256).backward()
    for row in (0, 539_999):
        exact = head.double().mean(0) - head[row % 256].double()
        torch.testing.assert_close(tall.grad[row].double(), exact / 2, rtol=0.02, atol=0.01)
    assert not tall.grad[1:-1].any()


@pytest.mark.gpu
def test_bitwise_repeatable_without_a_sync_within_its_memory():
    hidden, weight, rows, targets = real(16_384, 4_000, 2_048, 128_256)
    rows = torch.randint(3_000, (4_000,), device="cuda")  # many repeat, in no order
    hidden.requires_grad_(), weight.requires_grad_()
    count = torch.tensor(3_500, device="cuda")

    def run():
        loss = masked_token_loss(hidden, weight, rows, targets, num_items=count)
        return loss, *torch.autograd.grad(loss, [hidden, weight])

    with ops.use("triton"):
        first = run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
        del first, again
        weight.requires_grad_(False)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        masked_token_loss(hidden, weight, rows, targets, num_items=count)
        states = rows.numel() * hidden.shape[1] * 2
        assert torch.cuda.max_memory_allocated() - before < 300e6 + states
