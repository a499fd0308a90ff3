"""attention against softmax spelled out in fp64 numpy, pair by pair; each CPU backend by name."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops import attention, attention_ref
from llm2vec_fast.ops.backend import kernels as backend_kernels

CPU_BACKENDS = ("cpu", "eager", "sdpa", "reference")
MASKS = list(itertools.product([False, True], [None, 1, 3, 100]))
LENGTHS = (1, 5, 37, 1, 1, 5, 5, 4)  # 4: one more than a window of 3


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    if request.param == "cpu" and not backend_kernels("attention", "cpu").LIBRARY.exists():
        pytest.skip("the CPU's library is not built")
    with ops.use(request.param, "attention"):
        yield request.param


def skip_fp16(backend, dtype):
    if backend in ("cpu", "eager") and dtype == torch.float16:
        pytest.skip(f"{backend} computes in bf16 and fp32")


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
    skip_fp16(backend, dtype)
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
    skip_fp16(backend, dtype)
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
    for name in ("sdpa", "reference"):
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
    with pytest.raises(ValueError, match=r"contiguous.*\(2,\).*strides \(2,\)"):
        attention(q, k, v, torch.stack([cu, cu], 1)[:, 0], 5)
    with pytest.raises(ValueError, match=r"window.*at least 1.*0"):
        attention(q, k, v, cu, 5, window=0)
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"dropout_p.*\[0, 1\).*{p}"):
            attention(q, k, v, cu, 5, dropout_p=p)


# The Triton kernels, forward and backward, and dropout.


def node(lengths, **options):
    """attention as a function of one packed (T, N + 2K, H) tensor's three views."""

    def call(q, k, v):
        return attention(q, k, v, bounds(lengths).to(q.device), max(lengths, default=0), **options)

    return call


def eager(lengths, causal=False, window=None):
    return lambda q, k, v: plain(q, k, v, lengths, causal, window)


def exactly(lengths, **options):
    return lambda q, k, v: attention_ref(q, k, v, bounds(lengths), max(lengths), **options)


def packed(place, lengths, n, k, size, seed=0):
    """Views of one packed projection: only columns are adjacent."""
    noise = torch.Generator().manual_seed(seed)
    whole = torch.randn(sum(lengths), n + 2 * k, size, generator=noise, dtype=torch.float64)
    return whole.to(place.dtype).to(place.device).split([n, k, k], dim=1)


def all_within_rule(within_rule, got, plain, exact):
    pairs = zip(*map(itertools.chain.from_iterable, (got, plain, exact)), strict=True)
    for one, other, true in pairs:
        within_rule(one.cpu(), other.cpu(), true.cpu())


KERNEL_CASES = [  # lengths, (N, K, H), causal, window: blocks of the interpreter are 16 x 16
    ((1, 37, 1, 20), (4, 2, 24), False, None),
    ((37, 3), (2, 1, 16), True, None),
    ((50, 2, 17), (2, 2, 8), False, 18),
    ((50, 2, 17), (2, 1, 12), True, 18),
    ((33, 16), (3, 1, 40), False, 2),
    ((33, 15), (1, 1, 64), True, 2),
]


@pytest.mark.parametrize("lengths, heads, causal, window", KERNEL_CASES)
def test_kernel_values_and_gradients(
    place, within_rule, values_and_gradients, lengths, heads, causal, window
):
    qkv = packed(place, lengths, *heads)
    options = {"causal": causal, "window": window}
    got = values_and_gradients(node(lengths, **options), qkv)
    cpu = [x.cpu() for x in qkv]
    rough = values_and_gradients(eager(lengths, **options), cpu)
    exact = values_and_gradients(exactly(lengths, **options), cpu, torch.float64)
    assert all(x.dtype == place.dtype for x in itertools.chain.from_iterable(got))
    all_within_rule(within_rule, got, rough, exact)


def test_kernel_reads_any_strides(place, values_and_gradients):
    lengths = (5, 19)
    views = packed(place, lengths, 4, 2, 16)
    expected = values_and_gradients(node(lengths), views)
    rows = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    columns = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in views]
    for others in (rows, columns):
        own = values_and_gradients(node(lengths), others)
        for one, two in zip(*map(itertools.chain.from_iterable, (own, expected)), strict=True):
            assert torch.equal(one, two)


def test_kernel_empty_and_one_token(place, values_and_gradients):
    (y,), gradients = values_and_gradients(node(()), packed(place, (), 4, 2, 16))
    assert y.shape == (0, 4, 16) and [x.shape[0] for x in gradients] == [0, 0, 0]
    ones = (1,) * 5
    qkv = packed(place, ones, 4, 2, 16)
    (y,), (dq, dk, _) = values_and_gradients(node(ones), qkv)
    assert torch.equal(y, qkv[2].repeat_interleave(2, 1))
    # The score of the only key cannot matter; what is left is rounding.
    assert max(dq.abs().max(), dk.abs().max()) <= 20 * torch.finfo(place.dtype).eps


def test_kernel_of_no_text_reads_nothing(place):
    qkv = packed(place, (40,), 2, 1, 16)
    leaves = [x.detach().requires_grad_() for x in qkv]
    y = attention(*leaves, torch.zeros(1, dtype=torch.int32, device=place.device), 0)
    assert y.shape == (40, 2, 16)
    y.sum().backward()


def test_kernel_of_an_empty_text_between_others(place):
    cu = torch.tensor([0, 3, 3, 20, 20], dtype=torch.int32, device=place.device)
    qkv = packed(place, (3, 17), 2, 1, 16)
    assert torch.equal(attention(*qkv, cu, 17), node((3, 17))(*qkv))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about NaN in the interpreter
@pytest.mark.parametrize("causal", [False, True])
def test_kernel_never_lets_a_text_see_another(place, values_and_gradients, causal):
    lengths = (4, 18, 7)
    qkv = packed(place, lengths, 2, 1, 16)
    clean = values_and_gradients(node(lengths, causal=causal), qkv)
    for victim in range(3):
        spoilt = [x.clone() for x in qkv]
        spoilt[victim][4:22] = float("nan")
        got = values_and_gradients(node(lengths, causal=causal), spoilt)
        pairs = zip(*map(itertools.chain.from_iterable, (got, clean)), strict=True)
        for one, two in pairs:
            assert torch.equal(one[:4], two[:4]) and torch.equal(one[22:], two[22:])
        assert got[0][0][4:22].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about inf in the interpreter
@pytest.mark.parametrize("causal, window", [(False, None), (True, 5)])
def test_kernel_extreme_scores(place, within_rule, values_and_gradients, causal, window):
    lengths = (20, 5)
    q, k, v = packed(place, lengths, 2, 1, 16)
    q = (100 * q).clone()
    k = (25 * k - 50).clone()  # scores around +-1e4: softmax is one of its keys
    options = {"causal": causal, "window": window, "scale": 0.5}
    got = values_and_gradients(node(lengths, **options), [q, k, v])
    assert all(x.isfinite().all() for x in itertools.chain.from_iterable(got))
    exact = values_and_gradients(
        exactly(lengths, **options), [x.cpu() for x in (q, k, v)], torch.float64
    )
    within_rule(got[0][0].cpu(), exact[0][0].to(place.dtype), exact[0][0])
    k[:] = float("inf")
    assert not node(lengths)(q, k, v).isfinite().any()
    k[:] = float("-inf")
    assert not node(lengths)(q, k, v).isfinite().any()


def test_kernel_scale_of_zero_and_below(place, within_rule):
    lengths = (20,)
    qkv = packed(place, lengths, 2, 1, 16)
    for scale in (0.0, -0.5):
        got = node(lengths, causal=True, scale=scale)(*qkv).cpu()
        exact = exactly(lengths, causal=True, scale=scale)(*[x.cpu().double() for x in qkv])
        within_rule(got, exact.to(got.dtype), exact)


def test_kernel_gives_only_the_gradients_asked_for(place):
    lengths = (5, 18)
    q, k, v = (x.detach().clone() for x in packed(place, lengths, 2, 1, 16))
    everything = torch.autograd.grad(
        node(lengths)(*[x.requires_grad_() for x in (q, k, v)]).sum(), (q, k, v)
    )
    for i in range(3):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        (alone,) = torch.autograd.grad(node(lengths)(*leaves).sum(), leaves[i : i + 1])
        assert torch.equal(alone, everything[i])


# Dropout.


def dropout_mask(lengths, n, size, dtype, device, **options):
    """(T, N, L) bool, which key of its text each query keeps: scores of 0, values one-hot."""
    assert max(lengths) <= size
    v = torch.zeros(sum(lengths), 1, size)
    for start, end in itertools.pairwise(bounds(lengths).tolist()):
        v[start:end, 0, : end - start] = torch.eye(end - start)
    v = v.to(dtype).to(device)
    q = torch.zeros(sum(lengths), n, size, dtype=dtype, device=device)
    return (node(lengths, **options)(q, torch.zeros_like(v), v) > 0).cpu()


def with_mask(lengths, mask_TNL, p):
    """Softmax attention in which the mask drops weights: what dropout has to equal."""

    def call(q, k, v):
        texts = []
        for start, end in itertools.pairwise(bounds(lengths).tolist()):
            heads = [x[start:end].transpose(0, 1) for x in (q, k, v)]
            heads[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in heads[1:]]
            weight = (heads[0] @ heads[1].transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1)
            kept = mask_TNL[start:end, :, : end - start].transpose(0, 1)
            texts.append((weight * kept / (1 - p) @ heads[2]).transpose(0, 1))
        return torch.cat(texts)

    return call


def test_dropout_forward_and_backward_use_one_mask(place, within_rule, values_and_gradients):
    lengths, p = (20, 1), 0.3
    options = {"dropout_p": p, "seed": 1 << 40}
    mask = dropout_mask(lengths, 2, 32, place.dtype, place.device, **options)
    qkv = packed(place, lengths, 2, 1, 32)
    got = values_and_gradients(node(lengths, **options), qkv)
    cpu = [x.cpu() for x in qkv]
    rough = values_and_gradients(with_mask(lengths, mask, p), cpu)
    exact = values_and_gradients(with_mask(lengths, mask, p), cpu, torch.float64)
    all_within_rule(within_rule, got, rough, exact)


@pytest.fixture
def large_blocks(place, monkeypatch):
    """The interpreter with one block a text: fewer programs, and other blocks than elsewhere."""
    if place.device == "cpu":
        options = {"QUERIES": 64, "KEYS": 64, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(backend_kernels("attention"), "block_options", lambda *_: options)


def test_dropout_masks_do_not_depend_on_blocks(place, request):
    options = {"dropout_p": 0.3, "seed": 5}
    one = dropout_mask((20,), 1, 32, place.dtype, place.device, **options)
    request.getfixturevalue("large_blocks")
    assert torch.equal(dropout_mask((20,), 1, 32, place.dtype, place.device, **options), one)


def test_dropout_masks_are_fair_and_independent(place, large_blocks):
    lengths, n = (64, 64), 4
    draws = {
        (seed, p): dropout_mask(lengths, n, 64, place.dtype, place.device, dropout_p=p, seed=seed)
        for seed, p in [(5, 0.3), (6, 0.3), (5, 0.0), (5 + (1 << 32), 0.3), (5, 0.9)]
    }
    assert draws[5, 0.0].all()
    count = draws[5, 0.3].numel()
    for (_, p), mask in draws.items():
        assert abs(mask.float().mean() - (1 - p)) <= 4 * (p * (1 - p) / count) ** 0.5 + 1e-9
    mask = draws[5, 0.3].float()
    for dims in ((0,), (1,), (2,), (0, 1), (1, 2)):  # of no query, head or key more than of another
        rate, of = mask.mean(dims), count / mask.mean(dims).numel()
        assert (rate - 0.7).abs().max() <= 5 * (0.21 / of) ** 0.5
    others = [
        draws[6, 0.3],
        draws[5 + (1 << 32), 0.3],
        mask.roll(1, 0),  # the next query
        mask.roll(1, 1),  # the next head
        mask.roll(1, 2),  # the next key
        mask.roll(64, 0),  # the other text
    ]
    for other in others:
        together = ((mask - 0.7) * (other.float() - 0.7)).mean() / 0.21
        assert together.abs() <= 4 / count**0.5


def test_dropout_replays_by_seed_alone(place):
    lengths = (7, 4)
    qkv = packed(place, lengths, 2, 1, 16)
    run_once = node(lengths, dropout_p=0.5, seed=3)
    first = run_once(*qkv)
    torch.rand(5)
    assert torch.equal(run_once(*qkv), first)
    assert not torch.equal(node(lengths, dropout_p=0.5, seed=4)(*qkv), first)
    torch.manual_seed(0)
    drawn = node(lengths, dropout_p=0.5)(*qkv)
    assert not torch.equal(node(lengths, dropout_p=0.5)(*qkv), drawn)
    torch.manual_seed(0)
    assert torch.equal(node(lengths, dropout_p=0.5)(*qkv), drawn)


@pytest.mark.parametrize("causal, window", [(False, None), (True, 3)])
def test_dropout_of_the_reference(causal, window):
    lengths, p = (30, 9), 0.4
    options = {"causal": causal, "window": window, "dropout_p": p, "seed": 7}
    q = torch.zeros(39, 2, 30)
    v = torch.cat([torch.eye(30), torch.eye(30)[:9]])[:, None]
    got = node(lengths, **options)(q, torch.zeros(39, 1, 30), v)  # the CPU's default backend
    full = node(lengths, causal=causal, window=window)(q, torch.zeros(39, 1, 30), v)
    kept = got > 0
    assert ((full > 0) | ~kept).all()
    torch.testing.assert_close(got[kept], full[kept] / (1 - p))
    assert abs(kept.sum() / (full > 0).sum() - (1 - p)) < 0.1
    assert torch.equal(node(lengths, **options)(q, torch.zeros(39, 1, 30), v), got)


def test_gradients_of_the_reference_with_dropout():
    qkv = [x.requires_grad_() for x in draw((1, 4), 2, 1, 3, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *x: attention_ref(*x, bounds((1, 4)), 4, dropout_p=0.4, seed=3), qkv
    )


# On a GPU, at real sizes.


def big(lengths, n, k, size, dtype=torch.bfloat16, seed=0):
    noise = torch.Generator("cuda").manual_seed(seed)
    whole = torch.randn(sum(lengths), n + 2 * k, size, generator=noise, device="cuda")
    return whole.to(dtype).split([n, k, k], dim=1)


GPU_MASKS = [(False, None), (True, None), (True, 200), (False, 200)]
GPU_CASES = [
    (torch.bfloat16, size, *mask) for size, mask in itertools.product((64, 128), GPU_MASKS)
]
# Each compiles three kernels of its own: what differs in size or dtype alone gets two masks.
GPU_CASES += [
    (dtype, size, *mask)
    for dtype, sizes in {
        torch.bfloat16: (80, 96, 256),
        torch.float16: (64, 128),
        torch.float32: (64, 96, 256),
    }.items()
    for size, mask in itertools.product(sizes, (GPU_MASKS[0], GPU_MASKS[2]))
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, size, causal, window", GPU_CASES)
def test_gpu_real_lengths(within_rule, values_and_gradients, size, causal, window, dtype):
    lengths = (1, 37, 252, 507, 513, 128, 2056)
    qkv = big(lengths, 4, 2, size, dtype)
    options = {"causal": causal, "window": window}
    with ops.use("triton", "attention"):
        got = values_and_gradients(node(lengths, **options), qkv)

    def rough(q, k, v):
        return attention_in(q, k, v, lengths, causal, window)

    with ops.use("reference", "attention"):
        exact = values_and_gradients(node(lengths, **options), qkv, torch.float64)
    all_within_rule(within_rule, got, values_and_gradients(rough, qkv), exact)


def attention_in(q, k, v, lengths, causal, window):
    """`plain` without its slow mask."""
    texts = []
    for q_, k_, v_ in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        heads = [x.transpose(0, 1) for x in (q_, k_, v_)]
        heads[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in heads[1:]]
        score = heads[0] @ heads[1].transpose(1, 2) * q.shape[2] ** -0.5
        at = torch.arange(len(q_), device=q.device)
        apart = at[:, None] - at
        hidden = apart < 0 if causal else torch.zeros_like(apart, dtype=torch.bool)
        hidden = hidden | (apart.abs() >= window) if window else hidden
        score = score.masked_fill(hidden, float("-inf"))
        texts.append((score.softmax(-1) @ heads[2]).transpose(0, 1))
    return torch.cat(texts)


@pytest.mark.gpu
def test_gpu_is_bitwise_repeatable_and_blind_to_the_batch(values_and_gradients):
    """The same text gives the same bits alone, among others, and every time."""
    lengths = (300, 1000, 77)
    qkv = big(lengths, 32, 8, 128)
    with ops.use("triton", "attention"):
        for options in ({}, {"causal": True}, {"dropout_p": 0.3, "seed": 5}):
            one = values_and_gradients(node(lengths, **options), qkv)
            two = values_and_gradients(node(lengths, **options), qkv)
            for a, b in zip(*map(itertools.chain.from_iterable, (one, two)), strict=True):
                assert torch.equal(a, b)
        whole = node(lengths)(*qkv)
        alone = node((1000,))(*[x[300:1300] for x in qkv])
        assert torch.equal(whole[300:1300], alone)


@pytest.mark.gpu
def test_gpu_131_072_tokens_and_offsets_past_two_billion():
    """(131,072, 128 + 2 x 2, 128) elements: the last text lies past 2^31."""
    lengths = (130_000, 1_072)
    q, k, v = big(lengths, 128, 2, 128)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    assert q.stride(0) * q.shape[0] > 2**31
    with ops.use("triton", "attention"):
        o = node(lengths, causal=True, window=512)(q, k, v)
        gradients = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
        tail = [x.detach()[130_000:].clone().requires_grad_() for x in (q, k, v)]
        o_tail = node((1_072,), causal=True, window=512)(*tail)
        expected = torch.autograd.grad(o_tail, tail, torch.ones_like(o_tail))
    assert torch.equal(o[130_000:], o_tail)
    for one, two in zip(gradients, expected, strict=True):
        assert one.isfinite().all() and torch.equal(one[130_000:], two)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flash_dropout", "flash_attn", "triton"])
def test_gpu_dropout_and_grouped_heads_of_every_backend(within_rule, values_and_gradients, backend):
    lengths, p = (120, 33, 64), 0.3 * (backend != "varlen")
    options = {"dropout_p": p, "seed": 11}
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    with ops.use(backend, "attention"):
        mask = dropout_mask(lengths, 4, 128, torch.bfloat16, "cuda", **options)
        qkv = big(lengths, 4, 2, 128)
        before = torch.cuda.get_rng_state()
        got = values_and_gradients(node(lengths, **options), qkv)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        again = values_and_gradients(node(lengths, **options), qkv)
        assert torch.equal(got[0][0], again[0][0])
    cpu = [x.cpu() for x in qkv]
    assert abs(mask[:33, :, :33].float().mean() - (1 - p)) < 0.05
    rough = values_and_gradients(with_mask(lengths, mask, p), cpu)
    exact = values_and_gradients(with_mask(lengths, mask, p), cpu, torch.float64)
    all_within_rule(within_rule, got, rough, exact)
