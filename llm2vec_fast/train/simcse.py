"""Unsupervised SimCSE: a text and the same text under other dropout are each other's answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model.transformer import Dropout
from llm2vec_fast.model.work import forward_flop
from llm2vec_fast.text import Tokens
from llm2vec_fast.train.config import Config
from llm2vec_fast.train.contrast import Batch, Contrast, assemble
from llm2vec_fast.train.data import fingerprint, text_keys
from llm2vec_fast.train.order import Order
from llm2vec_fast.train.ranks import ALONE, Ranks
from llm2vec_fast.train.work import Work, default_budget, generator

DROPPED = 3  # what random numbers are drawn for


class Contrastive:
    """What SimCSE and supervised training share: batches of texts, and the contrastive loss."""

    def __init__(
        self,
        encoder: LLM2Vec,
        config: Config,
        ranks: Ranks,
        count: int,
        groups: np.ndarray | None = None,
    ):
        self.encoder, self.config, self.ranks = encoder, config, ranks
        self.budget = config.tokens_per_batch or default_budget(
            encoder.model.config, encoder.device, config.gradient_checkpointing
        )
        self.order = Order(
            count, config.per_device_train_batch_size, config.seed, ranks.world, ranks.rank, groups
        )
        self.accumulate = config.gradient_accumulation_steps
        self.steps_per_epoch = max(1, self.order.steps_per_epoch // self.accumulate)
        self.contrast = Contrast(
            encoder,
            config.loss_scale,
            config.symmetric,
            ranks if config.gather_negatives else ALONE,
            config.gradient_checkpointing,
            ranks if config.fsdp else ALONE,
        )

    def prepare(self, step: int) -> Work:
        rows, parts = [], []
        for micro in range(step * self.accumulate, (step + 1) * self.accumulate):
            rows.append(self.order.rows(micro))
            key = (self.config.seed, DROPPED, micro, self.ranks.rank)
            seed = int(generator(*key).integers(1 << 62))
            parts.append(self.batch(rows[-1], seed))
        batches = [chunk.batch for part in parts for chunk in part.chunks]
        lengths = [n for batch in batches for n in batch.lengths]
        passes = 3 if self.config.full_finetuning else 2  # frozen weights get no gradient
        flop = passes * forward_flop(self.encoder.model.config, lengths)
        return Work(step, sum(lengths), flop, np.concatenate(rows), parts)

    def batch(self, rows: np.ndarray, seed: int) -> Batch:
        raise NotImplementedError

    def backward(self, work: Work) -> Tensor:
        share = 1.0 / len(work.parts)
        return torch.stack([self.contrast.backward(part, share) for part in work.parts]).sum()

    def evaluate(self) -> dict[str, float]:
        return {}

    def tokenised(self, texts: Sequence[str], instructions: Sequence[str]) -> list[Tokens]:
        """Raises ValueError for a text of which nothing is left."""
        tokens = self.encoder.tokenizer(texts, instructions)
        for text, found in zip(texts, tokens, strict=True):
            if not len(found):
                raise ValueError(f"nothing is left of the training text {text!r:.60}: remove it")
        return tokens


class SimCSE(Contrastive):
    """The training of step 3 of LLM2Vec, without labels. source: arXiv:2104.08821

    compat="official" pools all tokens of the text, its BOS too, as the official training does. The
    padding that it pools as well does not exist here.
    """

    def __init__(self, encoder: LLM2Vec, texts: Sequence[str], config: Config, ranks: Ranks):
        super().__init__(encoder, config, ranks, len(texts))
        self.texts = texts
        self.keys = text_keys(texts) if config.mask_duplicates else None
        self.fingerprint = fingerprint(texts)

    def batch(self, rows: np.ndarray, seed: int) -> Batch:
        tokens = self.tokenised([self.texts[i] for i in rows], [""] * len(rows))
        if self.config.compat == "official":
            tokens = [Tokens(t.ids, 0, len(t.ids)) for t in tokens]
        keys = None if self.keys is None else np.tile(self.keys[rows], 2)
        drop = Dropout(self.config.simcse_dropout, self.config.lora_dropout, seed)
        return assemble(tokens * 2, len(rows), self.budget, self.encoder.device, drop, keys)
