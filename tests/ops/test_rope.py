"""rope_ against complex rotation in numpy, and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops.rope import rope_, rope_ref_


def tables(positions: int, half: int, theta=10_000.0):
    angle = np.arange(positions)[:, None] * theta ** (-np.arange(half) / half)
    return (torch.from_numpy(f(angle)).float() for f in (np.cos, np.sin))


def truth(qkv, positions, cos, sin, n_heads, n_kv_heads):
    """Each pair (i, i + H/2) of a query or key is a complex number turned by its angle."""
    half = cos.shape[1]
    out = qkv.double().numpy().copy().reshape(len(qkv), -1, 2 * half)
    turn = cos.double().numpy() + 1j * sin.double().numpy()
    for token, position in enumerate(positions.tolist()):
        for head in range(n_heads + n_kv_heads):
            z = out[token, head, :half] + 1j * out[token, head, half:]
            z = z * turn[position]
            out[token, head] = np.concatenate([z.real, z.imag])
    return torch.from_numpy(out.reshape(qkv.shape))


def drawn(shape, dtype=torch.float32, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype)


def plain(qkv, positions, cos, sin, n_heads, n_kv_heads):
    """Plain torch with every step, tables too, in the dtype of the projection."""
    half = cos.shape[1]
    heads = qkv.unflatten(1, (-1, 2 * half))
    c, s = (t[positions.long()].to(qkv.dtype)[:, None] for t in (cos, sin))
    left, right = heads.split(half, -1)
    turned = torch.cat([left * c - right * s, right * c + left * s], -1)
    kept = heads[:, n_heads + n_kv_heads :]
    return torch.cat([turned[:, : n_heads + n_kv_heads], kept], 1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (9, 3), (5, 1)])
@pytest.mark.parametrize("tokens, half", [(1, 1), (37, 3), (5, 32), (9, 63)])
def test_equals_complex_rotation(within_rule, dtype, heads, tokens, half):
    n, k = heads
    cos, sin = tables(50, half)
    positions = torch.arange(tokens, dtype=torch.int32) * 7 % 50
    qkv = drawn((tokens, (n + 2 * k) * 2 * half), dtype)
    want = truth(qkv, positions, cos, sin, n, k)
    other = plain(qkv, positions, cos, sin, n, k)
    values = qkv[:, (n + k) * 2 * half :].clone()
    got = rope_(qkv, positions, cos, sin, n, k)
    assert got is qkv
    assert torch.equal(got[:, (n + k) * 2 * half :], values)
    within_rule(got, other, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(rounded_once, dtype):
    cos, sin = tables(37, 32)
    positions, qkv = torch.arange(37), drawn((37, 8 * 64), dtype)
    want = truth(qkv, positions, cos, sin, 4, 2)
    rounded_once(rope_(qkv, positions, cos, sin, 4, 2), want)


@pytest.mark.parametrize("n, k", [(4, 4), (4, 2)])
def test_equals_transformers(n, k):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    half, tokens = 8, 11
    cos, sin = tables(tokens, half)
    qkv = drawn((tokens, (n + 2 * k) * 2 * half))
    heads = qkv.unflatten(1, (-1, 2 * half)).transpose(0, 1)[None]
    q, key = heads[:, :n], heads[:, n : n + k]
    want_q, want_k = apply_rotary_pos_emb(
        q, key, torch.cat([cos, cos], 1)[None], torch.cat([sin, sin], 1)[None]
    )
    got = rope_(qkv.clone(), torch.arange(tokens), cos, sin, n, k)
    got = got.unflatten(1, (-1, 2 * half)).transpose(0, 1)[None]
    torch.testing.assert_close(got[:, :n], want_q, rtol=0, atol=1e-6)
    torch.testing.assert_close(got[:, n : n + k], want_k, rtol=0, atol=1e-6)


def test_position_zero_is_left_alone_and_lengths_are_kept():
    cos, sin = tables(40, 4)
    qkv = drawn((2, 3 * 8))
    before = qkv.clone()
    rope_(qkv, torch.tensor([0, 39]), cos, sin, 1, 1)
    assert torch.equal(qkv[0], before[0])
    assert not torch.equal(qkv[1], before[1])
    torch.testing.assert_close(qkv[1, :8].norm(), before[1, :8].norm())


def test_scores_depend_on_the_distance_only():
    cos, sin = tables(64, 8)
    q, k = drawn((1, 16)), drawn((1, 16), seed=1)

    def score(at_q, at_k):
        rows = torch.cat([q, k, q], 1).repeat(2, 1)
        rope_(rows, torch.tensor([at_q, at_k]), cos, sin, 1, 1)
        return rows[0, :16] @ rows[1, 16:32]

    torch.testing.assert_close(score(3, 10), score(50, 57), rtol=0, atol=1e-5)
    assert (score(3, 10) - score(10, 3)).abs() > 1e-3


def test_works_in_place_on_rows_of_a_wider_tensor():
    cos, sin = tables(9, 4)
    wide = drawn((9, 40))
    before, positions = wide.clone(), torch.arange(9, dtype=torch.int32)
    want = rope_(wide[:, 8:32].clone(), positions, cos, sin, 1, 1)
    got = rope_(wide[:, 8:32], positions, cos, sin, 1, 1)
    assert torch.equal(got, want)
    assert torch.equal(wide[:, 8:32], want)
    assert torch.equal(wide[:, :8], before[:, :8]) and torch.equal(wide[:, 32:], before[:, 32:])
    columns = before[:, 8:32].t().contiguous().t()
    assert torch.equal(rope_(columns, positions, cos, sin, 1, 1), want)


def test_no_tokens():
    cos, sin = tables(4, 4)
    assert (
        rope_(torch.empty(0, 24), torch.empty(0, dtype=torch.int32), cos, sin, 1, 1).shape[0] == 0
    )


def test_gradients():
    cos, sin = (t.double() for t in tables(6, 2))
    positions = torch.tensor([0, 1, 2, 0, 5])
    qkv = drawn((5, 4 * 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: rope_ref_(x.clone(), positions, cos, sin, 2, 1), [qkv]
    )


def test_wrong_shapes_are_named():
    cos, sin = tables(9, 4)
    positions = torch.arange(5)
    with pytest.raises(ValueError, match=r"rope_.*\(5, 23\).*24"):
        rope_(torch.zeros(5, 23), positions, cos, sin, 1, 1)
    with pytest.raises(ValueError, match=r"\(5, 24\).*\(T, 32\)"):
        rope_(torch.zeros(5, 24), positions, cos, sin, 2, 1)
    with pytest.raises(ValueError, match=r"\(1, 5, 24\)"):
        rope_(torch.zeros(1, 5, 24), positions, cos, sin, 1, 1)
    with pytest.raises(ValueError, match=r"\(4,\).*\(5, 24\)"):
        rope_(torch.zeros(5, 24), positions[:4], cos, sin, 1, 1)
    with pytest.raises(ValueError, match=r"\(9, 4\).*\(8, 4\)"):
        rope_(torch.zeros(5, 24), positions, cos, sin[:8], 1, 1)
    with pytest.raises(ValueError, match=r"float32.*float32"):
        rope_(torch.zeros(5, 24), positions.float(), cos, sin, 1, 1)


# The Triton kernel, in place and into a new tensor.


@pytest.fixture
def kernel():
    return pytest.importorskip("llm2vec_fast.ops.kernels.rope")


def case(place, draw, tokens, heads, half, position=torch.int32):
    """qkv, and the rest of the arguments"""
    n, k = heads
    tables_ = [t.to(place.device) for t in tables(50, half)]
    positions = (torch.arange(tokens, dtype=position) * 7 % 50).to(place.device)
    return draw((tokens, (n + 2 * k) * 2 * half), place), (positions, *tables_, n, k)


CASES = [
    (1, (1, 1), 1), (37, (4, 4), 3), (5, (9, 3), 32), (5, (5, 1), 40), (3, (14, 2), 48),
    (2, (4, 2), 63), (2, (2, 1), 128),
]  # fmt: skip


@pytest.mark.parametrize("tokens, heads, half", CASES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_kernel_values_and_gradients(
    place, draw, within_rule, values_and_gradients, tokens, heads, half, scale
):
    qkv, rest = case(place, draw, tokens, heads, half)
    qkv *= scale
    wide = [t.double() if t.is_floating_point() else t for t in rest[:3]] + list(rest[3:])
    got = values_and_gradients(lambda x: rope_(x.clone(), *rest), [qkv])
    other = values_and_gradients(lambda x: plain(x, *rest), [qkv])
    true = values_and_gradients(lambda x: rope_ref_(x.clone(), *wide), [qkv], torch.float64)
    turned = sum(heads) * 2 * half
    for (one,), (eager,), (exact,) in zip(got, other, true, strict=True):
        assert one.dtype == place.dtype
        within_rule(one.cpu(), eager.cpu(), exact.cpu())
        assert torch.equal(one[:, turned:].double(), exact[:, turned:])
    assert not torch.equal(got[1][0], got[0][0])


@pytest.mark.parametrize("position", [torch.int32, torch.int64])
def test_kernel_turns_in_place_and_back(place, kernel, draw, position):
    qkv, rest = case(place, draw, 9, (5, 2), 6, position)
    before = qkv.clone()
    assert rope_(qkv, *rest) is qkv
    assert not torch.equal(qkv, before)
    if place.dtype != torch.float32:
        want = truth(before.cpu(), *(t.cpu() for t in rest[:3]), *rest[3:])
        half_ulp = 0.501 * torch.finfo(place.dtype).eps
        assert ((qkv.cpu().double() - want).abs() <= half_ulp * want.abs() + 1e-6).all()
    assert kernel.rotate_(qkv, *rest, inverse=True) is qkv
    close = 4 * torch.finfo(place.dtype).eps * before.abs().max().item()
    torch.testing.assert_close(qkv, before, rtol=0, atol=close)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("inverse", [False, True])
def test_into_a_new_tensor_is_the_same_and_copies_values(place, kernel, draw, inverse):
    qkv, rest = case(place, draw, 9, (5, 2), 6)
    extreme = torch.tensor([float("inf"), -float("inf"), float("nan")])
    qkv[:, -24:-21] = extreme  # in the left half of one head of values, the right half of another
    qkv[:, -6:-3] = extreme
    before = qkv.clone()
    new = kernel.rotated(qkv, *rest, inverse=inverse)
    assert new.data_ptr() != qkv.data_ptr()
    torch.testing.assert_close(qkv, before, rtol=0, atol=0, equal_nan=True)
    kernel.rotate_(qkv, *rest, inverse=inverse)
    torch.testing.assert_close(new, qkv, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(new[:, -24:], before[:, -24:], rtol=0, atol=0, equal_nan=True)


def test_kernel_writes_rows_of_a_wider_tensor_and_nothing_else(place, kernel, draw):
    qkv, rest = case(place, draw, 9, (2, 1), 4)
    want = rope_(qkv.clone(), *rest)
    wide = torch.full((18, 48), float("nan"), dtype=place.dtype, device=place.device)
    wide[::2, 8:40] = qkv
    before = wide.clone()
    rope_(wide[::2, 8:40], *rest)
    assert torch.equal(wide[::2, 8:40], want)
    before[::2, 8:40] = want
    assert torch.equal(wide.view(torch.uint8), before.view(torch.uint8))
    columns = qkv.t().contiguous().t()
    assert rope_(columns, *rest) is columns and torch.equal(columns, want)
    assert torch.equal(kernel.rotated(qkv.t().contiguous().t(), *rest), want)
    far = [torch.stack([t, t], -1)[..., 0] for t in rest[:3]]
    assert torch.equal(rope_(qkv.clone(), *far, *rest[3:]), want)


def test_kernel_on_a_view_inside_a_graph(place, draw):
    """In place on some columns of a tensor whose gradient is wanted: the others pass through."""
    qkv, rest = case(place, draw, 9, (2, 1), 4)
    leaf = torch.nn.functional.pad(qkv, (8, 8), value=1.0).requires_grad_()
    wide = leaf * 2
    rope_(wide[:, 8:40], *rest)
    slope = torch.ones_like(wide)
    slope[:, 8:40] = qkv
    wide.backward(slope)
    alone = qkv.clone().requires_grad_()
    rope_(alone * 2, *rest).backward(qkv)
    assert torch.equal(leaf.grad[:, 8:40], alone.grad)
    assert (leaf.grad[:, :8] == 2).all() and (leaf.grad[:, 40:] == 2).all()


def test_kernel_leaves_the_gradient_that_came_in(place, draw):
    qkv, rest = case(place, draw, 9, (2, 1), 4)
    x = qkv.clone().requires_grad_()
    slope, before = qkv + 1, qkv + 1
    rope_(x.clone(), *rest).backward(slope)
    assert torch.equal(slope, before) and not torch.equal(x.grad, before)
    y = rope_(x.clone(), *rest)
    y.sum().backward()  # one number at every place: strides are 0
    x.grad = None
    rope_(x.clone(), *rest).backward(torch.ones_like(qkv))
    whole = x.grad
    x.grad = None
    rope_(x.clone(), *rest).sum().backward()
    assert torch.equal(x.grad, whole)


def test_kernel_takes_tables_made_in_inference_mode(place, draw):
    qkv, rest = case(place, draw, 9, (2, 1), 4)
    with torch.inference_mode():
        made = [t.clone() for t in rest[:3]]
    x = qkv.clone().requires_grad_()
    rope_(x.clone(), *made, *rest[3:]).backward(qkv)
    y = qkv.clone().requires_grad_()
    rope_(y.clone(), *rest).backward(qkv)
    assert torch.equal(x.grad, y.grad)
    with torch.inference_mode():
        got = rope_(qkv.clone(), *made, *rest[3:])
        assert torch.equal(got, rope_(qkv.clone(), *rest))


def test_kernel_refuses_a_leaf_before_changing_it(place, draw):
    qkv, rest = case(place, draw, 9, (2, 1), 4)
    leaf = qkv.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"leaf.*in place"):
        rope_(leaf, *rest)
    assert torch.equal(leaf, qkv)
    with torch.no_grad():
        rope_(leaf, *rest)
    assert torch.equal(leaf, rope_(qkv, *rest))


@pytest.mark.parametrize("graph", [False, True])
def test_whoever_saved_the_projection_is_told(place, draw, graph):
    qkv, rest = case(place, draw, 9, (2, 1), 4)
    x = qkv.clone().requires_grad_() * 1
    y = x.square().sum()
    with torch.set_grad_enabled(graph):
        rope_(x, *rest)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.backward()


def test_kernel_on_no_tokens(place, draw):
    qkv, rest = case(place, draw, 0, (2, 1), 4)
    x = qkv.requires_grad_()
    rope_(x.clone(), *rest).sum().backward()
    assert x.grad.shape == (0, 32)


def test_one_launch_each_way_and_no_host_sync(kernel):
    """On meta tensors whatever needs a value raises; the gradient is not copied first."""
    from llm2vec_fast.ops.kernels.launch import recorded

    x = torch.empty(1000, 48 * 128, device="meta", requires_grad=True)
    positions = torch.empty(1000, dtype=torch.int32, device="meta")
    cos, sin = (torch.empty(512, 64, device="meta") for _ in range(2))
    with ops.use("triton"), recorded(90) as launches:
        y = rope_(x * 1, positions, cos, sin, 32, 8)
        torch.autograd.grad(y, x, torch.empty_like(y))
    forward, backward = launches
    assert forward.args[0] is forward.args[1] and backward.args[0] is not backward.args[1]
    assert forward.grid == (1000 * 40 // 16,) and backward.grid == (1000 * 48 // 16,)


@pytest.mark.gpu
@pytest.mark.parametrize("heads, half", [((32, 8), 64), ((16, 16), 64), ((9, 3), 32)])
def test_kernel_at_full_size(kernel, heads, half):
    """131,072 tokens in texts of 4,096: the first and the last rows, and the same bits again."""
    n, k = heads
    qkv = torch.randn(131_072, (n + 2 * k) * 2 * half, device="cuda").bfloat16()
    positions = torch.arange(131_072, device="cuda", dtype=torch.int32) % 4096
    cos, sin = (t.cuda() for t in tables(4096, half))
    with ops.use("triton"):
        once, again = (rope_(qkv.clone(), positions, cos, sin, n, k) for _ in range(2))
        back = kernel.rotated(once, positions, cos, sin, n, k, inverse=True)
    assert torch.equal(once, again)
    torch.testing.assert_close(back, qkv, rtol=0, atol=0.06)
    for part in (slice(0, 32), slice(-32, None)):
        rows = qkv[part].cpu(), positions[part].cpu(), cos.cpu(), sin.cpu(), n, k
        want, got = truth(*rows), once[part].cpu().double()
        half_ulp = 0.501 * torch.finfo(torch.bfloat16).eps
        assert ((got - want).abs() <= half_ulp * want.abs() + 1e-5).all()


@pytest.mark.gpu
def test_kernel_past_two_billion_elements(kernel):
    """Offsets beyond 2^31: 400,000 tokens of a 7B."""
    qkv = torch.zeros(400_000, 48 * 128, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(1, 48 * 128, device="cuda").bfloat16()
    qkv[-1] = last
    positions = torch.full((400_000,), 77, device="cuda", dtype=torch.int32)
    cos, sin = (t.cuda() for t in tables(512, 64))
    want = kernel.rotated(last, positions[:1], cos, sin, 32, 8)
    new = kernel.rotated(qkv, positions, cos, sin, 32, 8)
    assert torch.equal(new[-1:], want) and not new[:-1].any()
    kernel.rotate_(qkv, positions, cos, sin, 32, 8)
    assert torch.equal(qkv[-1:], want) and not qkv[:-1].any()
