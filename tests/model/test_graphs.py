"""Buckets, dummy texts, and which graphs there are. Where there is no GPU a stand-in "replays" by
running the forward pass again on the memory that a graph would read; the rest is the real thing.
"""

from __future__ import annotations

import contextlib
import copy
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm2vec_fast import LLM2Vec, ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import ModelConfig, adapt, graphs
from llm2vec_fast.model.graphs import MOST, QUERY, SWITCH, Bucket, forward, most_tokens
from llm2vec_fast.model.transformer import Transformer
from llm2vec_fast.ops.pool import POOL_MODES

TEXTS = ["a cat", "The quick brown fox jumps over the lazy dog.", "x", "list of numbers " * 6]


class Eager:
    """Stands for `graphs.Pool`."""

    bytes = 100

    def __init__(self, device):
        self.device = device

    def capture(self, run):
        result = run()
        return result, lambda: result.copy_(run()), self.bytes

    @contextlib.contextmanager
    def turn(self):
        yield


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("graphs"), "llama"))


@pytest.fixture
def make(directory):
    """make(**arguments) -> an encoder of its own"""
    return lambda **given: LLM2Vec.from_pretrained(directory, **{"dtype": "float32"} | given)


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(graphs, "wanted", lambda device: True)
    monkeypatch.setattr(graphs, "Pool", Eager)


def plain(encoder, texts):
    """Vectors without graphs and buckets."""
    found = encoder.tokenizer(texts, [""] * len(texts))
    ids, spans = [t.ids for t in found], [(t.start, t.end) for t in found]
    with torch.inference_mode():
        return encoder(PackedBatch.build(ids, spans, encoder.device)).cpu()


def same(got, expected, atol=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


lengths_of_batches = st.one_of(
    st.lists(st.integers(1, 600), min_size=1, max_size=40),
    st.builds(lambda n, count: [n] * count, st.integers(1, 70), st.integers(1, 300)),
)


@settings(max_examples=200, deadline=None)
@given(lengths_of_batches)
def test_what_a_batch_leaves_over_are_texts_of_real_lengths(lengths):
    bucket = Bucket.of(lengths)
    dummies = bucket.dummies(lengths)
    assert len(lengths) + len(dummies) == bucket.texts
    assert sum(lengths) + sum(dummies) == bucket.tokens
    assert dummies and 1 <= min(dummies) and max([*lengths, *dummies]) <= bucket.longest
    assert bucket.tokens <= 1.25 * (sum(lengths) + len(dummies)) + 8
    assert len(dummies) <= 3 * len(lengths) + 1


def test_there_are_few_buckets():
    assert Bucket.of([37]) == (40, 2, 64)
    assert Bucket.of([40]) == (48, 2, 64)  # one dummy at least: batches of one size are no bucket
    assert len({Bucket.of([n]) for n in range(1, 129)}) <= 20
    assert len({Bucket.of([n] * 32) for n in range(1, 129)}) <= 40


@pytest.mark.parametrize("mode", POOL_MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_vectors_through_a_bucket_are_the_plain_ones(tiny_model, ours, mode, causal):
    model = ours(tiny_model(None, "qwen3"), causal)
    rng = np.random.default_rng(0)
    for lengths in ([1], [16], [37], [5, 90, 1], [7] * 31, [64] * 4):
        ids = [rng.integers(0, 300, n).astype(np.int32) for n in lengths]
        spans = [(n // 3, n) for n in lengths]
        bucket = Bucket.of(lengths)
        batch = bucket.build(ids, spans, "cpu")
        assert (batch.n_tokens, len(batch), batch.max_seqlen) == bucket
        with torch.inference_mode():
            got = forward(model, batch, mode)[: len(lengths)]
            same(got, forward(model, PackedBatch.build(ids, spans), mode))


def test_what_is_launched_depends_on_the_bucket_alone(tiny_model):
    """Two batches of one bucket: the same kernels, grids and numbers, so a graph serves both."""
    pytest.importorskip("triton")
    from llm2vec_fast.ops.kernels.launch import recorded

    config = ModelConfig.from_file(tiny_model(None, "llama") / "config.json")
    with torch.device("meta"):
        model = Transformer(config).bfloat16().requires_grad_(False)
    model.rope_tables(512, torch.device("meta"))

    def launches(*lengths):
        ids, spans = [range(n) for n in lengths], [(0, n) for n in lengths]
        batch = Bucket.of(lengths).build(ids, spans, "meta")
        with ops.use("triton"), recorded() as found, torch.inference_mode():
            forward(model, batch, "mean")
        return [
            (x.kernel, x.grid, [getattr(a, "shape", a) for a in x.args], x.options) for x in found
        ]

    assert Bucket.of([33, 20, 30]) == Bucket.of([17, 50, 16])
    assert launches(33, 20, 30) == launches(17, 50, 16) != launches(33, 20, 70)


def test_how_many_tokens_are_launch_bound(tiny_model):
    def most(layers, hidden, feed, heads, kv_heads):
        return most_tokens(ModelConfig.from_dict({
            "model_type": "llama", "vocab_size": 32_000, "hidden_size": hidden,
            "intermediate_size": feed, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        }))  # fmt: skip

    small, middle = most(30, 576, 1536, 9, 3), most(24, 2048, 5504, 16, 16)
    large = most(32, 4096, 14_336, 32, 8)
    assert MOST > small > 1000 > middle > QUERY == large
    assert most(2, 48, 80, 4, 2) == MOST


def test_none_without_a_gpu_or_when_turned_off(make, eager, monkeypatch):
    encoder = make()
    assert encoder.graphs.bucket([5]) and not encoder.graphs.bucket([MOST, 1])
    monkeypatch.undo()
    assert encoder.graphs.bucket([5]) is None  # a CPU
    cuda = torch.device("cuda")
    assert graphs.wanted(cuda)
    monkeypatch.setenv(SWITCH, "0")
    assert not graphs.wanted(cuda)


def test_eager_at_first_then_captured_then_replayed(make, eager):
    encoder = make()
    expected = plain(encoder, TEXTS)
    held = [encoder.encode(TEXTS)]
    assert not encoder.graphs.graphs
    for _ in range(3):
        held.append(encoder.encode(TEXTS))
        assert len(encoder.graphs.graphs) == 1
        # The same bucket, other texts: nothing of the last ones is left.
        same(encoder.encode(TEXTS[::-1]), expected.flip(0))
    for vectors in held:
        same(vectors, expected)


@pytest.fixture(scope="module")
def shared(directory):
    """An encoder whose graphs add up from example to example."""
    return LLM2Vec.from_pretrained(directory, dtype="float32")


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=9), size=st.integers(1, 9))
def test_vectors_do_not_depend_on_which_graphs_there_are(shared, eager, texts, size):
    expected = plain(shared, texts)
    for _ in range(2):
        same(shared.encode(texts, size), expected)


def captured(encoder, *texts):
    for text in texts:
        for _ in range(2):
            encoder.encode(text)
    return list(encoder.graphs.graphs.values())


def test_rope_tables_that_grow_leave_captured_graphs_alone(make, eager):
    encoder = make(max_length=2000, doc_max_length=2000)
    (graph,) = captured(encoder, TEXTS[0])
    long = "list of values " * 900
    same(encoder.encode(long), plain(encoder, [long])[0])
    assert len(encoder.model._rope[0]) > len(graph.rope[0])
    same(encoder.encode(TEXTS[0]), plain(encoder, TEXTS[:1])[0])
    assert encoder.graphs.graphs[next(iter(encoder.graphs.graphs))] is graph


def test_weights_that_moved_drop_the_graphs(make, eager):
    encoder = make()
    (old,) = captured(encoder, TEXTS[0])
    encoder.to(torch.bfloat16)
    same(encoder.encode(TEXTS[0]), plain(encoder, TEXTS[:1])[0], 0.05)
    (new,) = captured(encoder, TEXTS[0])
    assert new is not old
    with torch.no_grad():  # as an optimizer does that keeps all parameters in one tensor
        weight = encoder.model.norm.weight
        weight.data = torch.zeros_like(weight)
    assert not encoder.encode(TEXTS[0]).any()


def test_weights_changed_in_place_are_seen(make, eager):
    encoder = make()
    (graph,) = captured(encoder, TEXTS[0])
    with torch.no_grad():
        encoder.model.norm.weight.zero_()
    assert not encoder.encode(TEXTS[0]).any()
    assert captured(encoder, TEXTS[0]) == [graph]


def test_no_graph_with_adapters_in_training(make, eager):
    encoder = make()
    before = encoder.encode(TEXTS[0])
    assert captured(encoder, TEXTS[0])
    adapt.attach(encoder.model, 2, 4, ["v_proj"], 0)
    assert encoder.graphs.bucket([5]) is None
    with torch.no_grad():
        encoder.model.layers[0].attn.qkv.lora.b.fill_(1.0)
    assert (encoder.encode(TEXTS[0]) - before).abs().max() > 1e-3


def test_a_forced_backend_has_graphs_of_its_own(make, eager):
    encoder = make()
    captured(encoder, TEXTS[0])
    with ops.use("reference"):
        captured(encoder, TEXTS[0])
        assert len(encoder.graphs.graphs) == 2
    captured(encoder, TEXTS[0])
    assert len(encoder.graphs.graphs) == 2


def test_the_least_recently_used_graphs_make_room(make, eager, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 2 * Eager.bytes)
    encoder = make()
    short, middle, long = TEXTS[0], TEXTS[1], TEXTS[3]
    one, two = captured(encoder, short, middle)
    encoder.encode(short)
    kept, three = captured(encoder, long)
    assert kept is one and three is not two
    monkeypatch.setattr(graphs, "LIMIT", 1)
    assert captured(encoder, middle) != [two] and len(encoder.graphs.graphs) == 1
    for text in TEXTS:
        same(encoder.encode(text), plain(encoder, [text])[0])


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_captured_goes_on_without(make, eager, monkeypatch, kind):
    encoder, other = make(), make()
    assert captured(encoder, TEXTS[0])

    def fail(self, run):
        run()
        raise kind("operation not permitted when stream is capturing")

    monkeypatch.setattr(Eager, "capture", fail)
    encoder.encode(TEXTS[1])
    with pytest.warns(RuntimeWarning, match=f"not permitted.*{SWITCH}=0"):
        got = encoder.encode(TEXTS[1])
    same(got, plain(encoder, TEXTS[1:2])[0])
    assert not encoder.graphs.graphs and encoder.graphs.bucket([5]) is None
    assert other.graphs.bucket([5])


def test_a_batch_that_does_not_fit_takes_the_memory_of_graphs(make, eager, monkeypatch):
    encoder = make()
    expected = plain(encoder, TEXTS)
    assert captured(encoder, TEXTS[0])
    forward, tried = encoder.model.forward, []

    def limited(batch):
        tried.append(len(encoder.graphs.graphs))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch)

    monkeypatch.setattr(encoder.model, "forward", limited)
    same(encoder.encode(TEXTS), expected)
    assert tried[:2] == [1, 0]


def test_two_encoders_and_a_copy_have_graphs_of_their_own(make, eager):
    bidirectional, causal = make(), make(enable_bidirectional=False, pooling_mode="last_token")
    twin = copy.deepcopy(bidirectional)
    for encoder in (bidirectional, causal, twin):
        for _ in range(3):
            same(encoder.encode(TEXTS), plain(encoder, TEXTS))
    assert twin.graphs.model is twin.model is not bidirectional.model


def test_threads_do_not_mix_their_texts(make, eager):
    encoder = make()
    texts = [f"{letter} cat" for letter in "abcdefgh"]  # of one bucket
    expected, wrong = plain(encoder, texts), []

    def encode(row):
        for _ in range(20):
            if (encoder.encode(texts[row]) - expected[row]).abs().max() > 1e-5:
                wrong.append(row)

    threads = [threading.Thread(target=encode, args=(row,)) for row in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(encoder.graphs.graphs) <= 2


# --- on a GPU: capture and replay themselves ---


@pytest.fixture
def on_gpu(make):
    return lambda **given: make(**{"device": "cuda", "dtype": "bfloat16"} | given)


def as_close_as_bf16(got, expected):
    cosine = torch.nn.functional.cosine_similarity(got.float(), expected.float(), dim=-1)
    assert got.isfinite().all() and cosine.min() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_replays_are_the_plain_vectors_at_many_shapes(on_gpu, dtype):
    encoder = on_gpu(dtype=dtype)
    batches = [[text] for text in TEXTS] + [TEXTS, TEXTS * 5, ["x"] * 33, [TEXTS[3] * 3, "x"]]
    first = [encoder.encode(texts) for texts in batches]
    for _ in range(3):
        for texts, vectors in zip(batches, first, strict=True):
            again = encoder.encode(texts)
            assert torch.equal(again, vectors)  # eager, captured or replayed: the same shapes
            as_close_as_bf16(again, plain(encoder, texts))
    assert len(encoder.graphs.graphs) >= 5


@pytest.mark.gpu
def test_a_replay_waits_for_nothing(on_gpu):
    encoder = on_gpu()
    captured(encoder, TEXTS[0])
    tokens = encoder.tokenizer([TEXTS[0]], [""])
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = encoder.embed_tokens(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    as_close_as_bf16(torch.from_numpy(result()), plain(encoder, TEXTS[:1]))


@pytest.mark.gpu
def test_a_graph_and_longer_rope_tables(on_gpu):
    encoder = on_gpu(max_length=2000, doc_max_length=2000)
    captured(encoder, TEXTS[0])
    expected = encoder.encode(TEXTS[0])
    encoder.encode("list of values " * 900)
    torch.cuda.empty_cache()
    torch.full((1 << 20,), float("nan"), device="cuda")  # into what was freed
    assert torch.equal(encoder.encode(TEXTS[0]), expected)


@pytest.mark.gpu
def test_moving_and_another_dtype_drop_graphs_on_a_gpu(on_gpu):
    encoder = on_gpu()
    for kind in (torch.float16, torch.bfloat16):
        captured(encoder, *TEXTS)
        encoder.to(kind)
        for _ in range(3):
            as_close_as_bf16(encoder.encode(TEXTS), plain(encoder, TEXTS))
    captured(encoder, TEXTS[0])
    expected = encoder.encode(TEXTS[0])
    as_close_as_bf16(encoder.encode(TEXTS[0], device="cpu"), expected)
    assert not encoder.graphs.graphs
    encoder.to("cuda")
    captured(encoder, TEXTS[0])
    as_close_as_bf16(encoder.encode(TEXTS[0]), expected)


@pytest.mark.gpu
def test_two_encoders_on_a_gpu(on_gpu):
    encoders = [on_gpu(), on_gpu(enable_bidirectional=False)]
    expected = [plain(encoder, TEXTS) for encoder in encoders]
    for _ in range(4):
        for encoder, vectors in zip(encoders, expected, strict=True):
            as_close_as_bf16(encoder.encode(TEXTS), vectors)
    assert all(len(encoder.graphs.graphs) == 1 for encoder in encoders)


@pytest.mark.gpu
def test_other_streams_and_evicted_graphs(on_gpu, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT", 1)
    encoder = on_gpu()
    expected = [plain(encoder, [text])[0] for text in TEXTS]
    for _ in range(4):
        for text, vector in zip(TEXTS, expected, strict=True):
            with torch.cuda.stream(torch.cuda.Stream()):
                as_close_as_bf16(encoder.encode(text), vector)
    assert len(encoder.graphs.graphs) == 1
