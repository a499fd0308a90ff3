"""Which rows each step takes: a pure function of seed and step, so that resuming needs no state."""

from __future__ import annotations

import numpy as np


class Order:
    """Rows of every step and rank, in a fresh permutation each epoch.

    count:  rows of the data set
    batch:  rows that each rank takes in a step
    seed:   not negative; the same on all ranks
    world:  number of ranks; they take consecutive slices of one global batch, so that `world`
            ranks of `batch` see together what one rank of `world * batch` sees
    rank:   this rank
    groups: (count,) numbers or names, such as the task of each row: a global batch then holds
            rows of one group only, and batches of all groups are shuffled together
    raises: ValueError when no batch can be filled, and on arguments out of range

    What does not fill a global batch (of each group) is left out, another part each epoch.
    `steps_per_epoch` is the same in every epoch.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        seed: int,
        world: int = 1,
        rank: int = 0,
        groups: np.ndarray | None = None,
    ):
        if batch < 1:
            raise ValueError(f"a batch must have at least 1 row per rank, got {batch}")
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} ranks")
        if groups is not None and np.shape(groups) != (count,):
            raise ValueError(f"groups must name one group for each of {count} rows")
        self.count, self.batch, self.seed = count, batch, seed
        self.world, self.rank = world, rank
        names, self._group, sizes = _grouped(count, groups)
        self._starts = _starts(sizes, batch * world)
        self.steps_per_epoch = len(self._starts)
        if not self.steps_per_epoch:
            raise ValueError(_too_few(names, sizes, batch, world))
        self._laid_out: tuple[int, np.ndarray, np.ndarray] | None = None  # the last epoch asked for

    def rows(self, step: int) -> np.ndarray:
        """(batch,) int64: the rows that this rank takes in a step; steps go on beyond an epoch."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        epoch, at = divmod(step, self.steps_per_epoch)
        shuffled, batches = self._layout(epoch)
        start = self._starts[batches[at]] + self.rank * self.batch
        return shuffled[start : start + self.batch].copy()

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows, shuffled within their groups, which stand one after another; and the sequence
        of the batches cut from them.

        Sorting raw random bits shuffles. NumPy keeps the raw bits of a seed the same over its
        versions, which it does not promise of its own `permutation`.
        """
        known = self._laid_out
        if known is None or known[0] != epoch:
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            shuffled = np.lexsort((bits.random_raw(self.count), self._group))
            batches = np.argsort(bits.random_raw(self.steps_per_epoch), kind="stable")
            known = self._laid_out = (epoch, shuffled, batches)
        return known[1:]


def _grouped(count: int, groups: np.ndarray | None) -> tuple[list, np.ndarray, np.ndarray]:
    """Names of the groups, the number of each row's group, the rows of each group."""
    if groups is None:
        return [None], np.zeros(count, np.int8), np.array([count])
    names, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return names.tolist(), numbers, sizes


def _starts(sizes: np.ndarray, whole: int) -> np.ndarray:
    """Where each whole batch starts in the rows laid group after group."""
    firsts = np.cumsum(sizes) - sizes
    found = [first + whole * np.arange(n) for first, n in zip(firsts, sizes // whole, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *found])


def _too_few(names: list, sizes: np.ndarray, batch: int, world: int) -> str:
    most = int(sizes.max(initial=0))
    if names == [None] or not names:
        have = f"{most} rows"
    else:
        have = f"batches hold rows of one task, and the largest, {names[sizes.argmax()]!r}, has "
        have += f"{most} rows"
    if most < world:
        return f"{have}, fewer than the {world} ranks: give more data or use fewer ranks"
    return (
        f"{have}, fewer than one global batch of {batch} x {world} ranks = {batch * world}: lower "
        f"per_device_train_batch_size to at most {most // world}, or give more data"
    )
