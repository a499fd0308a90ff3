"""FlashAttention from other packages, each behind the same eight arguments; imported at first use.

Where their signatures differ (torch 2.11 to 2.13, flash_attn 2) is settled here, nowhere else.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect

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
    return None


def flash_attn_refuses(call: Call) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    return _common_refusal(call)


def varlen_refuses(call: Call) -> str | None:
    if call.dropout:
        return "torch's varlen attention has no dropout"
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


def flash_attn(q, k, v, cu_seqlens, max_seqlen, causal, window, scale) -> Tensor:
    """Tri Dao's flash_attn 2 package."""
    return _flash_attn_func()(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        softmax_scale=scale, causal=causal, window_size=_edges(causal, window),
    )  # fmt: skip


def varlen(q, k, v, cu_seqlens, max_seqlen, causal, window, scale) -> Tensor:
    """The same FlashAttention 2 kernel as built into torch: nobody has to compile flash_attn."""
    func, tell_gqa = _varlen_func()
    grouped = {"enable_gqa": True} if tell_gqa and q.shape[1] != k.shape[1] else {}
    return func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        scale=scale, window_size=_edges(causal, window), **grouped,
    )  # fmt: skip
