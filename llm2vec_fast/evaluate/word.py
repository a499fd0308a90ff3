"""The paper's word tasks: what a linear layer can read from the states of a frozen encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.evaluate.extras import scorer
from llm2vec_fast.evaluate.states import word_states
from llm2vec_fast.evaluate.tagged import Sentence


def word(
    model: LLM2Vec,
    train: Sequence[Sentence],
    test: Sequence[Sentence],
    *,
    spans: bool,
    labels: str = "same_token",
    steps: int = 1500,
    batch_size: int = 8,
    learning_rate: float = 5e-4,
    dropout: float = 0.1,
    seed: int = 42,
) -> dict:
    """Trains dropout and one linear layer on the words of `train`, and scores those of `test`.

    The encoder is frozen: each word's vector is computed once. A tag that `train` lacks is counted
    as wrong.

    spans:         also the F1 of whole spans (chunking, NER), as seqeval and conlleval count them
    labels:        same_token | next_token, see `word_states`
    batch_size:    sentences of a step; the loss is the mean over their words
    learning_rate: AdamW without weight decay, constant (the official schedule, of ten epochs of
                   CoNLL-2003, decays it by under a tenth in 1500 steps), without clipping
    returns:       {"accuracy", with spans "f1", "precision", "recall" (all times 100), "words",
                   "sentences", "train_sentences", "tags"}
    raises:        ValueError if there is nothing to train or test on, or only one tag
    source:        arXiv 2404.05961, section 3.1 and appendix: lr 5e-4, batch 8, 1500 steps
    """
    if not train or not test:
        raise ValueError(f"{len(train)} sentences to train on and {len(test)} to test on: both")
    known = sorted({tag for sentence in train for tag in sentence.tags})
    if len(known) < 2:
        raise ValueError(f"the training sentences have one tag only ({known[0]}): nothing to learn")
    if steps < 1 or batch_size < 1 or not 0 <= dropout < 1:
        raise ValueError(f"steps {steps}, batch size {batch_size}, dropout {dropout}: out of range")
    number = {tag: i for i, tag in enumerate(known)}
    target_W = torch.tensor([number[tag] for sentence in train for tag in sentence.tags])
    states_WD = word_states(model, [sentence.words for sentence in train], labels)
    bounds = np.cumsum([0, *(len(sentence.words) for sentence in train)])
    layer = fit(
        states_WD, target_W, bounds, len(known), steps, batch_size, learning_rate, dropout, seed
    )
    del states_WD
    with torch.no_grad():
        found = layer(word_states(model, [s.words for s in test], labels)).argmax(dim=1).tolist()
    answers = iter(known[i] for i in found)
    guessed = [[next(answers) for _ in sentence.tags] for sentence in test]
    figures = scores([list(sentence.tags) for sentence in test], guessed, spans)
    return figures | {
        "words": len(found),
        "sentences": len(test),
        "train_sentences": len(train),
        "tags": len(known),
    }


def scores(truth: list[list[str]], guessed: list[list[str]], spans: bool) -> dict:
    """Accuracy of the words and, with `spans`, F1, precision and recall of spans; times 100."""
    flat = [a == b for one, two in zip(truth, guessed, strict=True) for a, b in zip(one, two)]  # noqa: B905
    figures = {"accuracy": 100 * sum(flat) / len(flat)}
    if spans:
        metrics = scorer("seqeval.metrics", "seqeval")
        # No span found, or none there, is an F1 of 0 and not worth a warning.
        for name in ("f1", "precision", "recall"):
            score = getattr(metrics, f"{name}_score")(truth, guessed, zero_division=0)
            figures[name] = 100 * float(score)
    return figures


def fit(
    states_WD: Tensor,
    target_W: Tensor,
    bounds: np.ndarray,
    n_tags: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    dropout: float,
    seed: int,
) -> nn.Linear:
    """A linear layer from (W, D) states to tags; bounds: (S + 1,), sentence s has the words
    bounds[s] to bounds[s + 1]. Random numbers of its own: the same seed, the same layer.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        layer = nn.Linear(states_WD.shape[1], n_tags)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=learning_rate, weight_decay=0.0)
        for _, rows in zip(range(steps), _batches(len(bounds) - 1, batch_size, seed), strict=False):
            at = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in rows])
            seen_WD = nn.functional.dropout(states_WD[at], dropout)
            loss = nn.functional.cross_entropy(layer(seen_WD), target_W[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Sentences in a new order each epoch, for ever; an epoch's last batch may be short."""
    noise = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(count, generator=noise).split(size):
            yield rows.tolist()
