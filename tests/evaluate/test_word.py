"""The linear probe: it learns what the states hold, and nothing where they hold nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from llm2vec_fast.evaluate import Sentence, word
from llm2vec_fast.evaluate.word import fit, scores

WORDS = "list dict set key value error file byte string number index name object return".split()
KIND = {name: "NOUN" if i % 2 else "VERB" for i, name in enumerate(WORDS)}


def sentences(count: int, seed: int, tag) -> list[Sentence]:
    """Random words; tag(word, the word before it or None, random numbers) is a word's tag."""
    chance = random.Random(seed)
    made = []
    for _ in range(count):
        words = tuple(chance.choices(WORDS, k=chance.randint(2, 7)))
        tags = (tag(w, p, chance) for w, p in zip(words, (None, *words), strict=False))
        made.append(Sentence(words, tuple(tags)))
    return made


def own(word, _before, _chance):
    return KIND[word]


def figures(model, tag, **options) -> dict:
    options = {"spans": False, "steps": 300, "learning_rate": 2e-2} | options
    return word(model, sentences(300, 0, tag), sentences(30, 1, tag), **options)


@pytest.fixture(scope="module")
def causal(tiny_encoder):
    return tiny_encoder(enable_bidirectional=False)


def test_it_learns_what_a_word_tells_of_itself(causal):
    found = figures(causal, own)
    assert found["accuracy"] > 85
    assert (found["sentences"], found["train_sentences"], found["tags"]) == (30, 300, 2)
    assert found["words"] == sum(len(s.words) for s in sentences(30, 1, own))


def test_it_learns_nothing_from_random_tags(causal):
    found = figures(causal, lambda _w, _b, chance: chance.choice(["NOUN", "VERB"]))
    assert 30 < found["accuracy"] < 70


def test_the_state_to_the_left_does_not_know_the_word_of_a_causal_model(causal):
    """A causal model's state left of a word of one token has not seen it, but has seen the word
    before it.
    """
    letters = "a b c d e f".split()

    def made(count, seed, of_before):
        chance, out = random.Random(seed), []
        for _ in range(count):
            words = tuple(chance.choices(letters, k=6))
            told = ("a", *words[:-1]) if of_before else words
            out.append(Sentence(words, tuple("X" if w in "ace" else "Y" for w in told)))
        return out

    def accuracy(labels, of_before):
        return word(
            causal, made(120, 0, of_before), made(40, 1, of_before), spans=False, labels=labels,
            steps=500, learning_rate=2e-2,
        )["accuracy"]  # fmt: skip

    assert accuracy("same_token", of_before=False) > 95
    assert accuracy("next_token", of_before=False) < 65
    assert accuracy("next_token", of_before=True) > 90


def test_the_same_seed_gives_the_same_figures_and_leaves_other_randomness_alone(causal):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = figures(causal, own, steps=5, learning_rate=1e-3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert figures(causal, own, steps=5, learning_rate=1e-3) == one
    states, tags, bounds = torch.randn(9, 4), torch.arange(9) % 3, np.array([0, 2, 5, 9])
    layers = [fit(states, tags, bounds, 3, 4, 2, 1e-2, 0.1, seed).weight for seed in (1, 1, 2)]
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], layers[2])


def test_the_model_is_left_as_it_was(causal):
    weights = {name: value.clone() for name, value in causal.state_dict().items()}
    figures(causal, own, steps=3)
    assert all(torch.equal(value, weights[n]) for n, value in causal.state_dict().items())
    assert all(p.grad is None for p in causal.parameters())


def test_fit_is_adamw_on_batches_of_whole_sentences():
    """Without dropout and with one batch of everything, it is a plain loop over everything."""
    states, tags = torch.randn(9, 4), torch.arange(9) % 3
    layer = fit(states, tags, np.array([0, 2, 5, 9]), 3, 7, 8, 1e-2, 0.0, seed=3)
    torch.manual_seed(3)
    plain = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(7):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(plain(states), tags).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, plain.weight)
    torch.testing.assert_close(layer.bias, plain.bias)


def test_a_tag_that_training_lacks_is_wrong(causal):
    train = sentences(80, 0, own)
    test = [Sentence(s.words, tuple("ADJ" for _ in s.tags)) for s in sentences(5, 1, own)]
    assert word(causal, train, test, spans=False, steps=2)["accuracy"] == 0


def test_spans_by_hand():
    truth = [["B-NP", "I-NP", "O", "B-VP"], ["B-NP", "B-NP", "O"]]
    guessed = [["B-NP", "O", "O", "B-VP"], ["B-NP", "B-NP", "B-PP"]]
    # There: 2 + 2 spans. Found: 2 + 3, of which VP and the last two NP are right.
    found = scores(truth, guessed, spans=True)
    assert found["precision"] == pytest.approx(100 * 3 / 5)
    assert found["recall"] == pytest.approx(100 * 3 / 4)
    assert found["f1"] == pytest.approx(100 * 2 * 0.6 * 0.75 / 1.35)
    assert found["accuracy"] == pytest.approx(100 * 5 / 7)
    assert "f1" not in scores(truth, guessed, spans=False)


def test_a_span_is_right_only_with_its_kind_and_its_end():
    truth = [["B-NP", "I-NP", "I-NP"]]
    assert scores(truth, [["B-NP", "I-NP", "O"]], spans=True)["f1"] == 0
    assert scores(truth, [["B-VP", "I-VP", "I-VP"]], spans=True)["f1"] == 0
    assert scores(truth, [["I-NP", "I-NP", "I-NP"]], spans=True)["f1"] == 100  # as conlleval


def test_no_spans_at_all_is_zero_without_a_warning(recwarn):
    assert scores([["O", "O"]], [["O", "O"]], spans=True)["f1"] == 0
    assert not recwarn.list


def test_spans_through_the_model(causal):
    found = figures(causal, lambda w, b, _: "B-X" if KIND[w] == "NOUN" else "O", spans=True)
    assert found["f1"] > 90 and list(found)[:4] == ["accuracy", "f1", "precision", "recall"]


def test_what_cannot_be_trained_is_an_error(causal):
    some = sentences(3, 0, own)
    with pytest.raises(ValueError, match="0 sentences to train on and 3 to test on"):
        word(causal, [], some, spans=False)
    with pytest.raises(ValueError, match="3 sentences to train on and 0 to test on"):
        word(causal, some, [], spans=False)
    with pytest.raises(ValueError, match=r"have one tag only \(X\)"):
        word(causal, [Sentence(("a",), ("X",))], some, spans=False)
    for options in ({"steps": 0}, {"batch_size": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="out of range"):
            word(causal, some, some, spans=False, **options)
