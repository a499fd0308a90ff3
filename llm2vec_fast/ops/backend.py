"""The one place that decides which implementation of an operation runs.

`PREFERENCE[op]` lists backends, best first. The first that has no reason to refuse the call wins;
the choice is remembered per kind of call, so that asking again is one dictionary lookup.
`use("name")` forces a backend: if it cannot run it raises, it never falls back silently.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch

# A backend that no GPU has measured yet stands after one that a GPU has (benchmarks/results).
PREFERENCE: dict[str, tuple[str, ...]] = {
    "add_rms_norm": ("triton", "cuda", "cpu", "eager", "reference"),
    "rope_": ("triton", "cpu", "eager", "reference"),
    "swiglu": ("triton", "cuda", "cpu", "eager", "reference"),
    "pool": ("triton", "cuda", "reference"),
    "attention": (
        "flash_attn_4", "flash_attn_3", "flash_attn", "varlen", "flash_dropout", "triton", "cpu",
        "eager", "sdpa", "reference",
    ),
    "masked_token_loss": ("triton", "eager", "reference"),
    "info_nce": ("triton", "reference"),
    "lora_linear": ("triton", "eager", "reference"),
    "quantize_rows": ("triton", "reference"),
    "add_rms_norm_fp8": ("triton", "cuda", "reference"),
    "swiglu_fp8": ("triton", "cuda", "reference"),
    "fp8_linear": ("scaled_mm", "reference"),
}  # fmt: skip
FP8_OPS = ("quantize_rows", "add_rms_norm_fp8", "swiglu_fp8", "fp8_linear")


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
    forced: bool = False  # asked for by use(): some backends run only then


Refusal = Callable[[Call], str | None]
_forced: dict[str, str] = {}
_chosen: dict[tuple, str] = {}
_caches: dict[tuple, dict[tuple, str]] = {(): _chosen}  # what was chosen, by what was forced then
_arch_of_device: dict[int, int] = {}
_meta_arch = 90
_for_gradients = False


def register(name: str, refuses: Refusal) -> None:
    """Adds a backend: `refuses(call)` gives the reason why it cannot run, or None if it can."""
    _REFUSALS[name] = refuses
    _forget()


def arch_of(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number (90 for 9.0), 0 for the CPU; for meta
    tensors that of the GPU they stand for.
    """
    if device.type != "cuda":
        return _meta_arch if device.type == "meta" else 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _arch_of_device:
        major, minor = torch.cuda.get_device_capability(index)
        _arch_of_device[index] = 10 * major + minor
    return _arch_of_device[index]


def forced() -> tuple[tuple[str, str], ...]:
    """(operation, backend) of all that `use` forces now."""
    return tuple(_forced.items())


def set_meta_arch(arch: int) -> int:
    """Sets which GPU meta tensors stand for (90 for 9.0); returns what was set before."""
    global _meta_arch
    before, _meta_arch = _meta_arch, arch
    _forget()
    return before


def choose(
    op: str, x: torch.Tensor, *others: torch.Tensor | None, dropout=False, window=False, head_dim=0
) -> str:
    """The backend that runs `op` on tensors like `x`; about one microsecond after the first call.
    Under torch.compile the reference, unless another is forced.

    others: the further inputs that a gradient may be wanted for
    """
    if op not in _forced and torch.compiler.is_compiling():
        return "reference"  # plain torch, which the compiler sees into and fuses by itself
    needs_grad = _for_gradients
    if torch.is_grad_enabled():
        needs_grad = needs_grad or x.requires_grad
        for other in others:
            needs_grad = needs_grad or (other is not None and other.requires_grad)
    device = x.device
    key = (op, device, x.dtype, needs_grad, dropout, window, head_dim)
    name = _chosen.get(key)
    if name is None:
        call = Call(
            op, device.type, arch_of(device), x.dtype, needs_grad, dropout, window, head_dim,
            forced=op in _forced,
        )  # fmt: skip
        name = _chosen[key] = _decide(call)
    return name


@contextlib.contextmanager
def chosen_for_gradients() -> Iterator[None]:
    """In this block, or function, calls run on the backends that they would have if a gradient were
    wanted. What is computed once without a graph and again with one, as in GradCache, so gets the
    same bits.
    """
    global _for_gradients
    before, _for_gradients = _for_gradients, True
    try:
        yield
    finally:
        _for_gradients = before


@functools.cache
def kernels(op: str, backend: str = "triton") -> ModuleType:
    """The module of an operation's Triton kernels, imported at first use; or of what stands for
    them under the same names: plain torch for the CPU ("eager"), the libraries of csrc/ ("cuda",
    "cpu"), each one module for all operations.
    """
    name = op.rstrip("_")
    where = {"cuda": "_cuda", "cpu": "_cpu", "eager": f"eager.{name}"}
    return importlib.import_module(f"llm2vec_fast.ops.{where.get(backend, f'kernels.{name}')}")


def _triton_refuses(call: Call) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"computes in bf16, fp16 and fp32, not {call.dtype}"
    if call.op == "attention" and call.head_dim > 256:
        return f"head dimension {call.head_dim} (up to 256 is built)"
    if call.op in FP8_OPS and 0 < call.arch < 89:
        return f"fp8 e4m3 needs compute capability 8.9 or newer, this device has {call.arch / 10}"
    if call.device == "meta":
        return None if call.forced else "computes nothing on meta tensors; runs there if forced"
    if call.device == "cpu" and call.forced and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if call.device != "cuda":
        return "needs a CUDA device (on the CPU: TRITON_INTERPRET=1 and forced, for tests)"
    if call.arch < 80:
        return f"needs compute capability 8.0 or newer, this device has {call.arch / 10}"
    return None


def _eager_refuses(call: Call) -> str | None:
    if call.device != "cpu":
        return "plain torch arranged for the CPU's caches"
    if call.dtype not in (torch.bfloat16, torch.float32):
        return f"computes in bf16 and fp32, not {call.dtype}"
    if call.op == "attention" and not (call.needs_grad or call.dropout or call.forced):
        return "torch's own kernel is as fast where no gradient is wanted"
    return None


def _library_refuses(backend: str, call: Call) -> str | None:
    return kernels("", backend).refuses(call)


_REFUSALS: dict[str, Refusal] = {
    "reference": lambda call: None,
    "triton": _triton_refuses,
    "eager": _eager_refuses,
    "cuda": functools.partial(_library_refuses, "cuda"),
    "cpu": functools.partial(_library_refuses, "cpu"),
}


def _decide(call: Call) -> str:
    reasons = {}
    candidates = (_forced[call.op],) if call.forced else PREFERENCE[call.op]
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
    global _chosen
    _forced.clear()
    _forced.update(forced)
    # Not cleared: a loop that forces a backend again and again decides but once.
    _chosen = _caches.setdefault(tuple(sorted(forced.items())), {})


def _forget() -> None:
    for cache in _caches.values():
        cache.clear()
