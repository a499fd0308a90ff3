"""What a training does in one step, as the loop sees it: prepared on the host, then computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast.model.config import ModelConfig


@dataclass
class Work:
    """One step of this rank, ready on the device.

    tokens: real tokens that pass through the model, each counted once
    flop:   arithmetic that the step needs, without what is computed again
    rows:   rows of the data that it is made of: an error names them
    """

    step: int
    tokens: int
    flop: float
    rows: np.ndarray
    parts: list[Any] = field(default_factory=list)


class Objective(Protocol):
    """A training: what a step is made of, and its gradients."""

    steps_per_epoch: int
    fingerprint: str  # of the data: a checkpoint of other data is refused
    budget: int  # tokens of one forward and backward pass

    def prepare(self, step: int) -> Work:
        """The step's batches; runs beside the step before, so it may only queue copies."""
        ...

    def backward(self, work: Work) -> Tensor:
        """Adds the step's gradients, such that their mean over ranks is that of the loss over all
        ranks; returns this rank's loss, 0-d on the device.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures of held-out data, if there is any."""
        ...


def generator(*key: int) -> np.random.Generator:
    """Random numbers that are a function of the key alone: (seed, step, rank, ...)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def send(numbers: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device. Pinned on the way: a copy from other memory may wait for the GPU."""
    sent = torch.from_numpy(numbers)
    sent = sent.pin_memory() if device.type == "cuda" else sent
    return sent.to(device, non_blocking=True)


def default_budget(config: ModelConfig, device: torch.device, recompute: bool) -> int:
    """Tokens of a chunk whose activations fit the free memory with room to spare.

    A layer keeps for its backward pass the residual, two normalised copies, the rotated projection,
    the attention's output, and gate and up; recompute keeps the residual alone.
    """
    heads = config.n_heads + config.n_kv_heads
    layer = 4 * config.hidden_size + 2 * heads * config.head_dim + 2 * config.intermediate_size
    kept = config.hidden_size if recompute else layer
    per_token = 2 * (kept * config.n_layers + 2 * layer)
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], 32_768
    else:
        free, most = _free_memory(), 2048  # more makes a CPU no faster
    # Plain torch on the CPU keeps fp32 intermediates of some operations.
    share = 0.6 if device.type == "cuda" else 0.1
    return max(256, min(most, int(share * free / per_token) // 256 * 256))


def _free_memory() -> int:
    """Bytes that the machine can still give, 4 GB where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            told = dict(line.split(":") for line in file)
        return int(told["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError, IndexError):
        return 4 << 30
