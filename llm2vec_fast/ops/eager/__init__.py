"""What `kernels/` does on a GPU, in plain torch for the CPU: the same functions, the same nodes.

Elementwise work goes through fp32 scratch of a few rows that stays in a core's cache, and is
rounded once; products run in the tensors' own dtype, which is many times faster in bf16 where the
processor has matrix units.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCRATCH = 1 << 20  # bytes of fp32 scratch: two or three such pieces fit the cache of two cores


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` whose fp32 copy, `width` numbers a row, takes about SCRATCH bytes."""
    step = max(1, SCRATCH // max(4 * width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def scratch(
    count: int, rows: int, width: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[slice, list[Tensor]]]:
    """The same slices, each with `count` tensors (rows of the slice, width) to write into: one
    allocation for all of them, whose pages are touched once.
    """
    step = max(1, SCRATCH // max(4 * width, 1))
    pieces = torch.empty(count, min(step, rows), width, dtype=dtype)
    for at in blocks(rows, width):
        yield at, list(pieces[:, : at.stop - at.start])
