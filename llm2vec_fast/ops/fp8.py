"""fp8 inference: e4m3 matrices with one fp32 scale a row, and what produces and multiplies them.

T tokens (or any number of rows), D model, F feed-forward, O output features

A linear layer quantises its weight once, a row for each output feature, and its input at every
call, a row for each token; the scales then leave the product as factors of its rows and columns:

    weight = quantize_rows(weight_OD)                       # when the model is loaded
    x, residual = add_rms_norm_fp8(x, residual, norm_D, eps)
    gate_up = fp8_linear(x, weight)                         # bf16 out
    down = fp8_linear(swiglu_fp8(gate_up), weight_down)

So a block of the transformer quantises inside the operations that it runs anyway: both norms write
e4m3 for the q, k, v and the gate-up product, SwiGLU writes it for the down product, and only the
output of attention takes a pass of its own, by `quantize_rows`. The residual stream, rope and
attention stay in bf16. Which products stay there too is a matter of measurement: `model/fp8.py`.

e4m3 has four significant bits from 448 down to 2^-6 and fewer down to 2^-9: a value within 2^-15 of
the largest of its row keeps its own precision, about 2.6 % on average, and a product of many is off
by 3.7 % of its norm (cosine 0.9993), with outlier channels or without. An outlier in one row costs
no other row anything.

Nothing here is differentiable, and everything says so if a gradient is wanted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from llm2vec_fast.ops.add_rms_norm import add_rms_norm_ref
from llm2vec_fast.ops.backend import Call, choose, kernels, register
from llm2vec_fast.ops.swiglu import swiglu_ref

E4M3_MAX = 448.0
# Below the smallest normal number a scale loses bits, and a quotient by it exceeds what e4m3 holds.
SMALLEST_SCALE = 2.0**-126
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class QuantTensor(NamedTuple):
    """A matrix of value data * scale_T1, as `quantize_rows` makes it.

    data:      (T, D) float8_e4m3fn
    scale_T1:  (T, 1) fp32
    """

    data: Tensor
    scale_T1: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(T, D) in `dtype`, computed in fp32."""
        acc = torch.promote_types(dtype, torch.float32)
        return (self.data.to(acc) * self.scale_T1).to(dtype)


def quantize_rows(x_TD: Tensor) -> QuantTensor:
    """Each row as e4m3 with the scale that lets its largest magnitude be 448.

    x_TD:     (T, D) bf16/fp16/fp32/fp64: activations, or a weight with a row for each output
    returns:  data = x / scale rounded to nearest even; scale = max |row| / 448, 1 for a row of
              zeros, at least 2^-126 otherwise. A row with an infinity or a NaN has that for its
              scale, and dequantises to NaN in all its columns
    raises:   ValueError on other shapes and dtypes, and if a gradient is wanted
    source:   Micikevicius et al. 2022, arXiv:2209.05433 (e4m3)
    """
    _check_rows("quantize_rows", x_TD)
    _refuse_gradients("quantize_rows", x_TD)
    if choose("quantize_rows", x_TD) == "triton":
        return QuantTensor(*kernels("quantize_rows").forward(x_TD))
    return quantize_rows_ref(x_TD)


def quantize_rows_ref(x_TD):
    wide_TD = _wide(x_TD)
    largest_T1 = wide_TD.abs().amax(-1, keepdim=True)
    # By a tensor: on a GPU torch divides by a number with its reciprocal, an ulp off at times.
    scale_T1 = (largest_T1 / torch.full_like(largest_T1, E4M3_MAX)).float()
    scale_T1 = scale_T1.clamp_min(SMALLEST_SCALE)
    scale_T1 = scale_T1.masked_fill_(largest_T1 == 0, 1.0)
    return QuantTensor((wide_TD / scale_T1).to(torch.float8_e4m3fn), scale_T1)


def add_rms_norm_fp8(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[QuantTensor, Tensor]:
    """`add_rms_norm` whose norm leaves as e4m3, quantised from its fp32 value in the same pass.

    x_TD:         (T, D) bf16/fp16/fp32, the output of the layer before
    residual_TD:  like x_TD, or None at the first layer (then r = x)
    weight_D:     (D,)
    returns:      r / rms(r) * weight as by `quantize_rows`, and r = x + residual like x_TD
    raises:       ValueError if shapes or dtypes do not fit, and if a gradient is wanted
    source:       Zhang and Sennrich 2019, arXiv:1910.07467
    """
    _check_rows("add_rms_norm_fp8", x_TD)
    if weight_D.shape != x_TD.shape[-1:] or weight_D.dtype not in FLOATS:
        raise ValueError(
            f"add_rms_norm_fp8: weight must be ({x_TD.shape[-1]},) of floats like x, "
            f"got {tuple(weight_D.shape)} {weight_D.dtype}"
        )
    if residual_TD is not None and (
        residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype
    ):
        raise ValueError(
            f"add_rms_norm_fp8: residual is {tuple(residual_TD.shape)} {residual_TD.dtype}, "
            f"x is {tuple(x_TD.shape)} {x_TD.dtype}; they must be alike"
        )
    _refuse_gradients("add_rms_norm_fp8", x_TD, residual_TD, weight_D)
    backend = choose("add_rms_norm_fp8", x_TD)
    if backend == "reference":
        return add_rms_norm_fp8_ref(x_TD, residual_TD, weight_D, eps)
    run = _kernel(backend, "add_rms_norm_fp8")
    data, scale_T1, residual_TD = run(x_TD, residual_TD, weight_D, eps)
    return QuantTensor(data, scale_T1), residual_TD


def add_rms_norm_fp8_ref(x_TD, residual_TD, weight_D, eps):
    residual_TD = x_TD if residual_TD is None else x_TD + residual_TD
    y_TD, _ = add_rms_norm_ref(_wide(residual_TD), None, _wide(weight_D), eps)
    return quantize_rows_ref(y_TD), residual_TD


def swiglu_fp8(gate_up_T2F: Tensor) -> QuantTensor:
    """silu(gate) * up, quantised from its fp32 value in the same pass.

    gate_up_T2F:  (T, 2F) bf16/fp16/fp32, laid out as `unpack_gate_up` reads it
    returns:      (T, F) as by `quantize_rows`
    raises:       ValueError on an odd width, other shapes and dtypes, and if a gradient is wanted
    source:       Shazeer 2020, arXiv:2002.05202
    """
    _check_rows("swiglu_fp8", gate_up_T2F)
    if gate_up_T2F.shape[-1] % 2:
        raise ValueError(
            f"swiglu_fp8: the last dimension must be even, got {tuple(gate_up_T2F.shape)}"
        )
    _refuse_gradients("swiglu_fp8", gate_up_T2F)
    backend = choose("swiglu_fp8", gate_up_T2F)
    if backend == "reference":
        return swiglu_fp8_ref(gate_up_T2F)
    return QuantTensor(*_kernel(backend, "swiglu_fp8")(gate_up_T2F))


def swiglu_fp8_ref(gate_up_T2F):
    return quantize_rows_ref(swiglu_ref(_wide(gate_up_T2F)))


def fp8_linear(
    x: QuantTensor,
    weight: QuantTensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    fast_accum: bool = False,
) -> Tensor:
    """x @ weight.T + bias of quantised matrices.

    x:           (T, D)
    weight:      (O, D), quantised by output features
    bias:        (O,) in out_dtype, or None
    out_dtype:   of the result; tensor cores write bf16, the reference any floating dtype
    fast_accum:  leave sums over D in the tensor cores, which on Hopper keep about 13 bits of them,
                 instead of adding them up in fp32 every 128 columns. Faster; harmless where
                 products cancel (simulated: 0.1-0.3 % of error, e4m3 itself 3.7 %), but sums that
                 only grow come out 3-12 % too small (D = 4,096-14,336): off, until measured
    returns:     (T, O), accumulated in fp32, rounded once
    raises:      ValueError if shapes or dtypes do not fit, if a gradient is wanted, and on a GPU if
                 D or O is no multiple of 16; T is free
    source:      torch._scaled_mm (cuBLAS from 12.9 on Hopper, CUTLASS elsewhere)
    """
    _check_linear(x, weight, bias, out_dtype)
    _refuse_gradients("fp8_linear", x.scale_T1, weight.scale_T1, bias)
    if choose("fp8_linear", x.data) == "scaled_mm":
        return _scaled_mm(x, weight, bias, out_dtype, fast_accum)
    return fp8_linear_ref(x, weight, bias, out_dtype)


def fp8_linear_ref(x, weight, bias=None, out_dtype=torch.bfloat16):
    acc = torch.promote_types(out_dtype, torch.float32)
    y_TO = x.data.to(acc) @ weight.data.to(acc).t() * x.scale_T1 * weight.scale_T1.t()
    return (y_TO if bias is None else y_TO + bias.to(acc)).to(out_dtype)


def _scaled_mm(x, weight, bias, out_dtype, fast_accum):
    (width, outputs), narrow = weight.shape[::-1], "or force ops.use('reference', 'fp8_linear')"
    if width % 16 or outputs % 16:
        raise ValueError(
            f"fp8_linear: tensor cores need multiples of 16, the weight is {tuple(weight.shape)}; "
            f"keep such a layer in bf16, {narrow}"
        )
    if out_dtype != torch.bfloat16:
        raise ValueError(
            f"fp8_linear: products with row-wise scales are written in bfloat16, not {out_dtype}; "
            f"convert the result, {narrow}"
        )
    return torch._scaled_mm(
        x.data.contiguous(),
        weight.data.contiguous().t(),
        scale_a=x.scale_T1.contiguous(),
        scale_b=weight.scale_T1.contiguous().t(),
        bias=bias,
        out_dtype=out_dtype,
        use_fast_accum=fast_accum,
    )


def _scaled_mm_refuses(call: Call) -> str | None:
    if call.device in ("cpu", "meta"):  # torch has it there, to test what we hand over
        return None if call.forced else "only for tests off CUDA devices; runs there if forced"
    if call.device != "cuda":
        return "needs a CUDA device"
    if call.arch < 89:
        return f"fp8 e4m3 needs compute capability 8.9 or newer, this device has {call.arch / 10}"
    return None


register("scaled_mm", _scaled_mm_refuses)


def _kernel(backend: str, op: str):
    if backend == "triton":
        return kernels(op).forward
    return getattr(kernels(op, backend), op)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_rows(op: str, x_TD: Tensor) -> None:
    if x_TD.dim() != 2 or x_TD.shape[1] == 0 or x_TD.dtype not in FLOATS:
        raise ValueError(
            f"{op}: needs (T, D) with D > 0 in bf16, fp16, fp32 or fp64, "
            f"got {tuple(x_TD.shape)} {x_TD.dtype}"
        )


def _check_linear(x, weight, bias, out_dtype) -> None:
    for name, matrix in (("x", x), ("weight", weight)):
        data, scale = matrix.data, matrix.scale_T1
        if data.dim() != 2 or data.dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"fp8_linear: {name} needs 2-dimensional float8_e4m3fn data, "
                f"got {tuple(data.shape)} {data.dtype}"
            )
        if scale.shape != (data.shape[0], 1) or scale.dtype != torch.float32:
            raise ValueError(
                f"fp8_linear: {name} needs float32 scales ({data.shape[0]}, 1), "
                f"got {tuple(scale.shape)} {scale.dtype}"
            )
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"fp8_linear: x is {tuple(x.shape)}, weight is {tuple(weight.shape)}; "
            "their last dimensions must be equal"
        )
    if not out_dtype.is_floating_point or out_dtype.itemsize == 1:
        raise ValueError(f"fp8_linear: out_dtype must be a floating dtype, got {out_dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != out_dtype):
        raise ValueError(
            f"fp8_linear: bias must be ({weight.shape[0]},) {out_dtype}, "
            f"got {tuple(bias.shape)} {bias.dtype}"
        )


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            f"{op} is for inference: run it under torch.no_grad(), or detach its input"
        )
