"""From pooled vectors to what is stored: truncate, normalise, quantise."""

from __future__ import annotations

import numpy as np

PRECISIONS = ("float32", "float16", "int8", "binary")


def check_form(dimension: int, truncate_dim: int | None, precision: str) -> None:
    """Raises ValueError if vectors of this dimension cannot be given this form."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if truncate_dim is not None and not 1 <= truncate_dim <= dimension:
        raise ValueError(f"truncate_dim must be 1 to {dimension}, got {truncate_dim}")


def finish(
    vectors_ND: np.ndarray, truncate_dim: int | None, normalize: bool, precision: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Pooled (N, D) fp32 vectors in the form they are returned or stored in.

    precision: float32 | float16 | int8: symmetric per row, vector = scale * int8 |
               binary: sign bits packed as by numpy.packbits, uint8
    returns:   the array, and for int8 the (N,) fp32 scale
    """
    if truncate_dim is not None:
        vectors_ND = vectors_ND[:, :truncate_dim]
    if normalize:
        norm_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        vectors_ND = vectors_ND / np.where(norm_N1 > 0, norm_N1, 1)
    if precision == "int8":
        scale_N = np.abs(vectors_ND).max(axis=1, initial=0).astype(np.float32) / np.float32(127)
        steps_ND = vectors_ND / np.where(scale_N > 0, scale_N, 1)[:, None]
        return np.rint(steps_ND).astype(np.int8), scale_N
    if precision == "binary":
        return np.packbits(vectors_ND > 0, axis=1), None
    return np.ascontiguousarray(vectors_ND, dtype=np.dtype(precision)), None
