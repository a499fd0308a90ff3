"""Masked next token prediction: a masked token is predicted from the state before it.

T tokens, M masked rows, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model.transformer import Dropout
from llm2vec_fast.model.work import forward_flop
from llm2vec_fast.text import TextTokenizer, pack
from llm2vec_fast.train.config import Config
from llm2vec_fast.train.data import Chunks
from llm2vec_fast.train.order import Order
from llm2vec_fast.train.ranks import Ranks
from llm2vec_fast.train.work import Work, default_budget, generator, send

MASKED, EVALUATED = 1, 2  # what random numbers are drawn for


@dataclass(frozen=True)
class Masking:
    """Which tokens are to be predicted, and what stands in their place.

    kind: default (BERT: of the chosen tokens 80 % become the mask token, 10 % a random one, 10 %
          stay) or all_mask (all become the mask token)
    """

    probability: float
    kind: str
    mask_id: int
    vocab_size: int

    def __call__(
        self, ids_T: np.ndarray, special_T: np.ndarray, noise: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids with masks, (T,) bool of the chosen tokens); special tokens are never chosen."""
        chosen_T = (noise.random(len(ids_T)) < self.probability) & ~special_T
        masked_T = chosen_T
        ids_T = ids_T.copy()
        if self.kind == "default":
            kind_T = noise.random(len(ids_T))
            masked_T = chosen_T & (kind_T < 0.8)
            random_T = chosen_T & (kind_T >= 0.8) & (kind_T < 0.9)
            ids_T[random_T] = noise.integers(self.vocab_size, size=int(random_T.sum()))
        ids_T[masked_T] = self.mask_id
        return ids_T, chosen_T


def find_mask_id(tokenizer: TextTokenizer, kind: str) -> int:
    """The id of the mask token: blank is "_", eos the end token, mask the tokenizer's <mask>.

    raises: ValueError if the vocabulary does not have it
    """
    if kind == "eos":
        found, name = tokenizer.eos_id, "an end token"
    else:
        token = {"blank": "_", "mask": "<mask>"}[kind]
        found, name = tokenizer.raw.token_to_id(token), f"the token {token!r}"
    if found is None:
        others = {"blank", "eos", "mask"} - {kind}
        raise ValueError(
            f"mask_token_type {kind!r}: the tokenizer does not have {name}; "
            f"set mask_token_type to {' or '.join(sorted(others))}"
        )
    return found


class Part(NamedTuple):
    """One forward and backward pass."""

    batch: PackedBatch
    rows_M: Tensor  # the states that predict
    targets_M: Tensor
    drop: Dropout


class Mntp:
    """The training of step 2 of LLM2Vec. source: arXiv:2404.05961, section 2.2"""

    def __init__(
        self,
        encoder: LLM2Vec,
        head: Callable[[], Tensor],
        chunks: Chunks,
        held_out: Chunks | None,
        config: Config,
        ranks: Ranks,
    ):
        self.encoder, self.head, self.ranks, self.config = encoder, head, ranks, config
        self.chunks, self.held_out = chunks, held_out
        tokenizer = encoder.tokenizer
        self.masking = Masking(
            config.mlm_probability,
            config.data_collator_type,
            find_mask_id(tokenizer, config.mask_token_type),
            min(tokenizer.raw.get_vocab_size(), encoder.model.config.vocab_size),
        )
        if self.masking.mask_id >= encoder.model.config.vocab_size:
            raise ValueError(
                f"mask_token_type {config.mask_token_type!r}: token {self.masking.mask_id} is "
                "beyond the model's vocabulary; set mask_token_type to blank or eos"
            )
        self.budget = config.tokens_per_batch or default_budget(
            encoder.model.config, encoder.device, config.gradient_checkpointing
        )
        self.order = Order(
            len(chunks), config.per_device_train_batch_size, config.seed, ranks.world, ranks.rank
        )
        self.accumulate = config.gradient_accumulation_steps
        self.steps_per_epoch = max(1, self.order.steps_per_epoch // self.accumulate)
        self.fingerprint = chunks.fingerprint()

    def prepare(self, step: int) -> Work:
        first = step * self.accumulate
        rows = np.concatenate([self.order.rows(first + i) for i in range(self.accumulate)])
        key = (self.config.seed, MASKED, step, self.ranks.rank)
        parts = self._parts(self.chunks, rows, key, Dropout(0.0, self.config.lora_dropout))
        tokens = sum(part.batch.n_tokens for part in parts)
        lengths = [n for part in parts for n in part.batch.lengths]
        predicted = sum(len(part.rows_M) for part in parts)
        shape = self.encoder.model.config
        passes = 3 if self.config.full_finetuning else 2  # frozen weights get no gradient
        head = 2 * passes * predicted * shape.hidden_size * shape.vocab_size
        return Work(step, tokens, passes * forward_flop(shape, lengths) + head, rows, parts)

    def _parts(
        self, chunks: Chunks, rows: np.ndarray, key: tuple[int, ...], drop: Dropout
    ) -> list[Part]:
        ids, special = chunks.rows(rows)
        noise = generator(*key)
        drop = replace(drop, seed=int(noise.integers(1 << 62)))
        # Masked before they are packed: tokens_per_batch does not change what is predicted.
        starts = np.cumsum([0, *map(len, ids)])
        input_T, chosen_T = self.masking(np.concatenate(ids), np.concatenate(special), noise)
        chosen_T[starts[:-1]] = False  # nothing stands before the first token
        inputs, chosen = np.split(input_T, starts[1:-1]), np.split(chosen_T, starts[1:-1])
        parts, device = [], self.encoder.device
        for number, texts in enumerate(pack([len(text) for text in ids], self.budget)):
            batch = PackedBatch.build([inputs[i] for i in texts], device=device)
            true_T = np.concatenate([ids[i] for i in texts]).astype(np.int64)
            at_M = np.flatnonzero(np.concatenate([chosen[i] for i in texts]))
            rows_M, targets_M = send(at_M - 1, device), send(true_T[at_M], device)
            parts.append(Part(batch, rows_M, targets_M, drop.within(number)))
        return parts

    def backward(self, work: Work) -> Tensor:
        # The mean is over the masked tokens of all chunks and ranks, however they are cut.
        predicted = float(sum(len(part.rows_M) for part in work.parts))
        count = torch.full((), predicted, device=self.encoder.device)
        num_items = self.ranks.mean_(count).clamp_(min=1.0 / self.ranks.world)
        total = torch.zeros((), device=self.encoder.device)
        for part in work.parts:
            loss = self._loss(part, num_items)
            loss.backward()
            total += loss.detach()
        if self.config.fsdp:  # a sharded base: all ranks make equally many passes
            for _ in range(max(self.ranks.everyones(len(work.parts))) - len(work.parts)):
                (0 * self._loss(work.parts[0], num_items)).backward()
        return total

    def _loss(self, part: Part, num_items: Tensor) -> Tensor:
        hidden_TD = self.encoder.model(part.batch, part.drop, self.config.gradient_checkpointing)
        return ops.masked_token_loss(
            hidden_TD, self.head(), part.rows_M, part.targets_M, num_items=num_items
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """eval_loss of the held-out chunks, masked in the same way every time."""
        if self.held_out is None:
            return {}
        key = (self.config.seed, EVALUATED)
        parts = self._parts(self.held_out, np.arange(len(self.held_out)), key, Dropout())
        count = max(1, sum(len(part.rows_M) for part in parts))
        num_items = torch.full((), float(count), device=self.encoder.device)
        return {"eval_loss": float(sum(self._loss(part, num_items) for part in parts))}
