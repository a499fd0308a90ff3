"""Contrastive steps of any size in the memory of one chunk (GradCache).

A step's texts are packed into chunks of a token budget. With one chunk it is an ordinary backward
pass. With more, all vectors are computed first, without a graph; the loss gives the gradient of
each vector; then each chunk is computed again, with the same dropout, and takes its gradients back
through the model: three forward-equivalents instead of two, and the memory of one chunk.

source: Gao et al. 2021, arXiv:2101.06983
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model.transformer import Dropout
from llm2vec_fast.ops.backend import chosen_for_gradients
from llm2vec_fast.text import Tokens, pack
from llm2vec_fast.train.ranks import ALONE, Ranks
from llm2vec_fast.train.work import send


@dataclass(frozen=True)
class Chunk:
    """Texts that are computed together, and their places among the step's texts."""

    batch: PackedBatch
    rows: np.ndarray
    drop: Dropout


@dataclass(frozen=True)
class Batch:
    """What one loss is computed of: the first `queries` texts ask, the rest are docs."""

    chunks: list[Chunk]
    queries: int
    order: Tensor  # (texts,) int64: where in the chunks, end to end, each text lies
    query_keys: Tensor | None = None
    doc_keys: Tensor | None = None


def assemble(
    texts: Sequence[Tokens],
    queries: int,
    tokens_per_batch: int,
    device: torch.device,
    drop: Dropout,
    keys: np.ndarray | None = None,
) -> Batch:
    """Packs the texts of one loss into chunks, longest texts first.

    drop: its seed is the batch's; each chunk gets one of its own
    keys: (texts,) int64, equal for equal texts, where those are to be no negatives of each other
    """
    groups = pack([len(text) for text in texts], tokens_per_batch)
    chunks = [
        Chunk(
            PackedBatch.build(
                [texts[i].ids for i in rows],
                [(texts[i].start, texts[i].end) for i in rows],
                device,
            ),
            rows,
            drop.within(number),
        )
        for number, rows in enumerate(groups)
    ]
    order = send(np.argsort(np.concatenate(groups)), device)
    sent = [None, None]
    if keys is not None:
        both = send(keys, device)
        sent = [both[:queries], both[queries:]]
    return Batch(chunks, queries, order, *sent)


@dataclass(frozen=True)
class Contrast:
    """The loss of a batch and its gradients."""

    encoder: LLM2Vec
    scale: float
    symmetric: bool
    ranks: Ranks  # those whose docs are negatives too
    recompute: bool = False
    in_step: Ranks = ALONE  # those that must make equally many passes: they share a sharded base

    @chosen_for_gradients()  # what is recomputed, too
    def backward(self, batch: Batch, share: float = 1.0) -> Tensor:
        """Adds the gradients of share * loss to the parameters; returns share * loss, 0-d."""
        passes = max(self.in_step.everyones(len(batch.chunks)))
        if passes == 1:
            loss = self.loss(self.embed(batch.chunks[0])[batch.order], batch) * share
            loss.backward()
            return loss.detach()
        surplus = [batch.chunks[0]] * (passes - len(batch.chunks))
        with torch.no_grad():
            packed_BD = torch.cat([self.embed(chunk) for chunk in batch.chunks])
            for chunk in surplus:
                self.embed(chunk)
        packed_BD.requires_grad_()
        loss = self.loss(packed_BD[batch.order], batch) * share
        (grad_BD,) = torch.autograd.grad(loss, packed_BD)
        sizes = [len(chunk.rows) for chunk in batch.chunks]
        for chunk, grad in zip(batch.chunks, grad_BD.split(sizes), strict=True):
            self.embed(chunk).backward(grad)
        for chunk in surplus:
            (0 * self.embed(chunk).sum()).backward()
        return loss.detach()

    @chosen_for_gradients()
    def embed(self, chunk: Chunk) -> Tensor:
        """(B, D) fp32 vectors of a chunk's texts; the same bits with and without a graph."""
        return self.encoder(chunk.batch, chunk.drop, self.recompute)

    def loss(self, vectors_BD: Tensor, batch: Batch) -> Tensor:
        return ops.info_nce(
            vectors_BD[: batch.queries], vectors_BD[batch.queries :], self.scale, self.symmetric,
            self.ranks.group, query_keys=batch.query_keys, doc_keys=batch.doc_keys,
        )  # fmt: skip
