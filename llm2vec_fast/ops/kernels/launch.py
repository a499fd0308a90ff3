"""The one door to a Triton kernel: it launches, or on meta tensors only tells who listens.

Running an operation on meta tensors with `use("triton")` thus goes through the very code that runs
on a GPU (allocations, views, block tables, arguments) and computes nothing: tests count launches
and bytes there, and compile what they recorded for GPUs that are not present.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from llm2vec_fast.ops import backend


class Launch(NamedTuple):
    """One launch as it would have been made."""

    kernel: Any  # the @triton.jit function
    grid: tuple[int, ...]
    args: tuple  # tensors, numbers, None
    options: dict[str, Any]  # constexprs by name, num_warps, num_stages


_listeners: list[list[Launch]] = []


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Runs `kernel` over `grid` on the device of its first argument, which must be a tensor.

    An empty grid launches nothing: CUDA refuses one.
    """
    device = args[0].device
    if 0 in grid:
        return
    if device.type == "meta":
        for launches in _listeners:
            launches.append(Launch(kernel, grid, args, options))
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device, wherever x lives
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recorded(arch: int = 90) -> Iterator[list[Launch]]:
    """The launches made on meta tensors in this block, with block tables for `arch`."""
    launches: list[Launch] = []
    before = backend.set_meta_arch(arch)
    _listeners.append(launches)
    try:
        yield launches
    finally:
        _listeners.remove(launches)
        backend.set_meta_arch(before)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, at least 1; Triton's own takes microseconds."""
    return 1 << max(0, n - 1).bit_length()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as (rows, last dimension) with adjacent columns; copied only if strides ask for it."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
