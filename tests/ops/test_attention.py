"""attention against softmax spelled out in fp64 numpy, pair by pair; each CPU backend by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops import attention, attention_ref

CPU_BACKENDS = ("sdpa", "reference")
MASKS = list(itertools.product([False, True], [None, 1, 3, 100]))
LENGTHS = (1, 5, 37, 1, 1, 5, 5, 4)  # 4: one more than a window of 3


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with ops.use(request.param, "attention"):
        yield request.param


def visible(query: int, key: int, causal: bool, window: int | None) -> bool:
    if causal and key > query:
        return False
    return window is None or abs(query - key) < window


def truth(q, k, v, lengths, causal=False, window=None, scale=None):
    q, k, v = (x.double().numpy() for x in (q, k, v))
    out, group = np.empty(q.shape), q.shape[1] // k.shape[1]
    scale = 1 / np.sqrt(q.shape[2]) if scale is None else scale
    for start, end in itertools.pairwise(np.cumsum([0, *lengths]).tolist()):
        for token, head in itertools.product(range(start, end), range(q.shape[1])):
            keys = [j for j in range(start, end) if visible(token, j, causal, window)]
            score = scale * k[keys, head // group] @ q[token, head]
            weight = np.exp(score - score.max())
            out[token, head] = weight / weight.sum() @ v[keys, head // group]
    return torch.from_numpy(out)


def plain(q, k, v, lengths, causal=False, window=None):
    """torch in the dtype given, text by text, materialised scores."""
    texts = []
    for q_, k_, v_ in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1) for x in (q_, k_, v_)]
        heads[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in heads[1:]]
        score = heads[0] @ heads[1].transpose(1, 2) * q.shape[2] ** -0.5
        n = range(len(q_))
        mask = torch.tensor([[visible(i, j, causal, window) for j in n] for i in n])
        score = score.masked_fill(~mask, float("-inf"))
        texts.append((score.softmax(-1) @ heads[2]).transpose(0, 1))
    return torch.cat(texts)


def draw(lengths, n, k, size, dtype=torch.float32, seed=0):
    noise, tokens = torch.Generator().manual_seed(seed), sum(lengths)
    shapes = [(tokens, n, size), (tokens, k, size), (tokens, k, size)]
    # Queries twice as large as usual: a peaked softmax shows errors that a flat one hides.
    return [(2 * torch.randn(s, generator=noise, dtype=torch.float64)).to(dtype) for s in shapes]


def bounds(lengths):
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)


def run(qkv, lengths, **options):
    return attention(*qkv, bounds(lengths), max(lengths, default=0), **options)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("causal, window", MASKS)
def test_equals_the_formula(backend, within_rule, causal, window, heads):
    qkv = draw(LENGTHS, *heads, 8)
    got = run(qkv, LENGTHS, causal=causal, window=window)
    within_rule(got, plain(*qkv, LENGTHS, causal, window), truth(*qkv, LENGTHS, causal, window))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 3)])
def test_half_precision(backend, within_rule, dtype, causal, window):
    qkv = draw(LENGTHS, 4, 2, 32, dtype)
    got = run(qkv, LENGTHS, causal=causal, window=window)
    assert got.dtype == dtype
    within_rule(got, plain(*qkv, LENGTHS, causal, window), truth(*qkv, LENGTHS, causal, window))


@pytest.mark.parametrize("lengths", [(1,), (252,), (1,) * 40, (2, 1, 2, 2, 1, 37)])
@pytest.mark.parametrize("size", [1, 20])
def test_awkward_shapes(backend, within_rule, lengths, size):
    qkv = draw(lengths, 2, 1, size)
    got = run(qkv, lengths, causal=True)
    within_rule(got, plain(*qkv, lengths, True), truth(*qkv, lengths, True))


def test_one_token_texts_are_their_values(backend):
    q, k, v = draw((1,) * 9, 4, 2, 8)
    assert torch.equal(run([q, k, v], (1,) * 9), v.repeat_interleave(2, 1))


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_scale(backend, scale):
    qkv = draw(LENGTHS, 4, 2, 8)
    got = run(qkv, LENGTHS, scale=scale)
    torch.testing.assert_close(got.double(), truth(*qkv, LENGTHS, scale=scale), rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal, window", MASKS)
def test_sdpa_equals_the_reference_in_fp64(causal, window):
    qkv = draw(LENGTHS, 6, 2, 8, torch.float64)
    with ops.use("sdpa", "attention"):
        got = run(qkv, LENGTHS, causal=causal, window=window)
    want = attention_ref(*qkv, bounds(LENGTHS), 37, causal=causal, window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_views_of_a_packed_projection(backend):
    lengths, noise = (5, 5, 9), torch.Generator().manual_seed(0)
    packed = torch.randn(19, 8 * 16, generator=noise)
    before = packed.clone()
    views = packed.unflatten(1, (-1, 16)).split([4, 2, 2], dim=1)
    assert not any(view.is_contiguous() for view in views)
    got = run(views, lengths, causal=True)
    torch.testing.assert_close(got, run([x.contiguous() for x in views], lengths, causal=True))
    assert torch.equal(packed, before)


@pytest.mark.parametrize("causal", [False, True])
def test_no_text_sees_another(backend, causal):
    lengths = (4, 4, 7, 1, 4)
    q, k, v = draw(lengths, 4, 2, 8)
    before = run([q, k, v], lengths, causal=causal)
    k[4:8], v[4:8] = float("nan"), 1e30  # the second of five texts
    after = run([q, k, v], lengths, causal=causal)
    assert torch.equal(after[:4], before[:4])
    assert torch.equal(after[8:], before[8:])
    assert after[4:8].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("length", [2, 40])
def test_what_is_not_finite_stays_visible(backend, dtype, where, length):
    """torch's own CPU kernel answers 0 where all scores of a query are NaN."""
    qkv = dict(zip("qkv", draw((length,), 2, 2, 16, dtype), strict=True))
    qkv[where][:] = float("nan")
    assert run(list(qkv.values()), (length,)).isnan().all()
    if where != "v":
        qkv[where][:] = float("inf")  # an overflowed projection: scores of inf and -inf
        assert not run(list(qkv.values()), (length,)).isfinite().any()


def test_a_larger_max_seqlen_changes_nothing(backend):
    qkv = draw(LENGTHS, 4, 2, 8)
    assert torch.equal(attention(*qkv, bounds(LENGTHS), 1000), run(qkv, LENGTHS))


def test_no_texts(backend):
    qkv = draw((), 4, 2, 8)
    assert run(qkv, ()).shape == (0, 4, 8)


@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (False, 2), (True, 2)])
def test_gradients_of_the_reference(causal, window):
    lengths = (1, 4)
    qkv = [x.requires_grad_() for x in draw(lengths, 2, 1, 3, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: attention_ref(*x, bounds(lengths), 4, causal=causal, window=window), qkv
    )


@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (False, 3), (True, 3)])
def test_gradients_of_sdpa_are_those_of_the_reference(causal, window):
    grads = {}
    for name in CPU_BACKENDS:
        qkv = [x.requires_grad_() for x in draw(LENGTHS, 6, 2, 8, torch.float64)]
        with ops.use(name, "attention"):
            run(qkv, LENGTHS, causal=causal, window=window).sin().sum().backward()
        grads[name] = [x.grad for x in qkv]
    for one, two in zip(grads["sdpa"], grads["reference"], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_wrong_shapes_and_dtypes_are_named():
    q, k, v = draw((5,), 4, 2, 8)
    cu = bounds((5,))
    for bad, message in (
        ((q, k[:4], v[:4]), r"attention.*\(5, 4, 8\).*\(4, 2, 8\)"),
        ((q, k, v[:, :1]), r"\(5, 2, 8\).*\(5, 1, 8\)"),
        ((q, k[..., :6], v[..., :6]), r"\(5, 4, 8\).*\(5, 2, 6\)"),
        ((q[0], k, v), r"\(4, 8\).*\(5, 2, 8\)"),
        ((q, k[..., None], v[..., None]), r"\(5, 4, 8\).*\(5, 2, 8, 1\)"),
        ((q[:, :3], k, v), r"3 query heads.*2 kv heads"),
        ((q, k[:, :0], v[:, :0]), r"4 query heads.*0 kv heads"),
        ((q, k.half(), v.half()), r"float32.*float16"),
        ((q, k, v.half()), r"float32.*float16"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*bad, cu, 5)
    with pytest.raises(ValueError, match=r"int32.*int64"):
        attention(q, k, v, cu.long(), 5)
    with pytest.raises(ValueError, match=r"\(B \+ 1,\).*\(1, 2\)"):
        attention(q, k, v, cu[None], 5)
    with pytest.raises(ValueError, match=r"window.*at least 1.*0"):
        attention(q, k, v, cu, 5, window=0)
    with pytest.raises(NotImplementedError, match="dropout"):
        attention(q, k, v, cu, 5, dropout_p=0.1)
