"""Supervised contrastive learning: queries, their answers, hard negatives, and the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model.transformer import Dropout
from llm2vec_fast.train.config import Config
from llm2vec_fast.train.contrast import Batch, assemble
from llm2vec_fast.train.data import fingerprint, text_keys
from llm2vec_fast.train.pairs import Example
from llm2vec_fast.train.ranks import Ranks
from llm2vec_fast.train.simcse import Contrastive


class Supervised(Contrastive):
    """source: arXiv:2404.05961, section 4; batches of one task as in arXiv:2401.00368"""

    def __init__(self, encoder: LLM2Vec, examples: Sequence[Example], config: Config, ranks: Ranks):
        tasks = np.array([example.task for example in examples])
        super().__init__(
            encoder, config, ranks, len(examples), tasks if config.homogeneous_batches else None
        )
        self.examples = examples
        self.too_small = []  # tasks that fill no batch, so that nothing of them is trained
        if config.homogeneous_batches:
            names, sizes = np.unique(tasks, return_counts=True)
            fits = sizes >= config.per_device_train_batch_size * ranks.world
            self.too_small = names[~fits].tolist()
        if not config.homogeneous_batches:
            refuse_unequal(examples)
        self.fingerprint = fingerprint([repr(example) for example in examples])

    def batch(self, rows: np.ndarray, seed: int) -> Batch:
        chosen = [self.examples[i] for i in rows]
        asked, told = self.config.query_instruction, self.config.doc_instruction
        queries = [e.query_instruction if asked is None else asked for e in chosen]
        docs = [e.doc_instruction if told is None else told for e in chosen]
        texts, instructions = [e.query for e in chosen], queries
        texts, instructions = texts + [e.positive for e in chosen], instructions + docs
        for i in range(len(chosen[0].negatives)):
            texts, instructions = texts + [e.negatives[i] for e in chosen], instructions + docs
        keys = text_keys(texts) if self.config.mask_duplicates else None
        drop = Dropout(0.0, self.config.lora_dropout, seed)
        tokens = self.tokenised(texts, instructions)
        return assemble(tokens, len(rows), self.budget, self.encoder.device, drop, keys)


def refuse_unequal(examples: Sequence[Example]) -> None:
    """Raises ValueError if batches over all tasks would mix different numbers of negatives."""
    counts = {len(example.negatives): example.task for example in examples}
    if len(counts) > 1:
        (few, one), *_, (many, other) = sorted(counts.items())
        raise ValueError(
            f"task {one!r} has {few} negatives for a query, {other!r} has {many}: set "
            f"homogeneous_batches, or negatives_per_query to at most {few}"
        )
