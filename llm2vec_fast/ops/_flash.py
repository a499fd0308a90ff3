"""FlashAttention from other packages, each behind the same arguments; imported at first use.

Where their signatures differ (torch 2.11 to 2.13, flash_attn 2) is settled here, nowhere else.
A pair (forward, backward) is what an autograd node of ours is built from: forward gives the output
and what backward wants back; backward writes into the gradients it is given.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from llm2vec_fast.ops.backend import Call


def _edges(causal: bool, window: int | None) -> tuple[int, int]:
    """(left, right) as FlashAttention counts it: keys seen on each side, -1 for all of them."""
    left = -1 if window is None else window - 1
    return left, (0 if causal else left)


def _common_refusal(call: Call) -> str | None:
    if call.device != "cuda":
        return "needs a CUDA device"
    if call.arch < 80:
        return f"needs compute capability 8.0 or newer, this device has {call.arch / 10}"
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 and fp16 only, not {call.dtype}"
    if call.head_dim > 256 or call.head_dim % 8:
        return f"head dimension {call.head_dim} (a multiple of 8 up to 256 is needed)"
    if call.dropout and call.head_dim > 192 and call.arch in (86, 89, 120):
        return f"head dimension {call.head_dim} with dropout needs more shared memory than 99 KB"
    return None


def flash_attn_refuses(call: Call) -> str | None:
    spec = importlib.util.find_spec("flash_attn")
    if spec is None or spec.origin is None:  # flash-attn-4 alone makes a namespace of that name
        return "the package flash_attn is not installed"
    return _common_refusal(call)


# FlashAttention 3 and 4: where they are imported from, the least compute capability, and how their
# window says "all". Which is faster where has to be measured first: until a row in
# benchmarks/results shows one ahead, it runs only where it is asked for by `use`.
NEWER = {
    "flash_attn_3": ("flash_attn_interface", 90, -1),
    "flash_attn_4": ("flash_attn.cute", 90, None),
}


def newer_refuses(name: str, call: Call) -> str | None:
    """Why FlashAttention 3 or 4 (`name`) does not run this call."""
    module, least, _ = NEWER[name]
    try:
        found = importlib.util.find_spec(module) is not None
    except ImportError:  # the package above it is absent
        found = False
    if not found:
        return f"{module} cannot be imported"
    if not call.forced:
        return f"not measured ahead of the others yet; ops.use({name!r}) runs it"
    if call.dropout:
        return "has no dropout"
    if call.device == "cuda" and call.arch < least:
        return f"needs compute capability {least / 10}, this device has {call.arch / 10}"
    return _common_refusal(call)


@functools.cache
def _newer_func(module: str):
    return importlib.import_module(module).flash_attn_varlen_func


def newer(name: str):
    """FlashAttention 3 or 4 as a backend of `attention`; autograd is theirs."""
    module, _, every = NEWER[name]

    def run(
        q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p=0.0, seed=None
    ) -> Tensor:
        assert not dropout_p
        q, k, v = readable(q), readable(k), readable(v)
        edges = tuple(every if n < 0 else n for n in _edges(causal, window))
        out = _newer_func(module)(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen, softmax_scale=scale, causal=causal, window_size=edges,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # some versions add lse

    return run


def varlen_refuses(call: Call) -> str | None:
    if call.dropout:
        return "torch's varlen attention has no dropout"
    return _common_refusal(call)


def flash_dropout_refuses(call: Call) -> str | None:
    if not call.dropout:
        return "only for dropout; without it varlen is the same kernel behind a public function"
    if torch.version.hip is not None:
        return "torch's operator for ROCm keeps another random state"
    return _common_refusal(call)


@functools.cache
def _flash_attn_func():
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


@functools.cache
def _varlen_func():
    """torch's varlen_attn and whether it wants to be told of grouped heads (from torch 2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def readable(x: Tensor) -> Tensor:
    """x itself, or a copy if FlashAttention cannot read it as it lies: columns must be adjacent,
    and every row begin at a multiple of 16 bytes, which it loads at once and does not check.
    """
    step = 16 // x.element_size()
    if x.stride(-1) == 1 and not any(n % step for n in (x.storage_offset(), *x.stride()[:-1])):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def flash_attn(
    q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p=0.0, seed=None
) -> Tensor:
    """Tri Dao's flash_attn 2 package."""
    q, k, v = readable(q), readable(k), readable(v)
    with seeded(q.device, seed if dropout_p else None):
        return _flash_attn_func()(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p,
            softmax_scale=scale, causal=causal, window_size=_edges(causal, window),
        )  # fmt: skip


def varlen(
    q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p=0.0, seed=None
) -> Tensor:
    """The same FlashAttention 2 kernel as built into torch: nobody has to compile flash_attn."""
    assert not dropout_p
    q, k, v = readable(q), readable(k), readable(v)
    func, tell_gqa = _varlen_func()
    grouped = {"enable_gqa": True} if tell_gqa and q.shape[1] != k.shape[1] else {}
    return func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        scale=scale, window_size=_edges(causal, window), **grouped,
    )  # fmt: skip


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """FlashAttention draws from the device's default generator: for this block it starts at `seed`,
    afterwards it goes on as if nothing had happened. Seed and offset live on the host: no sync.
    Not while a CUDA graph is being captured. `seed=None` leaves everything alone.
    """
    if seed is None:
        yield
        return
    index = device.index if device.index is not None else torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    before, offset = generator.initial_seed(), generator.get_offset()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.manual_seed(before)
        generator.set_offset(offset)


def aten_forward(
    q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch's built-in FlashAttention 2 with dropout. Grouped heads are its own business.

    returns:  o, and (lse, two tensors of random state) for `aten_backward`, which replays the mask
    """
    left, right = _edges(causal, window)
    with seeded(q.device, seed if dropout_p else None):
        o, lse, state, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, causal, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
    return o, (lse, state, offset)


def aten_backward(
    do, q, k, v, o, saved, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed, into=None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), which the operator allocates itself; copied if they have to lie in `into`."""
    left, right = _edges(causal, window)
    lse, state, offset = saved
    gradients = torch.ops.aten._flash_attention_backward(
        do, q, k, v, o, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, causal,
        state, offset, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    if into is None:
        return gradients
    for place, gradient in zip(into, gradients, strict=True):
        if place is not None:
            place.copy_(gradient)
    return into


@functools.cache
def _flash_attn_pair_module() -> ModuleType | None:
    """flash_attn's own forward and backward with the signature of 2.7 and newer, if they are so."""
    from flash_attn import flash_attn_interface as module

    try:
        function = module._flash_attn_varlen_forward
        # From torch 2.4 on it is a custom operator, whose own signature is (*args, **kwargs).
        names = inspect.signature(getattr(function, "_init_fn", function)).parameters
    except (AttributeError, TypeError, ValueError):
        return None
    return module if "window_size_left" in names else None


def has_flash_attn_pair() -> bool:
    """Whether `flash_attn_forward` and `flash_attn_backward` fit the installed flash_attn."""
    return _flash_attn_pair_module() is not None


def flash_attn_forward(
    q, k, v, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed
) -> tuple[Tensor, tuple[Tensor, ...]]:
    left, right = _edges(causal, window)
    with seeded(q.device, seed if dropout_p else None):
        o, lse, _, state = _flash_attn_pair_module()._flash_attn_varlen_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, scale, causal,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
    return o, (lse, state)


def flash_attn_backward(
    do, q, k, v, o, saved, cu_seqlens, max_seqlen, causal, window, scale, dropout_p, seed, into=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes straight into the views it is given."""
    left, right = _edges(causal, window)
    dq, dk, dv = into or [torch.empty_like(x) for x in (q, k, v)]
    lse, state = saved
    _flash_attn_pair_module()._flash_attn_varlen_backward(
        do, q, k, v, o, lse, dq, dk, dv, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, scale, causal, left, right, 0.0, None, False, rng_state=state,
    )  # fmt: skip
    return dq, dk, dv
