"""info_nce against its definition spelled out pair by pair, and its kernels against the reference.

B queries, N docs, D model
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast import ops
from llm2vec_fast.ops.info_nce import info_nce, info_nce_ref


def drawn(B, N, D, dtype=torch.float64, device="cpu", seed=0):
    """Queries, docs of which the first B resemble them, and keys with many equal ones."""
    noise = torch.Generator().manual_seed(seed)
    query = torch.randn(B, D, generator=noise, dtype=torch.float64)
    docs = torch.randn(N, D, generator=noise, dtype=torch.float64)
    docs[:B] += 0.5 * query
    few = max(2, B // 2)
    # Far beyond int32, negative ones too: keys are hashes of texts.
    names = torch.randint(-(2**63), 2**63 - 1, (few,), generator=noise)
    keys = {
        "query_keys": names[torch.randint(0, few, (B,), generator=noise)].to(device),
        "doc_keys": names[torch.randint(0, few, (N,), generator=noise)].to(device),
    }
    return query.to(dtype).to(device), docs.to(dtype).to(device), keys


def spelled_out(query, docs, scale, symmetric, query_keys=None, doc_keys=None):
    B, N = len(query), len(docs)
    unit = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v in query.tolist()]
    other = [[x / math.sqrt(sum(y * y for y in v)) for x in v] for v in docs.tolist()]
    q = None if query_keys is None else query_keys.tolist()
    d = None if doc_keys is None else doc_keys.tolist()

    def counts(i, j):
        if i == j:
            return True
        same = d is not None and d[j] == d[i]
        same = same or (d is not None and q is not None and d[j] == q[i])
        return not (same or (q is not None and j < B and q[j] == q[i]))

    def logit(i, j):
        return scale * sum(a * b for a, b in zip(unit[i], other[j], strict=True))

    def mean_loss(rivals):
        """rivals(i): the (query, doc) pairs that compete with pair (i, i)"""
        total = 0.0
        for i in range(B):
            pairs = [pair for pair in rivals(i) if counts(*pair)]
            total += math.log(sum(math.exp(logit(*pair) - logit(i, i)) for pair in pairs))
        return total / B

    loss = mean_loss(lambda i: [(i, j) for j in range(N)])
    if symmetric:
        loss = (loss + mean_loss(lambda j: [(i, j) for i in range(B)])) / 2
    return loss


KEYS = [(), ("query_keys",), ("doc_keys",), ("query_keys", "doc_keys")]


@pytest.mark.parametrize("given", KEYS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4, 3), (6, 6, 5), (7, 15, 5)])
def test_equals_its_definition(shape, symmetric, given):
    query, docs, keys = drawn(*shape)
    keys = {name: keys[name] for name in given}
    expected = spelled_out(query, docs, 7.0, symmetric, **keys)
    got = info_nce_ref(query, docs, 7.0, symmetric, **keys)
    assert got.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert info_nce(query.float(), docs.float(), 7.0, symmetric, **keys).item() == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )


def test_keys_leave_something_out():
    query, docs, keys = drawn(7, 15, 5)
    losses = [info_nce(query, docs, **{n: keys[n] for n in given}).item() for given in KEYS]
    assert losses[0] > max(losses[1:3]) and min(losses[1:3]) > losses[3] > 0


def test_the_official_loss():
    """LLM2Vec's HardNegativeNLLLoss: cosines of queries with positives, then with negatives."""
    query, docs, _ = drawn(5, 10, 8, torch.float32)
    scores = F.cosine_similarity(query[:, None], docs[None], dim=-1) * 20.0
    expected = F.cross_entropy(scores, torch.arange(5))
    torch.testing.assert_close(info_nce(query, docs), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_of_the_reference(symmetric):
    query, docs, keys = drawn(4, 6, 3)
    inputs = [query.requires_grad_(), docs.requires_grad_()]
    run = torch.autograd.gradcheck
    assert run(lambda q, d: info_nce_ref(q, d, 3.0, symmetric), inputs)
    assert run(lambda q, d: info_nce_ref(q, d, 3.0, symmetric, **keys), inputs)


def test_bad_inputs_are_refused_by_name():
    query, docs, keys = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(5, 6\)"):
        info_nce(query, torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"info_nce.*\(4,\)"):
        info_nce(query[0], docs)
    with pytest.raises(ValueError, match=r"N >= B.*\(5, 4\).*\(3, 4\)"):
        info_nce(docs, query)
    with pytest.raises(ValueError, match=r"float32.*float16"):
        info_nce(query, docs.half())
    with pytest.raises(ValueError, match=r"int64.*int64"):
        info_nce(query.long(), docs.long())
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            info_nce(query, docs, scale)
    with pytest.raises(ValueError, match=r"doc_keys must be \(5,\).*\(3,\)"):
        info_nce(query, docs, doc_keys=keys)
    with pytest.raises(ValueError, match=r"query_keys.*int64.*int32"):
        info_nce(query, docs, query_keys=keys.int())


# The kernels.


@pytest.fixture
def small_chunks(monkeypatch):
    """small_chunks(rows): chunks of that many rows, whatever the workspace; None leaves them."""

    def use(rows):
        if rows is not None:
            module = ops.backend.kernels("info_nce")
            monkeypatch.setattr(module, "WORKSPACE", 0)
            monkeypatch.setattr(module, "FEWEST_ROWS", rows)
            monkeypatch.setattr(module, "SLOT_ROWS", 4)

    return use


def eager(query, docs, scale=20.0, symmetric=False):
    """Plain torch in the inputs' dtype, as sentence-transformers writes it."""
    logits = scale * (F.normalize(query, dim=1) @ F.normalize(docs, dim=1).t())
    answer = torch.arange(len(query), device=query.device)
    loss = F.cross_entropy(logits.float(), answer)
    if symmetric:
        loss = (loss + F.cross_entropy(logits[:, : len(query)].t().float(), answer)) / 2
    return loss


def compare(run, within_rule, query, docs, scale=20.0, symmetric=False, plain_dtype=None, **keys):
    """Loss and gradients of info_nce by the tolerance rule."""

    def ours(q, d):
        return info_nce(q, d, scale, symmetric, **keys)

    def exact(q, d):
        return info_nce_ref(q, d, scale, symmetric, **keys)

    def plain(q, d):  # with keys: the formula, on operands rounded as eager torch would
        if not keys:
            return eager(q, d, scale, symmetric)
        return info_nce_ref(F.normalize(q), F.normalize(d), scale, symmetric, **keys)

    loss, gradients = run(ours, [query, docs])
    eager_loss, eager_gradients = run(plain, [query, docs], plain_dtype)
    true_loss, true_gradients = run(exact, [query, docs], torch.float64)
    assert loss[0].shape == () and loss[0].dtype == torch.float32
    # What rounding a unit vector's elements does to a logit, and so, relatively, to exp of it. One
    # number or one row of eager torch, which rounds too, may be right by luck.
    multiplied = ops.backend.kernels("info_nce").multiply_dtype(query.device)
    noise = torch.finfo(multiplied).eps * scale / query.shape[1] ** 0.5
    allowed = 2 * (eager_loss[0].double() - true_loss[0]).abs().item()
    allowed += 4 * torch.finfo(torch.float32).eps * (scale + true_loss[0].item())
    allowed += 4 * noise / len(query) ** 0.5
    assert (loss[0].double() - true_loss[0]).abs().item() <= allowed
    for one, other, true in zip(gradients, eager_gradients, true_gradients, strict=True):
        assert one.dtype == query.dtype and one.isfinite().all()
        if multiplied == torch.float32:
            within_rule(one, other, true)
        else:
            allowed = 2 * (other.double() - true).norm() + noise * true.norm()
            allowed += torch.finfo(one.dtype).smallest_normal * one.numel() ** 0.5
            assert (one.double() - true).norm() <= allowed


def plain_dtype_of(place):
    """A GPU multiplies in fp16 also what comes in fp32."""
    return torch.float16 if place.device == "cuda" and place.dtype == torch.float32 else None


SHAPES = [(1, 1, 4), (1, 37, 5), (9, 9, 37), (13, 29, 252)]
CHUNKED = [
    (shape, rows) for shape in SHAPES for rows in (None, 5) if rows is None or shape[0] > rows
]


@pytest.mark.parametrize(("shape", "rows"), CHUNKED)
@pytest.mark.parametrize("symmetric", [False, True])
def test_kernel(place, small_chunks, within_rule, values_and_gradients, shape, symmetric, rows):
    small_chunks(rows)
    query, docs, _ = drawn(*shape, place.dtype, place.device)
    compare(values_and_gradients, within_rule, query, docs, 20.0, symmetric, plain_dtype_of(place))


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("given", KEYS[1:])
def test_kernel_keys(
    place, small_chunks, within_rule, values_and_gradients, given, symmetric, rows
):
    small_chunks(rows)
    query, docs, keys = drawn(12, 21, 37, place.dtype, place.device)
    keys = {name: keys[name] for name in given}
    compare(
        values_and_gradients, within_rule, query, docs, 20.0, symmetric, plain_dtype_of(place),
        **keys,
    )  # fmt: skip


def test_kernel_many_blocks(place, monkeypatch, within_rule, values_and_gradients):
    """Rows longer than a block; fp16 in fp32's place, where one block lands on another."""
    module = ops.backend.kernels("info_nce")
    monkeypatch.setattr(module, "BLOCK", 16)
    query, docs, keys = drawn(3, 40, 37, place.dtype, place.device)
    for given in ({}, keys):
        compare(
            values_and_gradients, within_rule, query, docs, 20.0, True, plain_dtype_of(place),
            **given,
        )  # fmt: skip


@pytest.mark.parametrize("scale", [1e-2, 100.0])
@pytest.mark.parametrize("length", [2e-3, 5e3])
def test_kernel_extremes(place, within_rule, values_and_gradients, scale, length):
    query, docs, _ = drawn(6, 7, 37, torch.float64, place.device)
    docs[1], docs[2], docs[3] = query[1], -query[2], query[4]  # cosines of 1 and -1, a wrong answer
    query, docs = (length * query).to(place.dtype), (length * docs).to(place.dtype)
    for symmetric in (False, True):
        compare(
            values_and_gradients, within_rule, query, docs, scale, symmetric, plain_dtype_of(place)
        )


def test_kernel_merges_columns_far_apart(place, small_chunks, within_rule, values_and_gradients):
    """A column of logits of -100 in one chunk and 100 in the next: exp of 200 is beyond fp32."""
    small_chunks(3)
    query, docs, _ = drawn(6, 6, 12, place.dtype, place.device)
    query[:3], docs[5] = -query[5], query[5]
    compare(values_and_gradients, within_rule, query, docs, 100.0, True, plain_dtype_of(place))


def test_kernel_zero_vectors_and_one_pair(place):
    query, docs, _ = drawn(4, 6, 8, place.dtype, place.device)
    query[1], docs[2] = 0, 0
    query.requires_grad_(), docs.requires_grad_()
    for run in (info_nce, info_nce_ref):
        loss = run(query, docs, symmetric=True)
        dquery, ddocs = torch.autograd.grad(loss, (query, docs))
        assert loss.isfinite() and dquery.isfinite().all() and ddocs.isfinite().all()
        assert not dquery[1].any() and not ddocs[2].any()
        assert dquery[0].any() and ddocs[5].any()
    loss = info_nce(query[:1], docs[:1], symmetric=True)
    loss.backward()
    assert loss.item() == 0 and not query.grad.any() and not docs.grad.any()


def test_kernel_without_queries(place):
    query = torch.zeros(0, 8, dtype=place.dtype, device=place.device, requires_grad=True)
    for N in (0, 3):
        docs = torch.ones(N, 8, dtype=place.dtype, device=place.device, requires_grad=True)
        loss = info_nce(query, docs, symmetric=True)
        assert loss.item() == 0 and loss.dtype == torch.float32
        loss.backward()
        assert query.grad.shape == (0, 8) and docs.grad.shape == (N, 8) and not docs.grad.any()


def test_kernel_reads_views_and_leaves_them_alone(place, values_and_gradients):
    query, docs, _ = drawn(5, 6, 10, place.dtype, place.device)
    wide = torch.full((12, 14), float("nan"), dtype=place.dtype, device=place.device)
    rows = wide[::2, 2:12].copy_(docs)
    columns = docs.t().contiguous().t()
    expected = values_and_gradients(info_nce, [query, docs])
    for other in (rows, columns):
        for left, right in zip(
            values_and_gradients(info_nce, [query, other]), expected, strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    assert torch.equal(rows, docs)


def test_kernel_multiplies_what_comes_back(place):
    """By any factor, again and again on one graph; fp16's gradients are rounded after it."""
    query, docs, _ = drawn(5, 6, 10, place.dtype, place.device)
    query.requires_grad_(), docs.requires_grad_()
    loss = info_nce(query, docs)
    once = torch.autograd.grad(loss, (query, docs), retain_graph=True)
    big = torch.tensor(1024.0, device=place.device)  # a power of two: the same bits
    for factor in (big, big, torch.zeros_like(big)):
        again = torch.autograd.grad(loss, (query, docs), factor, retain_graph=True)
        for left, right in zip(again, once, strict=True):
            tiny = 1024 * torch.finfo(place.dtype).smallest_normal
            torch.testing.assert_close(left, right * factor.to(place.dtype), rtol=0, atol=tiny)
    assert once[0].any() and once[1].any()


def test_products_and_gradients_that_nobody_wants(monkeypatch, small_chunks):
    """3 products a chunk one way, 4 symmetric (3 if all rows fit), fewer for fewer gradients."""
    pytest.importorskip("triton")
    module = ops.backend.kernels("info_nce")
    multiply, count = module.multiply, []
    monkeypatch.setattr(
        module, "multiply", lambda *args, **more: (count.append(1), multiply(*args, **more))
    )
    query, docs, _ = drawn(6, 7, 8, torch.float32)

    def products(symmetric, *wanted):
        count.clear()
        leaves = [x.requires_grad_(w) for x, w in zip((query, docs), wanted, strict=True)]
        with ops.use("triton"):
            loss = info_nce(query, docs, symmetric=symmetric)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            asked = [x for x in leaves if x.requires_grad]
            assert all(g.any() for g in torch.autograd.grad(loss, asked))
        return len(count)

    both, neither = (True, True), (False, False)
    assert [products(s, *both) for s in (False, True)] == [3, 3]
    small_chunks(2)
    assert [products(s, *both) for s in (False, True)] == [9, 12]
    assert [products(s, *neither) for s in (False, True)] == [3, 3]
    assert products(False, True, False) == products(False, False, True) == 6
    with torch.no_grad():
        count.clear()
        query.requires_grad_()
        with ops.use("triton"):
            info_nce(query, docs)
        assert len(count) == 3


@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fp16_products(
    monkeypatch, small_chunks, within_rule, values_and_gradients, scale, symmetric
):
    """What a GPU does: operands in fp16, gradients over the cosines' memory; here on the CPU."""
    pytest.importorskip("triton")
    module = ops.backend.kernels("info_nce")
    monkeypatch.setattr(module, "multiply_dtype", lambda device: torch.float16)
    small_chunks(8)
    query, docs, keys = drawn(20, 37, 64, torch.float32)
    with ops.use("triton"):
        for given in ({}, keys):
            compare(
                values_and_gradients, within_rule, query, docs, scale, symmetric, torch.float16,
                **given,
            )  # fmt: skip


def test_meta_tensors_prove_no_host_sync():
    from llm2vec_fast.ops.kernels.launch import recorded

    query = torch.empty(5000, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    docs = torch.empty(90_000, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    keys = torch.empty(90_000, dtype=torch.int64, device="meta")
    with recorded() as launches, ops.use("triton"):
        loss = info_nce(query, docs, 20.0, True, query_keys=keys[:5000], doc_keys=keys)
        loss.backward()
    names = [launch.kernel.fn.__name__ for launch in launches]
    chunks = 3  # of 2,048 rows
    assert names.count("_columns") == names.count("_rows") == chunks
    assert query.grad.dtype == docs.grad.dtype == torch.bfloat16
    assert docs.grad.shape == docs.shape


# Across ranks.

RANK = """
import sys, torch, torch.distributed as dist
from llm2vec_fast import ops
from llm2vec_fast.ops.info_nce import info_nce

rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
results = []
for backend, symmetric, query, docs, query_keys, doc_keys in torch.load(f"{path}/given.pt"):
    query, docs = (x[rank].clone().requires_grad_() for x in (query, docs))
    keys = {"query_keys": query_keys, "doc_keys": doc_keys}
    keys = {name: value[rank] for name, value in keys.items() if value is not None}
    with ops.use(backend):
        loss = info_nce(query, docs, 20.0, symmetric, dist.group.WORLD, **keys)
    results.append((loss.detach(), *torch.autograd.grad(2 * loss, (query, docs))))
torch.save(results, f"{path}/{rank}.pt")
dist.barrier()  # a rank that leaves while the other still works can abort in gloo
dist.destroy_process_group()
"""


def on_two_ranks(path, batches):
    """What each of two processes gives for each of its halves of these batches."""
    torch.save(batches, path / "given.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(path / f"{rank}.pt") for rank in range(2)]


def test_ranks_are_one_batch(tmp_path):
    """The mean of the ranks' losses and gradients is the loss of all their queries and docs.

    Slow (seconds): two processes have to start and import torch.
    """
    pytest.importorskip("triton")
    B, N = 3, 5
    # One process has all answers first; each rank has its own answers first.
    order = [*range(B), *range(2 * B, 3 * B - 1), *range(B, 2 * B), *range(3 * B - 1, 2 * N)]
    expected, halves = [], []
    kinds = [
        *itertools.product(["reference"], [0, 1], KEYS),
        ("triton", 0, ()),
        ("triton", 1, KEYS[3]),
    ]
    for backend, symmetric, names in kinds:
        query, docs, keys = drawn(2 * B, 2 * N, 8, torch.float32, seed=len(names))
        keys = {name: keys[name] for name in names}
        halves.append([backend, bool(symmetric), query.view(2, B, 8), docs[order].view(2, N, 8)])
        asked, answers = keys.get("query_keys"), keys.get("doc_keys")
        halves[-1] += [None if asked is None else asked.view(2, B)]
        halves[-1] += [None if answers is None else answers[order].view(2, N)]
        query, docs = query.double().requires_grad_(), docs.double().requires_grad_()
        loss = info_nce_ref(query, docs, 20.0, bool(symmetric), **keys)
        dquery, ddocs = torch.autograd.grad(2 * loss, (query, docs))
        expected.append((loss.detach(), dquery, ddocs[order]))
    ranks = on_two_ranks(tmp_path, halves)
    for (loss, dquery, ddocs), *parts in zip(expected, *ranks, strict=True):
        losses, dqueries, ddoc_parts = zip(*parts, strict=True)
        close = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}
        torch.testing.assert_close(sum(losses) / 2, loss, **close)
        torch.testing.assert_close(torch.cat(dqueries) / 2, dquery, **close)
        torch.testing.assert_close(torch.cat(ddoc_parts) / 2, ddocs, **close)


# On a GPU, at real sizes.


def gpu_batch(B, N, D, dtype=torch.bfloat16):
    query = torch.randn(B, D, device="cuda", dtype=dtype)
    docs = torch.randn(N, D, device="cuda", dtype=dtype)
    docs[:B] += query
    return query.requires_grad_(), docs.requires_grad_()


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_real_size(within_rule, values_and_gradients, dtype, symmetric):
    """More than one chunk of rows (5,000 x 66,002 in fp32 is 1.3 GB), no multiples of anything."""
    query, docs = gpu_batch(5000, 66_002, 508, dtype)
    with ops.use("triton", "info_nce"):
        plain = torch.float16 if dtype == torch.float32 else None
        compare(values_and_gradients, within_rule, query, docs, 20.0, symmetric, plain)


@pytest.mark.gpu
def test_gpu_is_deterministic_and_never_waits():
    query, docs = gpu_batch(16_384, 32_768, 1024)
    keys = torch.randint(0, 1000, (32_768,), device="cuda")

    def run():
        loss = info_nce(query, docs, 20.0, True, query_keys=keys[:16_384], doc_keys=keys)
        return loss.detach(), *torch.autograd.grad(loss, (query, docs))

    with ops.use("triton", "info_nce"):
        first = run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(x.isfinite().all() for x in first)


@pytest.mark.gpu
def test_gpu_past_two_billion_elements():
    """Docs beyond offset 2^31, of which the last are the queries' copies: large gradients there."""
    B, N, D = 64, 530_000, 4096
    query, docs = gpu_batch(B, N, D)
    with torch.no_grad():
        docs[-B:] = query
    with ops.use("triton", "info_nce"):
        loss = info_nce(query, docs)
    dquery, ddocs = torch.autograd.grad(loss, (query, docs))
    # Random docs have cosines of 0 +- 1/64: only answers and copies count beside exp(0) each.
    unit = F.normalize(query.detach().float(), dim=1)
    near = torch.cat([docs[:B], docs[-B:]]).detach().float().requires_grad_()
    logits = 20 * unit @ F.normalize(near, dim=1).t()
    far = math.log(N - 2 * B) + 200 / D  # mean of exp(20 * cosine) for normal cosines
    logits = torch.cat([logits, torch.full((B, 1), far, device="cuda")], dim=1)
    expected = F.cross_entropy(logits, torch.arange(B, device="cuda"))
    (dnear,) = torch.autograd.grad(expected, near)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    got = torch.cat([ddocs[:B], ddocs[-B:]]).float()
    assert (got - dnear).norm() < 0.02 * dnear.norm() and dnear[-1].norm() > 0
    assert dquery.isfinite().all() and ddocs[N // 2].any()


@pytest.mark.gpu
def test_gpu_memory_of_65536_pairs():
    query, docs = gpu_batch(65_536, 65_536, 4096)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with ops.use("triton", "info_nce"):
        torch.autograd.grad(info_nce(query, docs), (query, docs))
    extra = torch.cuda.max_memory_allocated() - before
    gradients = 2 * query.numel() * query.element_size()
    assert extra - gradients <= 2.1e9, f"{extra / 1e9:.2f} GB, gradients included"
