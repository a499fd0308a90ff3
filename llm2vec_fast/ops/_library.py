"""Loading what setup.py built of csrc/: operators that torch finds in a shared library."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"  # of a checkout
_lock = threading.Lock()
_loaded: dict[Path, object] = {}


def load(path: Path, namespace: str, fakes: Mapping[str, Callable], switch: str):
    """The operators of a library, with what they return for meta tensors and torch.compile.

    fakes:   for each operator that must be there
    switch:  the variable that setup.py reads
    raises:  RuntimeError if it is not built, does not load, or was built from other sources
    """
    with _lock:  # torch refuses a second description of an operator
        if path not in _loaded:
            _loaded[path] = _load(path, namespace, fakes, switch)
        return _loaded[path]


def _load(path, namespace, fakes, switch):
    again = f"`{switch}=1 python setup.py build_ext --inplace` builds it"
    if not path.exists():
        raise RuntimeError(f"{path} does not exist: this library is not built; {again}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise RuntimeError(f"{path} does not load: {error}") from error
    operators = getattr(torch.ops, namespace)
    if not all(hasattr(operators, name) for name in (*fakes, "sources")) or _is_stale(operators):
        raise RuntimeError(f"{path} was built from other sources than csrc/ holds now; {again}")
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    return operators


def _is_stale(operators) -> bool:
    """Whether the library is not that of this checkout; setup.py told it what it is made of."""
    told = operators.sources()
    return bool(told) and (CSRC / "checks.h").exists() and told != digest(CSRC)


def digest(csrc: Path) -> str:
    """What setup.py, which cannot import this, gives a library as LLM2VEC_FAST_SOURCES."""
    kinds = (".cpp", ".cu", ".cuh", ".h")
    whole = b"".join(path.read_bytes() for path in sorted(csrc.iterdir()) if path.suffix in kinds)
    return hashlib.sha256(whole).hexdigest()[:16]


def rows(x: Tensor) -> Tensor:
    """x as (rows, width) with the elements of a row side by side; copied only if it must be."""
    rows = x if x.dim() == 2 else x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def weight_for(x: Tensor, weight_D: Tensor) -> Tensor:
    """The weight, contiguous; one of another dtype than x in fp32, which loses nothing."""
    return (weight_D if weight_D.dtype == x.dtype else weight_D.float()).contiguous()
