"""Which texts go into which batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(
    lengths: Sequence[int], tokens_per_batch: int, max_texts: int | None = None
) -> list[np.ndarray]:
    """Groups texts into batches of at most `tokens_per_batch` tokens, longest texts first.

    Sorting brings equal lengths together, which attention likes, and shows the largest memory need
    in the first batch. A text longer than the budget gets a batch of its own.

    lengths:    tokens of each text, all > 0
    max_texts:  also at most so many texts in a batch
    returns:    index arrays, together every text once; equal lengths keep their order
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
    if max_texts is not None and max_texts < 1:
        raise ValueError(f"batch_size must be at least 1, got {max_texts}")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start, used = [], 0, 0
    for at, row in enumerate(order):
        full = used + lengths[row] > tokens_per_batch or (max_texts and at - start >= max_texts)
        if at > start and full:
            batches.append(order[start:at])
            start, used = at, 0
        used += lengths[row]
    if len(order):
        batches.append(order[start:])
    return batches
