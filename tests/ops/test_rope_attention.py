"""rope_attention against rope and attention one after the other, whatever backend runs."""

from __future__ import annotations

import itertools

import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops.attention import PAIRS, attention_ref
from llm2vec_fast.ops.rope import rope_ref_
from llm2vec_fast.ops.rope_attention import rope_attention, split_heads

LENGTHS, N, K, H = (5, 18, 1, 3), 4, 2, 16
CU = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


def tables(dtype=torch.float32, size=H):
    angles = torch.arange(32)[:, None] / 100 ** (torch.arange(size // 2) / (size // 2))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def drawn(dtype=torch.float32, device="cpu"):
    noise = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), (N + 2 * K) * H, generator=noise, dtype=torch.float64)
    return qkv.to(dtype).to(device)


def shared(qkv, **options):
    """The node on a fresh tensor: what it is given, it uses up."""
    cos, sin = (x.to(qkv.device) for x in tables())
    positions, cu = POSITIONS.to(qkv.device), CU.to(qkv.device)
    return rope_attention(qkv * 1, positions, cos, sin, cu, 18, N, K, **options)


def apart(qkv, **options):
    """The truth: rotation and attention by their references, differentiated by autograd."""
    cos, sin = tables(qkv.dtype if qkv.dtype == torch.float64 else torch.float32)
    turned = rope_ref_(qkv * 1, POSITIONS, cos, sin, N, K)
    return attention_ref(*split_heads(turned, N, K), CU, 18, **options)


def in_steps(qkv, causal=False, window=None):
    """Both in the dtype of the input throughout, as plain torch does it."""
    cos, sin = (x[POSITIONS][:, None].to(qkv.dtype) for x in tables())
    q, k, v = split_heads(qkv, N, K)
    left, right = torch.cat([q, k], 1).chunk(2, -1)
    turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    q, k = turned.split([N, K], 1)
    texts = []
    for q_, k_, v_ in zip(*(x.split(list(LENGTHS)) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1) for x in (q_, k_, v_)]
        heads[1:] = [x.repeat_interleave(N // K, 0) for x in heads[1:]]
        score = heads[0] @ heads[1].transpose(1, 2) * H**-0.5
        at = torch.arange(len(q_))
        apart = at[:, None] - at
        hidden = (apart < 0) & causal
        hidden = hidden | (apart.abs() >= window) if window else hidden
        texts.append((score.masked_fill(hidden, -torch.inf).softmax(-1) @ heads[2]).transpose(0, 1))
    return torch.cat(texts)


def check(within_rule, values_and_gradients, qkv, **options):
    got = values_and_gradients(lambda x: shared(x, **options), [qkv])
    exact = values_and_gradients(lambda x: apart(x, **options), [qkv.cpu()], torch.float64)
    rough = values_and_gradients(lambda x: in_steps(x, **options), [qkv.cpu()])
    for one, other, true in zip(
        *map(itertools.chain.from_iterable, (got, rough, exact)), strict=True
    ):
        assert one.dtype == qkv.dtype
        within_rule(one.cpu(), other, true)


MASKS = [{}, {"causal": True}, {"causal": True, "window": 3}]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "reference"])
@pytest.mark.parametrize("options", MASKS)
def test_on_the_cpu(within_rule, values_and_gradients, backend, options):
    with ops.use(backend, "attention"):
        check(within_rule, values_and_gradients, drawn(), **options)


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("rope", ["reference", "triton"])
def test_the_node_of_kernels(place, within_rule, values_and_gradients, rope, options):
    with ops.use(rope, "rope_"):
        check(within_rule, values_and_gradients, drawn(place.dtype, place.device), **options)


def few(place):
    """Little, because the interpreter draws slowly: (qkv, what else rope_attention needs)."""
    qkv = drawn(place.dtype, place.device)[:9, : 4 * H]
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3], device=place.device)
    cu = torch.tensor([0, 5, 9], dtype=torch.int32, device=place.device)
    return qkv, (positions, *(x.to(place.device) for x in tables()), cu, 5, 2, 1)


def test_dropout_of_the_node_is_that_of_attention(place, values_and_gradients):
    qkv, rest = few(place)
    options = {"dropout_p": 0.5, "seed": 9}

    def one_by_one(qkv):
        turned = rope_ref_(qkv * 1, *rest[:3], 2, 1)
        return ops.attention(*split_heads(turned, 2, 1), rest[3], 5, **options)

    with ops.use("reference", "rope_"):
        one = values_and_gradients(lambda x: rope_attention(x * 1, *rest, **options), [qkv])
        two = values_and_gradients(one_by_one, [qkv])
        without_gradient = rope_attention(qkv.clone(), *rest, **options)
    assert torch.equal(without_gradient, one[0][0])
    assert torch.equal(one[0][0], two[0][0])
    eps = torch.finfo(place.dtype).eps
    torch.testing.assert_close(one[1][0], two[1][0], rtol=4 * eps, atol=8 * eps)


class Flash:
    """What torch's operators promise, computed by the reference: they exist for CUDA alone."""

    def forward(self, q, k, v, cu_q, cu_k, max_q, max_k, p, causal, debug, *, scale,
                window_size_left, window_size_right):  # fmt: skip
        self.mask = {"causal": causal, "scale": scale}
        self.mask["window"] = window_size_left + 1 if window_size_left >= 0 else None
        assert cu_q is cu_k and (max_q, max_k, p, debug) == (18, 18, 0.0, False)
        o = attention_ref(q, k, v, cu_q, max_q, **self.mask)
        return o, torch.zeros(N, len(q)), torch.zeros(2), torch.zeros(()), torch.zeros(0)

    def backward(self, do, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, p, causal, state, offset, *,
                 scale, window_size_left, window_size_right):  # fmt: skip
        assert lse.shape == (N, len(q)) and state.shape == (2,) and offset.shape == ()
        with torch.enable_grad():
            own = [x.detach().requires_grad_() for x in (q, k, v)]
            out = attention_ref(*own, cu_q, max_q, **self.mask)
        torch.testing.assert_close(o, out)
        return torch.autograd.grad(out, own, do)


@pytest.mark.parametrize("options", MASKS)
def test_the_node_of_flash(monkeypatch, within_rule, values_and_gradients, options):
    """Gradients that an operator allocates itself end up in the packed one."""
    flash = Flash()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash.backward)
    monkeypatch.setitem(PAIRS, "sdpa", PAIRS["varlen"])  # the backend that the CPU chooses
    check(within_rule, values_and_gradients, drawn(), **options)


def test_what_is_kept_and_how_often_it_is_copied(place):
    """Kept: the rotated projection where it lies, o and lse. One buffer of gradients."""
    qkv = drawn(place.dtype, place.device).requires_grad_() * 1
    cos, sin = (x.to(place.device) for x in tables())
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o = rope_attention(qkv, POSITIONS.to(place.device), cos, sin, CU.to(place.device), 18, N, K)
    sizes = sorted(x.numel() for x in kept if x.is_floating_point())
    assert sizes == sorted([qkv.numel(), o.numel(), N * len(qkv)])
    assert any(x.data_ptr() == qkv.data_ptr() for x in kept)


def test_a_view_is_used_up_too(place, values_and_gradients):
    """A packed projection put together from normalised heads is a view of what cat gave."""
    qkv = drawn(place.dtype, place.device)
    cos, sin = (x.to(place.device) for x in tables())

    def of_view(qkv):
        view = torch.cat(split_heads(qkv, N, K), dim=1).flatten(1)
        assert view._is_view()
        return rope_attention(
            view, POSITIONS.to(place.device), cos, sin, CU.to(place.device), 18, N, K
        )

    one, two = (values_and_gradients(f, [qkv]) for f in (of_view, shared))
    assert torch.equal(one[0][0], two[0][0]) and torch.equal(one[1][0], two[1][0])


def test_columns_need_not_be_adjacent(place, values_and_gradients):
    qkv, rest = few(place)

    def of(turn):
        return values_and_gradients(lambda x: rope_attention(turn(x * 1), *rest), [qkv])

    one, two = of(lambda x: x), of(lambda x: x.t().contiguous().t())
    assert torch.equal(one[0][0], two[0][0]) and torch.equal(one[1][0], two[1][0])


def test_who_kept_the_projection_before_hears_of_the_change(place):
    qkv = drawn(place.dtype, place.device).requires_grad_() * 1
    early = (qkv * qkv).sum()
    cos, sin = (x.to(place.device) for x in tables())
    rope_attention(qkv, POSITIONS.to(place.device), cos, sin, CU.to(place.device), 18, N, K)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        early.backward()


def test_tables_may_be_inference_tensors(place):
    with torch.inference_mode():
        cos, sin = (x.to(place.device).clone() for x in tables())
    leaf = drawn(place.dtype, place.device).requires_grad_()
    o = rope_attention(
        leaf * 1, POSITIONS.to(place.device), cos, sin, CU.to(place.device), 18, N, K
    )
    o.sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_replays_dropout(place, reentrant):
    from torch.utils.checkpoint import checkpoint

    qkv, rest = few(place)

    def step(x):
        return rope_attention(x * 1, *rest, dropout_p=0.5, seed=3)

    gradients = []
    for run in (step, lambda x: checkpoint(step, x, use_reentrant=reentrant)):
        leaf = qkv.detach().clone().requires_grad_()
        run(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_wrong_shapes_and_leaves_are_named():
    cos, sin = tables()
    qkv = drawn()
    with pytest.raises(ValueError, match=r"rope_attention.*\(27, 128\).*5 query heads.*\(T, 144\)"):
        rope_attention(qkv, POSITIONS, cos, sin, CU, 18, 5, K)
    with pytest.raises(ValueError, match=r"positions \(26,\)"):
        rope_attention(qkv, POSITIONS[1:], cos, sin, CU, 18, N, K)
    with pytest.raises(ValueError, match=r"rope_attention: positions are torch.float32"):
        rope_attention(qkv, POSITIONS.float(), cos, sin, CU, 18, N, K)
    with pytest.raises(ValueError, match="window"):
        rope_attention(qkv, POSITIONS, cos, sin, CU, 18, N, K, window=0)


def test_a_leaf_is_refused(place):
    leaf = drawn(place.dtype, place.device).requires_grad_()
    rest = [x.to(place.device) for x in (POSITIONS, *tables(), CU)]
    with pytest.raises(RuntimeError, match="leaf"):
        rope_attention(leaf, *rest, 18, N, K)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flash_dropout", "flash_attn", "triton"])
@pytest.mark.parametrize("options", MASKS)
def test_gpu_every_backend(within_rule, values_and_gradients, backend, options):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    if backend == "flash_dropout":
        options = {**options, "dropout_p": 1e-12}  # it only serves dropout; this drops nothing
    with ops.use(backend, "attention"):
        qkv = drawn(torch.bfloat16, "cuda")
        got = values_and_gradients(lambda x: shared(x, **options), [qkv])
    options.pop("dropout_p", None)
    exact = values_and_gradients(lambda x: apart(x, **options), [qkv.cpu()], torch.float64)
    rough = values_and_gradients(lambda x: in_steps(x, **options), [qkv.cpu()])
    for one, other, true in zip(
        *map(itertools.chain.from_iterable, (got, rough, exact)), strict=True
    ):
        within_rule(one.cpu(), other, true)
