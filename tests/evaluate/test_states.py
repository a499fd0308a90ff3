"""Word vectors: which states belong to which word, against a model that is looked into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from llm2vec_fast.evaluate import word_states
from llm2vec_fast.evaluate.states import _tokenised


class Positions:
    """A model whose state at a token is (its position, its id): where a vector comes from can be
    read off it.
    """

    dimension, device, tokens_per_batch = 2, torch.device("cpu"), 16

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def model(self, batch) -> Tensor:
        return torch.stack([batch.positions, batch.ids], dim=1).float()


class Letters:
    """A token per character, spaces none; start tokens and max_length as told."""

    end_ids = ()

    def __init__(self, start_ids=(), max_length=100, normalizer=None, end_ids=()):
        vocab = {chr(i): i for i in range(33, 127)}
        self.raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        self.raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if normalizer:
            self.raw.normalizer = normalizer
        self.start_ids, self.end_ids, self.max_length = start_ids, end_ids, max_length


def positions(tokenizer, sentences, labels="same_token") -> list[float]:
    return word_states(Positions(tokenizer), sentences, labels)[:, 0].tolist()


SENTENCES = [("ab", "c", "def"), ("x",), ("longer", "words", "here")]


def test_a_word_is_the_mean_of_its_own_tokens():
    found = word_states(Positions(Letters()), SENTENCES)
    assert found[:, 0].tolist() == [0.5, 2, 4, 0, 2.5, 8, 12.5]
    assert found[0, 1] == (ord("a") + ord("b")) / 2 and found[3, 1] == ord("x")


def test_next_token_is_the_state_one_to_the_left():
    with_start = Letters(start_ids=[1])
    assert positions(with_start, SENTENCES) == [1.5, 3, 5, 1, 3.5, 9, 13.5]
    assert positions(with_start, SENTENCES, "next_token") == [0.5, 2, 4, 0, 2.5, 8, 12.5]


def test_without_a_start_token_the_first_token_has_no_state_to_its_left():
    # "ab" goes by b's left state alone (position 0); "x" by its own, as nothing else is there.
    assert positions(Letters(), SENTENCES, "next_token") == [0, 1, 3, 0, 2, 7, 11.5]


def test_end_tokens_belong_to_no_word():
    around = Letters(start_ids=[1, 2], end_ids=[3])
    assert positions(around, [("ab", "c")]) == [2.5, 4]


def test_long_sentences_are_read_in_pieces_and_long_words_are_cut():
    short = Letters(start_ids=[1], max_length=5)  # room for four tokens
    sentence = ("ab", "cd", "e", "abcdefgh", "f")
    assert positions(short, [sentence]) == [1.5, 3.5, 1, 2.5, 1]
    assert positions(short, [sentence], "next_token") == [0.5, 2.5, 0, 1.5, 0]
    with pytest.raises(ValueError, match="max_length = 1 leaves no room"):
        positions(Letters(start_ids=[1], max_length=1), [("a",)])


def test_a_word_that_the_tokenizer_drops_takes_the_token_after_it():
    dropping = Letters(normalizer=normalizers.Replace("?", ""))
    assert positions(dropping, [("a", "?", "b", "??")]) == [0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"sentence 1 has no tokens: '\?'"):
        positions(dropping, [("a",), ("?",)])


def test_a_token_over_two_words_belongs_to_both():
    joined = Letters()
    vocab = {"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4, "c": 5, "bc": 6}
    joined.raw = Tokenizer(models.BPE(vocab=vocab, merges=[("a", " "), ("a ", "b")]))
    assert positions(joined, [("a", "b", "c")]) == [0, 0, 1.5]


def test_a_space_belongs_to_the_word_behind_it():
    spaced = Letters()
    spaced.raw = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, " ": 2, "a ": 3}, merges=[]))
    assert positions(spaced, [("a", "b", "ab")]) == [0, 1.5, 4]
    spaced.raw = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, " ": 2, "a ": 3}, merges=[("a", " ")]))
    assert positions(spaced, [("a", "b")]) == [0, 1]


def test_unknown_labels():
    with pytest.raises(ValueError, match="labels must be same_token or next_token, got 'own'"):
        positions(Letters(), SENTENCES, "own")


WORDS = [("The", "quick", "brown", "fox", "'s", "den", "."), ("Größe", "数", "字", "ok"), ("a",)]


def official_words(tokenizer, words, to_left: bool) -> list[list[int]]:
    """Which states the official script gives to each word: the list of words of all tokens, None
    for special ones, moved one place to the left for next_token.
    """
    start, text = len(tokenizer.start_ids), " ".join(words)
    owner: list[int | None] = [None] * start
    at = np.cumsum([0, *(len(word) + 1 for word in words)])
    for _, end in tokenizer.raw.encode(text, add_special_tokens=False).offsets:
        owner.append(int(np.searchsorted(at - 1, end - 1, side="right")) - 1)
    if to_left:
        owner = [*owner[1:], None]
    return [[i for i, w in enumerate(owner) if w == word] for word in range(len(words))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("labels", ["same_token", "next_token"])
def test_against_stock_states_and_the_official_alignment(tiny_encoder, stock, causal, labels):
    model = tiny_encoder(enable_bidirectional=not causal)
    oracle, wanted = stock(model.path, causal), []
    assert model.tokenizer.start_ids  # this tokenizer has a start token: every word has its states
    for words in WORDS:
        ids, _ = _tokenised(model.tokenizer, words, 0)
        states = oracle([*model.tokenizer.start_ids, *ids.tolist()])
        for own in official_words(model.tokenizer, words, labels == "next_token"):
            wanted.append(states[own].mean(dim=0))
    for budget in (None, 1):  # all in one batch, each alone
        found = word_states(model, WORDS, labels, tokens_per_batch=budget)
        assert found.shape == (12, model.dimension) and not found.requires_grad
        torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=2e-5)
