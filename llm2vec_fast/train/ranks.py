"""The processes of one training run: torchrun starts them, gradients meet here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# A rank that waits longer for the others reports it instead of waiting for ever.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; `group` is None where it is alone."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    is_own: bool = False  # `join` made the group, so `leave` ends it

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Meets the other processes that torchrun has started; alone without torchrun."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        is_own = not dist.is_initialized()
        if is_own:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        return cls(dist.get_rank(), world, dist.group.WORLD, is_own)

    def leave(self) -> None:
        """Ends the group that `join` made."""
        if self.is_own and dist.is_initialized():
            dist.destroy_process_group()

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place; no host sync on CUDA."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def mean_(self, x: Tensor) -> Tensor:
        return self.sum_(x) if self.world == 1 else self.sum_(x).div_(self.world)

    def wait(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def everyones(self, value: int | str) -> list:
        """What each rank has, in the order of the ranks."""
        if self.group is None:
            return [value]
        told: list = [None] * self.world
        dist.all_gather_object(told, value, group=self.group)
        return told

    def agree(self, what: str, value: int | str) -> None:
        """Raises RuntimeError on every rank if they do not all have the same."""
        told = self.everyones(value)
        if len(set(told)) > 1:
            raise RuntimeError(
                f"the ranks disagree on {what}: {told}; do they all see the same directory?"
            )


ALONE = Ranks()


def local_device(asked: str | None) -> str | None:
    """The device of this process: under torchrun each rank has a GPU of its own."""
    if asked in (None, "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        asked = f"cuda:{os.environ['LOCAL_RANK']}"
    if asked is not None and asked.startswith("cuda:"):
        torch.cuda.set_device(asked)
    return asked
