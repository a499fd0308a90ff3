"""The one place that decides which implementation of an operation runs.

`PREFERENCE[op]` lists backends, best first. The first that has no reason to refuse the call wins;
the choice is remembered per kind of call, so that asking again is one dictionary lookup.
`use("name")` forces a backend: if it cannot run it raises, it never falls back silently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

# A backend that no GPU has measured yet stands after one that a GPU has (benchmarks/results).
PREFERENCE: dict[str, tuple[str, ...]] = {
    "add_rms_norm": ("reference",),
    "rope_": ("reference",),
    "swiglu": ("reference",),
    "pool": ("reference",),
    "attention": ("flash_attn", "varlen", "sdpa", "reference"),
}


class Call(NamedTuple):
    """What a backend may look at when it decides: kinds, never values or exact sizes."""

    op: str
    device: str  # "cpu", "cuda", "meta"
    arch: int  # compute capability as 90 for 9.0; 0 off CUDA
    dtype: torch.dtype
    needs_grad: bool = False
    dropout: bool = False
    window: bool = False
    head_dim: int = 0


Refusal = Callable[[Call], str | None]
_REFUSALS: dict[str, Refusal] = {"reference": lambda call: None}
_forced: dict[str, str] = {}
_chosen: dict[Call, str] = {}
_arch_of_device: dict[int, int] = {}


def register(name: str, refuses: Refusal) -> None:
    """Adds a backend: `refuses(call)` gives the reason why it cannot run, or None if it can."""
    _REFUSALS[name] = refuses


def arch_of(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number (90 for 9.0), 0 for any other device."""
    if device.type != "cuda":
        return 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _arch_of_device:
        major, minor = torch.cuda.get_device_capability(index)
        _arch_of_device[index] = 10 * major + minor
    return _arch_of_device[index]


def choose(op: str, x: torch.Tensor, *, dropout=False, window=False, head_dim=0) -> str:
    """The backend that runs `op` on a tensor like `x`; about one microsecond after the first
    call.
    """
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    call = Call(
        op, x.device.type, arch_of(x.device), x.dtype, needs_grad, dropout, window, head_dim
    )
    name = _chosen.get(call)
    if name is None:
        name = _chosen[call] = _decide(call)
    return name


def _decide(call: Call) -> str:
    reasons = {}
    candidates = (_forced[call.op],) if call.op in _forced else PREFERENCE[call.op]
    for name in candidates:
        reason = _REFUSALS[name](call)
        if reason is None:
            return name
        reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no backend can run {call.op} here ({call}): {told}")


def available(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64):
    """{backend: reason it refuses, or None} for one op on one kind of device, in preference
    order.

    raises: ValueError if there is no such op
    """
    if op not in PREFERENCE:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(PREFERENCE)}")
    target = torch.device(device)
    call = Call(op, target.type, arch_of(target), dtype, head_dim=head_dim)
    return {name: _REFUSALS[name](call) for name in PREFERENCE[op]}


class use:
    """Forces a backend for every op that lists it (or for one): `use("sdpa")` or `with use(...)`.

    As a call it holds until `use(None)`; as a context manager it is undone at the end of the block.
    raises: ValueError if no op (or not that op) knows the backend
    """

    def __init__(self, backend: str | None, op: str | None = None):
        self._before = dict(_forced)
        if op is not None and op not in PREFERENCE:
            raise ValueError(f"unknown op {op!r}; known: {', '.join(PREFERENCE)}")
        ops = [op] if op else list(PREFERENCE)
        if backend is None:
            after = {name: forced for name, forced in _forced.items() if name not in ops}
        else:
            ops = [name for name in ops if backend in PREFERENCE[name]]
            if not ops:
                known = sorted({name for names in PREFERENCE.values() for name in names})
                where = f"op {op!r}" if op else "any op"
                raise ValueError(f"{backend!r} is no backend of {where}; known: {', '.join(known)}")
            after = {**_forced, **dict.fromkeys(ops, backend)}
        _install(after)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        _install(self._before)


def _install(forced: dict[str, str]) -> None:
    _forced.clear()
    _forced.update(forced)
    _chosen.clear()
