"""Contrastive steps against plain torch, in one chunk and in many, with the memory of one."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model.transformer import Dropout
from llm2vec_fast.text import Tokens
from llm2vec_fast.train.config import load
from llm2vec_fast.train.contrast import Contrast, assemble
from llm2vec_fast.train.ranks import ALONE
from llm2vec_fast.train.run import load_encoder

CPU = torch.device("cpu")
NO_DROPOUT = Dropout()
DROPOUT = Dropout(attention=0.3, lora=0.2, seed=7)


@pytest.fixture(scope="module")
def encoder(tiny_model, add_tokenizer, tmp_path_factory):
    """A tiny model whose adapters already do something: fresh ones give A no gradient."""
    directory = add_tokenizer(tiny_model(tmp_path_factory.mktemp("contrast"), "llama"))
    given = {"model_name_or_path": str(directory), "output_dir": "o", "train_file": "t"}
    config, _ = load("simcse", None, given | {"torch_dtype": "float32", "lora_r": 4})
    encoder = load_encoder(config, CPU)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters(encoder):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return encoder


def parameters(encoder):
    return [p for p in encoder.model.parameters() if p.requires_grad]


def some_texts(count: int, seed: int = 0, most: int = 12) -> list[Tokens]:
    """Texts of different lengths, whose first tokens are not pooled."""
    random = np.random.default_rng(seed)
    texts = []
    for length in random.integers(3, most, count):
        start = int(random.integers(0, 2))
        texts.append(Tokens(random.integers(5, 290, length).astype(np.int32), start, int(length)))
    return texts


def gradients(encoder, run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss that `run` gives and what it adds to the gradients."""
    for parameter in parameters(encoder):
        parameter.grad = None
    loss = run()
    return loss.detach(), [p.grad for p in parameters(encoder)]


def plain(encoder, texts, queries, scale, symmetric=False, keys=None) -> torch.Tensor:
    """The loss as sentence-transformers spells it out, each text through the model on its own."""
    vectors = []
    for text in texts:
        hidden_TD = encoder.model(PackedBatch.build([text.ids]))
        vectors.append(hidden_TD[text.start : text.end].mean(0))
    vectors_BD = F.normalize(torch.stack(vectors), dim=1)
    scores_BN = scale * vectors_BD[:queries] @ vectors_BD[queries:].T
    if keys is not None:
        for i in range(queries):
            for j in range(len(texts) - queries):
                same = keys[queries + j] in (keys[i], keys[queries + i])
                if i != j and (same or (j < queries and keys[j] == keys[i])):
                    scores_BN = scores_BN.index_put(
                        (torch.tensor(i), torch.tensor(j)), torch.tensor(-torch.inf)
                    )
    labels = torch.arange(queries)
    loss = F.cross_entropy(scores_BN, labels)
    if symmetric:
        loss = (loss + F.cross_entropy(scores_BN[:, :queries].T, labels)) / 2
    loss.backward()
    return loss


def assert_same(got, expected, rtol=1e-5):
    assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        assert theirs.abs().max() > 1e-4, "a gradient of zero would prove nothing"
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * theirs.abs().max().item())


@pytest.mark.parametrize("budget", [10_000, 25, 1])
@pytest.mark.parametrize(
    ("negatives", "scale", "symmetric"),
    [(0, 20.0, False), (0, 50.0, True), (2, 50.0, False), (1, 20.0, True)],
)
def test_loss_and_gradients_are_those_of_plain_torch(encoder, negatives, scale, symmetric, budget):
    B = 6
    texts = some_texts(B * (2 + negatives))
    batch = assemble(texts, B, budget, CPU, NO_DROPOUT)
    assert (len(batch.chunks) == 1) is (budget == 10_000)
    contrast = Contrast(encoder, scale, symmetric, ALONE)
    got = gradients(encoder, lambda: contrast.backward(batch))
    assert_same(got, gradients(encoder, lambda: plain(encoder, texts, B, scale, symmetric)))


@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_texts_are_no_negatives_where_keys_say_so(encoder, symmetric):
    texts = some_texts(10)
    keys = np.array([1, 2, 1, 4, 5, 11, 12, 12, 14, 2], dtype=np.int64)
    batch = assemble(texts, 5, 30, CPU, NO_DROPOUT, keys)
    contrast = Contrast(encoder, 20.0, symmetric, ALONE)
    got = gradients(encoder, lambda: contrast.backward(batch))
    expected = gradients(encoder, lambda: plain(encoder, texts, 5, 20.0, symmetric, keys.tolist()))
    assert_same(got, expected)
    without = gradients(encoder, lambda: plain(encoder, texts, 5, 20.0, symmetric))
    assert abs(without[0] - got[0]) > 1e-2


def test_every_text_has_its_own_place_however_it_is_cut(encoder):
    """Vector i is that of text i, whatever chunk it stands in."""
    texts = some_texts(20, seed=3)
    contrast = Contrast(encoder, 20.0, False, ALONE)
    for budget in (10_000, 40, 1):
        batch = assemble(texts, 10, budget, CPU, NO_DROPOUT)
        with torch.no_grad():
            together = torch.cat([contrast.embed(chunk) for chunk in batch.chunks])[batch.order]
            for vector, text in zip(together, texts, strict=True):
                alone = encoder.model(PackedBatch.build([text.ids]))[text.start : text.end].mean(0)
                torch.testing.assert_close(vector, alone, rtol=1e-5, atol=1e-5)
        assert all(sum(c.batch.lengths) <= budget or len(c.rows) == 1 for c in batch.chunks)


@pytest.mark.parametrize("drop", [DROPOUT, NO_DROPOUT], ids=["dropout", "plain"])
@pytest.mark.parametrize("recompute", [False, True])
def test_many_chunks_are_one_graph_through_them(encoder, drop, recompute):
    """GradCache: the second pass through a chunk drops what the first one dropped."""
    texts = some_texts(24, seed=5)
    batch = assemble(texts, 12, 40, CPU, drop)
    assert len(batch.chunks) > 4
    contrast = Contrast(encoder, 20.0, False, ALONE, recompute)

    def one_graph():
        vectors_BD = torch.cat([contrast.embed(chunk) for chunk in batch.chunks])[batch.order]
        loss = contrast.loss(vectors_BD, batch)
        loss.backward()
        return loss

    got = gradients(encoder, lambda: contrast.backward(batch))
    assert_same(got, gradients(encoder, one_graph))


def test_a_chunk_gives_the_same_bits_with_and_without_a_graph(encoder):
    contrast = Contrast(encoder, 20.0, False, ALONE)
    batch = assemble(some_texts(24, seed=5), 12, 40, CPU, DROPOUT)
    for chunk in batch.chunks:
        with torch.no_grad():
            first = contrast.embed(chunk)
        assert torch.equal(first, contrast.embed(chunk).detach())


def test_chunks_drop_independently(encoder):
    """The same text in every chunk: no two vectors are equal."""
    texts = [some_texts(1)[0]] * 8
    contrast = Contrast(encoder, 20.0, False, ALONE)
    batch = assemble(texts, 4, 1, CPU, DROPOUT)
    assert len(batch.chunks) == 8
    with torch.no_grad():
        vectors = torch.cat([contrast.embed(chunk) for chunk in batch.chunks])
    distance = torch.cdist(vectors, vectors) + torch.eye(8)
    assert distance.min() > 1e-3


def test_a_share_of_the_loss_is_that_share_of_the_gradients(encoder):
    contrast = Contrast(encoder, 20.0, False, ALONE)
    for budget in (10_000, 30):
        batch = assemble(some_texts(12), 6, budget, CPU, DROPOUT)
        loss, whole = gradients(encoder, lambda b=batch: contrast.backward(b))
        part, quarter = gradients(encoder, lambda b=batch: contrast.backward(b, 0.25))
        assert part.item() == pytest.approx(loss.item() / 4)
        for one, other in zip(whole, quarter, strict=True):
            torch.testing.assert_close(other, one / 4, rtol=1e-5, atol=1e-7)


class Peak:
    """The most bytes that graphs hold at once, counted where autograd saves tensors."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc_info):
        self.hooks.__exit__(*exc_info)

    def pack(self, tensor):
        class Held:
            pass

        held, size = Held(), tensor.numel() * tensor.element_size()
        held.tensor = tensor
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(held, self.freed, size)
        return held

    def freed(self, size: int) -> None:
        self.now -= size


def test_no_graph_outlives_its_chunk(encoder):
    """64 pairs hold what their largest chunk holds: a sixteenth of one graph at most."""
    texts = some_texts(128, seed=9, most=24)
    contrast = Contrast(encoder, 20.0, False, ALONE)
    most = {}
    for budget in (48, 100_000):
        batch = assemble(texts, 64, budget, CPU, DROPOUT)
        with Peak() as peak:
            contrast.backward(batch)
        assert peak.now == 0
        most[budget] = peak.most
        if budget == 48:
            assert len(batch.chunks) > 20
            with Peak() as single:
                vectors = [contrast.embed(chunk).sum() for chunk in batch.chunks[:1]]
                vectors.clear()
            assert peak.most <= 1.2 * single.most
    assert most[48] < most[100_000] / 16
