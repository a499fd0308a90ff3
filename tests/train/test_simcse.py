"""SimCSE: two views of a text, what of it is pooled, equal texts, steps as pure functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2vec_fast.train.config import load
from llm2vec_fast.train.ranks import ALONE, Ranks
from llm2vec_fast.train.run import load_encoder
from llm2vec_fast.train.simcse import SimCSE

CPU = torch.device("cpu")
TEXTS = [f"{'a list of values ' * (n % 3)}number {n} of many" for n in range(20)]


@pytest.fixture(scope="module")
def base(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("simcse"), "llama"))


@pytest.fixture(scope="module")
def make(base):
    """make(texts, ranks=ALONE, **config) -> SimCSE on adapters that already do something"""
    encoder = None

    def build(texts=TEXTS, ranks=ALONE, **values) -> SimCSE:
        nonlocal encoder
        given = {"model_name_or_path": str(base), "output_dir": "o", "train_file": "t"}
        given |= {"torch_dtype": "float32", "per_device_train_batch_size": 4}
        given |= {"tokens_per_batch": 4096}
        config, _ = load("simcse", None, given | values)
        if encoder is None:
            encoder = load_encoder(config, CPU)
            noise = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for parameter in encoder.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
        return SimCSE(encoder, texts, config, ranks)

    return build


def vectors(objective, batch) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([objective.contrast.embed(c) for c in batch.chunks])[batch.order]


@pytest.mark.parametrize("budget", [4096, 32])
@pytest.mark.parametrize("dropped", ["simcse_dropout", "lora_dropout"])
def test_views_differ_by_each_dropout(make, dropped, budget):
    """Every pair, also where both views stand in one chunk."""
    none = {"simcse_dropout": 0.0, "lora_dropout": 0.0, "tokens_per_batch": budget}
    objective = make(**none | {dropped: 0.2})
    (batch,) = objective.prepare(0).parts
    first, second = vectors(objective, batch).split(4)
    assert ((first - second).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("budget", [4096, 32])
def test_views_are_equal_without_dropout(make, budget):
    objective = make(simcse_dropout=0.0, lora_dropout=0.0, tokens_per_batch=budget)
    work = objective.prepare(0)
    (batch,) = work.parts
    first, second = vectors(objective, batch).split(4)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    # So they are what `encode` gives of the very texts of the step.
    expected = objective.encoder.encode([TEXTS[i] for i in work.rows])
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert work.tokens == sum(2 * len(t.ids) for t in tokens(objective, work.rows))


def tokens(objective, rows):
    return objective.encoder.tokenizer([TEXTS[i] for i in rows], [""] * len(rows))


@pytest.mark.parametrize(("compat", "first"), [("fixed", 1), ("official", 0)])
def test_what_is_pooled(make, compat, first):
    """The text without its beginning-of-sequence token; officially with it."""
    objective = make(compat=compat)
    (batch,) = objective.prepare(0).parts
    for chunk in batch.chunks:
        spans = chunk.batch.spans - chunk.batch.cu_seqlens[:-1, None]
        assert (spans[:, 0] == first).all()
        assert spans[:, 1].tolist() == list(chunk.batch.lengths)
        assert (chunk.batch.ids[chunk.batch.cu_seqlens[:-1].long()] == 0).all()  # <s>
    assert len(vectors(objective, batch)) == 8


def test_the_loss_is_that_of_the_two_views(make):
    objective = make(loss_scale=20.0)
    work = objective.prepare(3)
    first, second = F.normalize(vectors(objective, work.parts[0]), dim=1).split(4)
    expected = F.cross_entropy(20 * first @ second.T, torch.arange(4))
    assert objective.backward(work).item() == pytest.approx(expected.item(), rel=1e-5)


def test_equal_texts(make):
    """They are each other's negatives unless mask_duplicates; alone in a batch they leave none."""
    texts = ["the same text"] * 8
    plain = make(texts, simcse_dropout=0.0, lora_dropout=0.0)
    assert plain.backward(plain.prepare(0)).item() == pytest.approx(np.log(4), rel=1e-4)
    masked = make(texts, mask_duplicates=True)
    assert masked.backward(masked.prepare(0)).item() == pytest.approx(0.0, abs=1e-6)
    unequal = make(mask_duplicates=True), make()
    losses = [objective.backward(objective.prepare(0)).item() for objective in unequal]
    assert losses[0] == losses[1] > 0


def test_a_text_of_which_nothing_is_left_is_named(make):
    objective = make(["a text", "", "more", "text"])
    with pytest.raises(ValueError, match=r"nothing is left of the training text ''"):
        objective.prepare(0)


def same(one, other) -> bool:
    if len(one.parts) != len(other.parts) or not np.array_equal(one.rows, other.rows):
        return False
    pairs = [
        pair
        for a, b in zip(one.parts, other.parts, strict=True)
        for pair in zip(a.chunks, b.chunks, strict=True)
    ]
    return all(torch.equal(a.batch.ids, b.batch.ids) and a.drop == b.drop for a, b in pairs)


def test_a_step_is_a_function_of_its_number(make):
    """Resuming rests on it: nothing that was prepared before matters."""
    one, other = make(), make()
    works = [one.prepare(step) for step in range(12)]
    for step in (11, 2, 7):
        assert same(other.prepare(step), works[step])
    assert not same(make(seed=43).prepare(2), works[2])
    drops = [c.drop for w in works for part in w.parts for c in part.chunks]
    assert len({drop.seed for drop in drops}) == len(drops)
    epoch = np.concatenate([work.rows for work in works[:5]])
    assert one.steps_per_epoch == 5 and sorted(epoch.tolist()) == list(range(20))


def test_ranks_take_other_rows_and_drop_otherwise(make):
    first, second = (make(ranks=Ranks(rank, 2)).prepare(0) for rank in range(2))
    assert not set(first.rows.tolist()) & set(second.rows.tolist())
    assert first.parts[0].chunks[0].drop.seed != second.parts[0].chunks[0].drop.seed
    whole = make(per_device_train_batch_size=8).prepare(0)
    assert whole.rows.tolist() == [*first.rows, *second.rows]


def test_accumulation_is_the_mean_of_losses_with_their_own_negatives(make):
    accumulated, single = make(gradient_accumulation_steps=3), make()
    work = accumulated.prepare(1)
    assert len(work.parts) == 3 and len(work.rows) == 12
    losses = [single.backward(single.prepare(step)).item() for step in (3, 4, 5)]
    assert accumulated.backward(work).item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert accumulated.steps_per_epoch == 1


def test_the_fingerprint_is_that_of_the_texts_in_their_order(make):
    found = {make(texts).fingerprint for texts in (TEXTS, TEXTS[::-1], TEXTS[:-1], list(TEXTS))}
    assert len(found) == 3
    # Texts that would be one string if joined.
    assert make(["ab", "c", "d", "e"]).fingerprint != make(["a", "bc", "d", "e"]).fingerprint
