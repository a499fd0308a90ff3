"""fp8_linear: against fp64, and how far row-wise e4m3 is from the product it stands for.

T tokens, D model, O output features
"""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops.fp8 import QuantTensor, fp8_linear, fp8_linear_ref, quantize_rows


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(tokens, width, outliers=0, seed=0):
    """Normal, with a few channels thirty times as large, as those of an LLM are."""
    x_TD = normal(tokens, width, seed=seed)
    x_TD[:, :: width // outliers if outliers else width + 1] *= 30.0 if outliers else 1.0
    return x_TD


def exact(x: QuantTensor, weight: QuantTensor, bias=None):
    y = x.dequantize(torch.float64) @ weight.dequantize(torch.float64).t()
    return y if bias is None else y + bias.double()


def relative(y, truth):
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (37, 252), (507, 16), (256, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_the_product_of_the_dequantised(within_rule, tokens, width, outputs, dtype):
    x, weight = quantize_rows(normal(tokens, width)), quantize_rows(normal(outputs, width, seed=1))
    for bias in (None, normal(outputs, seed=2).to(dtype)):
        got = fp8_linear(x, weight, bias, dtype)
        assert got.dtype == dtype and got.shape == (tokens, outputs)
        if tokens:
            left, right = x.dequantize(dtype), weight.dequantize(dtype)
            plain = torch.nn.functional.linear(left, right, bias)
            within_rule(got, plain, exact(x, weight, bias))


def test_bf16_is_the_default_and_is_rounded_once(rounded_once):
    x, weight = quantize_rows(normal(37, 96)), quantize_rows(normal(48, 96, seed=1))
    got = fp8_linear(x, weight)
    assert got.dtype == torch.bfloat16
    rounded_once(got, exact(x, weight))
    assert fp8_linear_ref(x, weight, None, torch.float64).dtype == torch.float64
    assert relative(fp8_linear_ref(x, weight, None, torch.float64), exact(x, weight)) < 1e-14


@pytest.mark.parametrize("outliers", [0, 8])
@pytest.mark.parametrize("width", [576, 4096])
def test_within_what_e4m3_allows(width, outliers):
    """Half a step is at most 2^-4 of a value, or 2^-10 of the scale below 2^-6."""
    x, w = activations(16, width, outliers), normal(48, width, seed=1, scale=0.02)
    x8, w8 = quantize_rows(x), quantize_rows(w)
    truth = x.double() @ w.double().t()
    off = (fp8_linear(x8, w8, None, torch.float32).double() - truth).abs()
    dx, dw = (v.abs() * 2**-4 + q.scale_T1 * 2**-10 for v, q in ((x, x8), (w, w8)))
    allowed = dx @ w.abs().t() + x.abs() @ dw.t() + dx @ dw.t()
    assert (off <= allowed.double()).all()
    # Errors of single values are independent: of a product they are sqrt(2) of a value's 2.6 %.
    got = fp8_linear(x8, w8)
    assert relative(got, truth) < 0.042
    cosine = torch.cosine_similarity(got.double(), truth, dim=-1)
    assert cosine.mean() > 0.999 and cosine.min() > 0.997


def test_a_scale_of_its_own_keeps_a_row_from_its_neighbours():
    x = normal(4, 256)
    loud = x.clone()
    loud[0] *= 1e6
    w = quantize_rows(normal(32, 256, seed=1))
    assert torch.equal(fp8_linear(quantize_rows(x), w)[1:], fp8_linear(quantize_rows(loud), w)[1:])


def test_nan_stays_in_its_row():
    x = normal(3, 32)
    x[1, 4] = float("nan")
    y = fp8_linear(quantize_rows(x), quantize_rows(normal(16, 32, seed=1)))
    assert y[1].isnan().all() and y[::2].isfinite().all()


def test_errors_name_what_is_wrong():
    x, weight = quantize_rows(normal(3, 32)), quantize_rows(normal(16, 32, seed=1))
    narrow = quantize_rows(normal(16, 48))
    with pytest.raises(ValueError, match=r"x is \(3, 32\), weight is \(16, 48\)"):
        fp8_linear(x, narrow)
    with pytest.raises(ValueError, match=r"weight needs.*float8_e4m3fn.*float32"):
        fp8_linear(x, QuantTensor(normal(16, 32), weight.scale_T1))
    with pytest.raises(ValueError, match=r"x needs float32 scales \(3, 1\), got \(3,\)"):
        fp8_linear(QuantTensor(x.data, x.scale_T1[:, 0]), weight)
    with pytest.raises(ValueError, match=r"x needs float32 scales.*float16"):
        fp8_linear(QuantTensor(x.data, x.scale_T1.half()), weight)
    with pytest.raises(ValueError, match=r"bias must be \(16,\) torch.bfloat16.*float32"):
        fp8_linear(x, weight, torch.zeros(16))
    with pytest.raises(ValueError, match=r"bias must be \(16,\).*\(3,\)"):
        fp8_linear(x, weight, torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"out_dtype.*int32"):
        fp8_linear(x, weight, None, torch.int32)
    with pytest.raises(ValueError, match="fp8_linear is for inference"):
        fp8_linear(QuantTensor(x.data, x.scale_T1.clone().requires_grad_()), weight)


def test_backends_say_why_not():
    reasons = ops.available("fp8_linear", "cpu", torch.float8_e4m3fn)
    assert list(reasons) == ["scaled_mm", "reference"]
    assert "forced" in reasons["scaled_mm"] and reasons["reference"] is None
    x, weight = quantize_rows(normal(3, 40)), quantize_rows(normal(16, 40, seed=1))
    with ops.use("scaled_mm"), pytest.raises(ValueError, match=r"multiples of 16.*\(16, 40\)"):
        fp8_linear(x, weight)
    x, weight = quantize_rows(normal(3, 32)), quantize_rows(normal(16, 32, seed=1))
    with ops.use("scaled_mm"), pytest.raises(ValueError, match=r"bfloat16, not torch.float16"):
        fp8_linear(x, weight, None, torch.float16)


# torch._scaled_mm: what we hand over, on the CPU's own version of it; then on a GPU.


@pytest.mark.parametrize("tokens", [1, 5, 37])
@pytest.mark.parametrize("fast_accum", [False, True])
def test_scaled_mm_is_called_as_it_wants(tokens, fast_accum):
    x, weight = quantize_rows(normal(tokens, 96)), quantize_rows(normal(48, 96, seed=1))
    bias = normal(48, seed=2).bfloat16()
    with ops.use("scaled_mm"):
        try:
            got = fp8_linear(x, weight, fast_accum=fast_accum)
        except RuntimeError as error:
            if "per-tensor" in str(error):
                pytest.skip("the CPU's _scaled_mm of this torch has no row-wise scales")
            raise
        biased = fp8_linear(x, weight, bias)
    assert got.dtype == torch.bfloat16 and relative(got, exact(x, weight)) < 3e-3
    assert relative(biased, exact(x, weight, bias)) < 3e-3


def test_scaled_mm_accepts_our_layouts_and_asks_nothing_of_the_host():
    x, weight = quantize_rows(normal(5, 96)), quantize_rows(normal(48, 96, seed=1))
    x, weight = (QuantTensor(*(part.to("meta") for part in q)) for q in (x, weight))
    with ops.use("scaled_mm"):
        y = fp8_linear(x, weight, torch.empty(48, dtype=torch.bfloat16, device="meta"))
    assert y.shape == (5, 48) and y.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 37, 507, 4096])
@pytest.mark.parametrize(("width", "outputs"), [(576, 1536), (4096, 6144), (14_336, 4096)])
def test_scaled_mm_on_a_gpu(tokens, width, outputs):
    x, w = activations(tokens, width, 8).cuda(), normal(outputs, width, seed=1, scale=0.02).cuda()
    x8, w8 = quantize_rows(x.bfloat16()), quantize_rows(w.bfloat16())
    bias = normal(outputs, seed=2).cuda().bfloat16()
    with ops.use("scaled_mm"):
        plain, biased = fp8_linear(x8, w8), fp8_linear(x8, w8, bias)
        again, fast = fp8_linear(x8, w8), fp8_linear(x8, w8, fast_accum=True)
    assert plain.shape == (tokens, outputs) and torch.equal(plain, again)
    if tokens:
        truth = exact(x8, w8)
        assert relative(plain, truth) < 3e-3  # bf16's own rounding is 1.7e-3
        assert relative(biased, truth + bias.double()) < 3e-3
        assert relative(fast, truth) < 1e-2
        assert relative(plain, x.double() @ w.double().t()) < 0.045


@pytest.mark.gpu
def test_scaled_mm_of_views_and_nan_on_a_gpu():
    x, w = normal(64, 512).cuda(), quantize_rows(normal(256, 512, seed=1).cuda())
    x8 = quantize_rows(x)
    every = QuantTensor(x8.data.view(torch.uint8)[::2].view(x8.data.dtype), x8.scale_T1[::2])
    # Another number of rows may take another kernel, which adds up in another order.
    assert relative(fp8_linear(every, w), exact(x8, w)[::2]) < 3e-3
    x[3, 7] = float("nan")
    y = fp8_linear(quantize_rows(x), w)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()
