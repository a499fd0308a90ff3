"""The CPU's C++ kernels of csrc/, for inference (rope for training too): loading, what they refuse,
one function for each.

The library is built by setup.py where a C++ compiler is found and loaded at first use; without it
the CPU computes with plain torch (`eager`). It holds code for AVX2, AVX-512 and AMX and picks by
itself.

T tokens (or any number of rows), D model, F feed-forward, B texts, N query heads, K kv heads,
H head dim, E = H/2, P positions, S = (N + 2K) H
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_fast.ops import _library
from llm2vec_fast.ops._library import rows, weight_for
from llm2vec_fast.ops.backend import Call

LIBRARY = Path(__file__).parents[1] / "_cpu.so"
NAMESPACE = "llm2vec_fast_cpu"
OPS = ("add_rms_norm", "swiglu", "rope_", "attention")
DTYPES = (torch.bfloat16, torch.float32)
# Texts of more tokens go to torch's own attention, which works in blocks of keys, and in bf16 with
# the processor's matrix units where our kernel has none. See benchmarks/LOG.md.
LONGEST, LONGEST_WITHOUT_MATRIX_UNITS = 512, 64


def refuses(call: Call) -> str | None:
    """Why the kernels cannot run this kind of call, or None if they can."""
    if call.op not in OPS:
        return f"has no kernel for {call.op}"
    if not LIBRARY.exists():
        return "the CPU's library is not built (reinstall where c++ is, with LLM2VEC_FAST_CPU=1)"
    if call.device != "cpu":
        return "computes on a CPU"
    if call.dtype not in DTYPES:
        return f"computes in bf16 and fp32, not {call.dtype}"
    if (call.needs_grad and call.op != "rope_") or call.dropout:
        return "inference only: it has no backward pass"
    try:
        isa = load().isa()
    except RuntimeError as error:
        return str(error)
    if isa == "plain" and not call.forced:
        return "the processor has no AVX2: slower than torch unless forced"
    return None


@functools.cache
def load():
    """Loads the library, once, and returns its operators.

    raises: RuntimeError if it is not built or does not load
    """
    return _library.load(LIBRARY, NAMESPACE, _FAKES, "LLM2VEC_FAST_CPU")


def longest(dtype: torch.dtype) -> int:
    """Tokens of the longest texts that `attention` computes by itself."""
    bare = dtype == torch.bfloat16 and load().isa() != "amx"
    return LONGEST_WITHOUT_MATRIX_UNITS if bare else LONGEST


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y and r as ops.add_rms_norm defines them; without a residual r is x itself."""
    weight_D = weight_for(x_TD, weight_D)
    if residual_TD is None:
        return load().rms_norm.default(rows(x_TD), weight_D, eps).view(x_TD.shape), x_TD
    y, r = load().add_rms_norm.default(rows(x_TD), rows(residual_TD), weight_D, eps)
    return y.view(x_TD.shape), r.view(x_TD.shape)


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up as ops.swiglu defines it."""
    y = load().swiglu.default(rows(gate_up_T2F))
    return y.view(*gate_up_T2F.shape[:-1], y.shape[1])


def rotate_(qkv_TS, positions_T, cos_PE, sin_PE, n_heads, n_kv_heads, inverse=False) -> Tensor:
    """Turns queries and keys in place, by the negative angle if `inverse`; gives qkv_TS itself."""
    tables = cos_PE.contiguous(), (-sin_PE if inverse else sin_PE).contiguous()
    into = qkv_TS if qkv_TS.stride(1) == 1 else qkv_TS.contiguous()
    load().rope_.default(into, positions_T.contiguous(), *tables, n_heads + n_kv_heads)
    return qkv_TS if into is qkv_TS else qkv_TS.copy_(into)


def rotated(qkv_TS: Tensor, *arguments, inverse: bool = False) -> Tensor:
    """The same as a new tensor, values copied."""
    out_TS = qkv_TS.clone(memory_format=torch.contiguous_format)
    return rotate_(out_TS, *arguments, inverse=inverse)


def attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    causal: bool, window: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """(T, N, H) of ops.attention; rows of texts longer than `longest` are left unwritten."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_TNH, k_TKH, v_TKH))
    most = longest(q.dtype)
    return load().attention.default(q, k, v, cu_seqlens, max_seqlen, causal, window, scale, most)


# What the operators return, for meta tensors and torch.compile.
_FAKES = {
    "rms_norm": lambda x, weight, eps: x.new_empty(x.shape),
    "add_rms_norm": lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    "swiglu": lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    "rope_": lambda qkv, positions, cos, sin, heads: None,
    "attention": lambda q, *_: q.new_empty(q.shape),
}
