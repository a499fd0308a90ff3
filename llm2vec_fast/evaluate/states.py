"""Words of sentences to vectors: the mean of the states of each word's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.evaluate.models import ALIGNMENTS
from llm2vec_fast.text import TextTokenizer, pack


@dataclass(slots=True)
class Piece:
    """A sentence, or what of it fits into max_length.

    ids:        (n,) token ids
    spans:      (w, 2), the states [start, end) of each of its words
    first_word: which of all words is its first one
    """

    ids: np.ndarray
    spans: np.ndarray
    first_word: int

    def __len__(self) -> int:
        return len(self.ids)


@torch.no_grad()
def word_states(
    model: LLM2Vec,
    sentences: Sequence[Sequence[str]],
    labels: str = "same_token",
    tokens_per_batch: int | None = None,
) -> Tensor:
    """One vector per word: the mean of the last layer's states of its tokens.

    A sentence is tokenised as it reads, its words joined by spaces, behind the tokenizer's own
    start tokens and without a template. A token belongs to the words that its characters touch, a
    lone space to the word behind it; a word of which the tokenizer leaves nothing takes the token
    after it. What goes beyond the model's max_length is read as another sentence; a single word
    beyond it is cut.

    labels:  "same_token", each token's own state; "next_token", the state one to the left, from
             which MNTP predicts the token. There a first token without a start token before it has
             no such state: the word goes by its other tokens, and if it has none, by its own state,
             so that every word counts in both. (The official script leaves that word out.)
    returns: (W, D) fp32 on the CPU, the words of all sentences one after another
    raises:  ValueError for unknown labels, and naming the sentence (from 0) without tokens
    source:  arXiv 2404.05961, section 3.1; llm2vec's experiments/run_word_task.py
    """
    if labels not in ALIGNMENTS:
        raise ValueError(f"labels must be {' or '.join(ALIGNMENTS)}, got {labels!r}")
    pieces: list[Piece] = []
    n_words = 0
    for row, words in enumerate(sentences):
        ids, spans = _tokenised(model.tokenizer, words, row)
        pieces += _fitted(model.tokenizer, ids, spans, n_words, labels == "next_token")
        n_words += len(words)
    states_WD = torch.empty(n_words, model.dimension)
    budget = tokens_per_batch or model.tokens_per_batch
    for rows in pack([len(piece) for piece in pieces], budget):
        some = [pieces[i] for i in rows]
        batch = PackedBatch.build([piece.ids for piece in some], device=model.device)
        found_WD = _means(model.model(batch), some)
        at = 0
        for piece in some:
            count = len(piece.spans)
            states_WD[piece.first_word : piece.first_word + count] = found_WD[at : at + count]
            at += count
    return states_WD


def _means(hidden_TD: Tensor, pieces: list[Piece]) -> Tensor:
    """(W, D) fp32 means of every word's states. ops.pool would want spans without overlap."""
    begins = np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    spans = np.concatenate([p.spans + at for p, at in zip(pieces, begins, strict=True)])
    count = spans[:, 1] - spans[:, 0]
    starts = np.cumsum(count) - count
    tokens = np.arange(count.sum()) + np.repeat(spans[:, 0] - starts, count)
    at, bags = (torch.from_numpy(x).to(hidden_TD.device) for x in (tokens, starts))
    return torch.nn.functional.embedding_bag(at, hidden_TD.float(), bags, mode="mean").cpu()


def _tokenised(
    tokenizer: TextTokenizer, words: Sequence[str], row: int
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) token ids of the joined words, and (w, 2) each word's tokens [start, end)."""
    encoding = tokenizer.raw.encode(" ".join(words), add_special_tokens=False)
    if not encoding.ids or not words:
        raise ValueError(f"sentence {row} has no tokens: {' '.join(words)!r}")
    token_from, token_to = np.array(encoding.offsets).T
    word_to = np.cumsum([len(word) + 1 for word in words]) - 1
    word_from = word_to - [len(word) for word in words]
    # The first to begin in the word or the space before it, or to reach into it from further left.
    begins = np.searchsorted(token_from, word_from - 1, side="left")
    reaches = np.searchsorted(token_to, word_from, side="right")
    start = np.minimum(begins, reaches).clip(max=len(encoding.ids) - 1)
    end = np.maximum(np.searchsorted(token_from, word_to, side="left"), start + 1)
    return np.array(encoding.ids), np.stack([start, end], axis=1)


def _fitted(
    tokenizer: TextTokenizer, ids: np.ndarray, spans: np.ndarray, first_word: int, to_left: bool
) -> list[Piece]:
    """The sentence with start and end tokens, in as many pieces as max_length asks for."""
    head, foot = tokenizer.start_ids, tokenizer.end_ids
    room = tokenizer.max_length - len(head) - len(foot)
    if room < 1:
        raise ValueError(f"max_length = {tokenizer.max_length} leaves no room for a word")
    pieces, begin = [], 0
    while begin < len(spans):
        low = spans[begin, 0]
        fits = int(np.searchsorted(spans[:, 1], low + room, side="right"))
        stop = max(fits, begin + 1)
        high = min(spans[stop - 1, 1], low + room)
        own = spans[begin:stop].clip(max=high) - low + len(head)
        if to_left:
            own = (own - 1).clip(min=0)
            own[:, 1] = np.maximum(own[:, 1], own[:, 0] + 1)
        joined = np.array([*head, *ids[low:high], *foot])
        pieces.append(Piece(joined, own, first_word + begin))
        begin = stop
    return pieces
