"""The CUDA C++ kernels of csrc/, for inference: loading, what they refuse, one function for each.

The library is built by setup.py where nvcc is found and loaded at first use. It loads on CPU builds
of torch too, where its operators know only the shapes of what they would return.

T tokens (or any number of rows), D model, F feed-forward, B texts
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_fast.ops import _library
from llm2vec_fast.ops._library import rows, weight_for
from llm2vec_fast.ops.backend import Call

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
NAMESPACE = "llm2vec_fast_cuda"
OPS = ("add_rms_norm", "swiglu", "pool", "add_rms_norm_fp8", "swiglu_fp8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DEVICES = ("cuda", "meta")


def refuses(call: Call) -> str | None:
    """Why the kernels cannot run this kind of call, or None if they can."""
    if call.op not in OPS:
        return f"has no kernel for {call.op}"
    if not LIBRARY.exists():
        return "the CUDA library is not built (reinstall where nvcc is, with LLM2VEC_FAST_CUDA=1)"
    if call.device == "meta" and not call.forced:
        return "computes nothing on meta tensors; runs there if forced"
    if call.device not in _DEVICES:
        return "needs a CUDA device"
    if call.arch < 80:
        return f"needs compute capability 8.0 or newer, this device has {call.arch / 10}"
    if call.op.endswith("_fp8") and call.arch < 89:
        return f"fp8 e4m3 needs compute capability 8.9 or newer, this device has {call.arch / 10}"
    if call.dtype not in DTYPES:
        return f"computes in bf16, fp16 and fp32, not {call.dtype}"
    if call.needs_grad:
        return "inference only: it has no backward pass"
    try:
        load()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def load(library: Path | None = None, namespace: str = NAMESPACE):
    """Loads the library, once, and returns its operators.

    raises: RuntimeError if it is not built or does not load
    """
    path = LIBRARY if library is None else library
    return _library.load(path, namespace, _FAKES, "LLM2VEC_FAST_CUDA")


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y and r as ops.add_rms_norm defines them; without a residual r is x itself."""
    x_RD, weight_D = _rows("add_rms_norm", x_TD), weight_for(x_TD, weight_D)
    if residual_TD is None:
        return load().rms_norm.default(x_RD, weight_D, eps).view(x_TD.shape), x_TD
    other_RD = _rows("add_rms_norm", residual_TD)
    y, sum_ = load().add_rms_norm.default(x_RD, other_RD, weight_D, eps)
    return y.view(x_TD.shape), sum_.view(x_TD.shape)


def add_rms_norm_fp8(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """add_rms_norm with y as (data e4m3, scale (..., 1) fp32) and then r; y = data * scale.

    The scale is a row's largest |y| / 448, and 1 for a row of zeros. What is quantised is the fp32
    value, not first rounded to the dtype of x.
    """
    x_RD, weight_D = _rows("add_rms_norm_fp8", x_TD), weight_for(x_TD, weight_D)
    scale_shape = (*x_TD.shape[:-1], 1)
    if residual_TD is None:
        data, scale = load().rms_norm_fp8.default(x_RD, weight_D, eps)
        return data.view(x_TD.shape), scale.view(scale_shape), x_TD
    other_RD = _rows("add_rms_norm_fp8", residual_TD)
    data, scale, sum_ = load().add_rms_norm_fp8.default(x_RD, other_RD, weight_D, eps)
    return data.view(x_TD.shape), scale.view(scale_shape), sum_.view(x_TD.shape)


def swiglu(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) * up as ops.swiglu defines it."""
    y = load().swiglu.default(_rows("swiglu", gate_up_T2F))
    return y.view(*gate_up_T2F.shape[:-1], y.shape[1])


def swiglu_fp8(gate_up_T2F: Tensor) -> tuple[Tensor, Tensor]:
    """swiglu as (data e4m3, scale (..., 1) fp32), scaled like add_rms_norm_fp8."""
    data, scale = load().swiglu_fp8.default(_rows("swiglu_fp8", gate_up_T2F))
    leading = gate_up_T2F.shape[:-1]
    return data.view(*leading, data.shape[1]), scale.view(*leading, 1)


def pool(hidden_TD: Tensor, spans_B2: Tensor, mode: str = "mean", normalize: bool = False):
    """(B, D) fp32 as ops.pool defines it."""
    return pool_store(hidden_TD, spans_B2, mode, normalize)[0]


def pool_store(
    hidden_TD: Tensor,
    spans_B2: Tensor,
    mode: str = "mean",
    normalize: bool = False,
    truncate_dim: int | None = None,
    precision: str = "float32",
) -> tuple[Tensor, Tensor | None]:
    """ops.pool and vectors.finish in one: pool, truncate, normalise, quantise.

    returns: the vectors, (B, D) or for binary (B, ceil(D / 8)); for int8 the (B,) fp32 scale
    """
    _check_device("pool", hidden_TD)
    if hidden_TD.stride(1) != 1:
        hidden_TD = hidden_TD.contiguous()
    operator = load().pool.default
    vectors, scale = operator(
        hidden_TD, spans_B2.contiguous(), mode, normalize, truncate_dim, precision
    )
    return vectors, scale if precision == "int8" else None


def _check_device(op: str, x: Tensor) -> None:
    if x.device.type not in _DEVICES:
        raise ValueError(f"{op}: the CUDA kernels need tensors on a GPU, not on {x.device}")


def _rows(op: str, x: Tensor) -> Tensor:
    _check_device(op, x)
    return rows(x)


# What the operators return, for meta tensors and torch.compile.


def _fake_rms_norm(x, weight, eps):
    return x.new_empty(x.shape)


def _fake_add_rms_norm(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_rms_norm_fp8(x, weight, eps):
    return _fake_fp8(x, x.shape[1])


def _fake_add_rms_norm_fp8(x, residual, weight, eps):
    return *_fake_fp8(x, x.shape[1]), x.new_empty(x.shape)


def _fake_swiglu(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _fake_swiglu_fp8(gate_up):
    return _fake_fp8(gate_up, gate_up.shape[1] // 2)


def _fake_fp8(x, width):
    data = x.new_empty(x.shape[0], width, dtype=torch.float8_e4m3fn)
    return data, x.new_empty(x.shape[0], 1, dtype=torch.float32)


_STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
    "binary": torch.uint8,
}


def _fake_pool(hidden, spans, mode, normalize, truncate_dim, precision):
    texts = spans.shape[0]
    width = hidden.shape[1] if truncate_dim is None else truncate_dim
    if precision == "binary":
        width = (width + 7) // 8
    vectors = hidden.new_empty(texts, width, dtype=_STORED[precision])
    scale = hidden.new_empty(texts if precision == "int8" else 0, dtype=torch.float32)
    return vectors, scale


_FAKES = {
    "rms_norm": _fake_rms_norm,
    "add_rms_norm": _fake_add_rms_norm,
    "rms_norm_fp8": _fake_rms_norm_fp8,
    "add_rms_norm_fp8": _fake_add_rms_norm_fp8,
    "swiglu": _fake_swiglu,
    "swiglu_fp8": _fake_swiglu_fp8,
    "pool": _fake_pool,
}
