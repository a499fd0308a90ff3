"""Quantisation to e4m3 against the list of all e4m3 values, computed in fp64.

T tokens, D model, F feed-forward
"""

from __future__ import annotations

import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops.fp8 import (
    SMALLEST_SCALE,
    QuantTensor,
    add_rms_norm_fp8,
    add_rms_norm_fp8_ref,
    quantize_rows,
    quantize_rows_ref,
    swiglu_fp8,
    swiglu_fp8_ref,
)

EPS = 1e-5
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()].unique()
# Relative error of the value before it is rounded to e4m3, whose steps are 2^-3: a product with a
# reciprocal; and what fp32 makes of a norm or of a sigmoid (its argument may be 80).
DIVIDED, NORMED, GATED = 3e-7, 2e-6, 1e-5
SHAPES = [(1, 1), (37, 5), (3, 252), (4, 507), (2, 2056)]


def check(got: QuantTensor, truth_TD: torch.Tensor, slack: float) -> None:
    """Scales as promised, and no e4m3 value nearer to truth / scale than the one that was taken."""
    assert got.data.dtype == torch.float8_e4m3fn and got.scale_T1.dtype == torch.float32
    assert got.shape == truth_TD.shape and got.scale_T1.shape == (len(truth_TD), 1)
    data, scale = got.data.cpu().double(), got.scale_T1.cpu().double()
    truth_TD = truth_TD.cpu()
    largest = truth_TD.abs().amax(-1, keepdim=True)
    want = torch.where(largest == 0, 1.0, (largest / 448).clamp_min(SMALLEST_SCALE))
    torch.testing.assert_close(scale, want, rtol=slack, atol=0)
    value = (truth_TD / scale).clamp(-448, 448)
    above = torch.searchsorted(E4M3, value).clamp(1, len(E4M3) - 1)
    nearest = torch.minimum((E4M3[above] - value).abs(), (E4M3[above - 1] - value).abs())
    assert ((data - value).abs() <= nearest + slack * value.abs()).all()


def norm_truth(r, weight):
    wide = r.double().cpu()
    rms = (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    return wide / rms * weight.double().cpu()


def swiglu_truth(gate_up):
    gate, up = gate_up.double().cpu().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def drawn(shape, dtype, scale=1.0, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=noise, dtype=torch.float64)).to(dtype)


# The references.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e3])
def test_reference_takes_the_nearest(dtype, scale):
    x = drawn((37, 507), dtype, scale)
    check(quantize_rows(x), x.double(), DIVIDED)
    check(swiglu_fp8(drawn((9, 74), dtype, 3.0)), swiglu_truth(drawn((9, 74), dtype, 3.0)), GATED)
    residual, weight = drawn(x.shape, dtype, seed=1), drawn(x.shape[1:], dtype, seed=2)
    got, r = add_rms_norm_fp8(x, residual, weight, EPS)
    assert torch.equal(r, x + residual)
    check(got, norm_truth(r, weight), NORMED)


def test_ties_go_to_even_and_the_scale_is_exact():
    row = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 0.0]])
    want = [448.0, 16.0, 20.0, -16.0, 0.0, 2 * 2.0**-9, 0.0]
    assert quantize_rows(row).data.float().tolist() == [want]
    assert quantize_rows(row / 8).scale_T1.item() == 1 / 8
    assert quantize_rows(row / 8).data.float().tolist() == [want]


def test_dequantize():
    got = QuantTensor(torch.tensor([[1.0, -448.0]]).to(torch.float8_e4m3fn), torch.tensor([[0.3]]))
    assert got.dequantize().dtype == torch.float32
    torch.testing.assert_close(got.dequantize(), torch.tensor([[0.3, -134.4]]))
    assert got.dequantize(torch.float64).dtype == torch.float64
    assert (
        got.dequantize(torch.bfloat16).tolist() == torch.tensor([[0.3, -134.4]]).bfloat16().tolist()
    )
    x = drawn((37, 252), torch.float32)
    error = quantize_rows(x).dequantize() - x
    assert (error.abs() <= 2**-4 * x.abs() + 2**-10 * quantize_rows(x).scale_T1).all()
    assert 0.02 < error.norm() / x.norm() < 0.03


def ones(x):
    return x.new_ones(x.shape[-1])


OPS = {
    "quantize_rows": (quantize_rows, quantize_rows_ref),
    "swiglu_fp8": (swiglu_fp8, swiglu_fp8_ref),
    "add_rms_norm_fp8": (
        lambda x: add_rms_norm_fp8(x, None, ones(x), EPS)[0],
        lambda x: add_rms_norm_fp8_ref(x, None, ones(x), EPS)[0],
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_errors_name_what_is_wrong(op):
    run = OPS[op][0]
    with pytest.raises(ValueError, match=rf"{op}.*\(2, 3, 4\)"):
        run(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=rf"{op}.*int32"):
        run(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"{op}.*\(2, 0\)"):
        run(torch.zeros(2, 0))


def test_more_errors():
    with pytest.raises(ValueError, match=r"swiglu_fp8.*even.*\(2, 7\)"):
        swiglu_fp8(torch.zeros(2, 7))
    x, weight = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"add_rms_norm_fp8.*\(4,\).*\(5,\)"):
        add_rms_norm_fp8(x, None, torch.ones(5), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm_fp8.*int64"):
        add_rms_norm_fp8(x, None, torch.ones(4, dtype=torch.int64), EPS)
    with pytest.raises(ValueError, match=r"residual is \(3, 4\) torch.float32.*x is \(2, 4\)"):
        add_rms_norm_fp8(x, torch.zeros(3, 4), weight, EPS)
    with pytest.raises(ValueError, match=r"residual.*float16.*float32"):
        add_rms_norm_fp8(x, x.half(), weight, EPS)


def test_a_wanted_gradient_is_refused_by_name():
    x = drawn((3, 4), torch.float32).requires_grad_()
    for op, (run, _) in OPS.items():
        with pytest.raises(ValueError, match=rf"{op} is for inference"):
            run(x)
        with torch.no_grad():
            assert not run(x).scale_T1.requires_grad
        run(x.detach())
    with pytest.raises(ValueError, match="inference"):
        add_rms_norm_fp8(x.detach(), None, torch.ones(4, requires_grad=True), EPS)
    with pytest.raises(ValueError, match="inference"):
        add_rms_norm_fp8(x.detach(), x, torch.ones(4), EPS)


def test_one_launch_each_and_no_host_sync():
    pytest.importorskip("triton")
    from llm2vec_fast.ops.kernels.launch import recorded

    x = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
    with recorded() as launches, ops.use("triton"):
        got = [run(x) for run, _ in OPS.values()]
        summed = add_rms_norm_fp8(x, x, x[0], EPS)[1]
    assert len(launches) == 4
    assert [y.data.dtype for y in got] == 3 * [torch.float8_e4m3fn]
    assert [tuple(y.shape) for y in got] == [(64, 4096), (64, 2048), (64, 4096)]
    assert summed.shape == x.shape and summed.dtype == x.dtype
    with recorded(80), ops.use("triton"):
        for run, _ in OPS.values():
            with pytest.raises(RuntimeError, match=r"8\.9"):
                run(x)


# The kernels.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_kernel_quantize_rows(place, draw, shape, scale):
    x = draw(shape, place, scale)
    got = quantize_rows(x)
    check(got, x.double(), DIVIDED)
    assert torch.equal(got.scale_T1, quantize_rows_ref(x).scale_T1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_kernel_swiglu(place, draw, shape, scale):
    gate_up = draw((shape[0], 2 * shape[1]), place, scale)
    check(swiglu_fp8(gate_up), swiglu_truth(gate_up), GATED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_kernel_add_rms_norm(place, draw, shape, with_residual):
    x, weight = draw(shape, place), draw(shape[1:], place, seed=1)
    residual = draw(shape, place, 3.0, seed=2) if with_residual else None
    got, r = add_rms_norm_fp8(x, residual, weight, EPS)
    assert r.dtype == place.dtype
    assert torch.equal(r, x + residual) if with_residual else r is x
    check(got, norm_truth(r, weight), NORMED)
    wide = weight.float()  # a weight that was kept in fp32
    check(add_rms_norm_fp8(x, residual, wide, EPS)[0], norm_truth(r, weight), NORMED)


def test_kernel_zeros_and_tiny_rows(place):
    tiny = torch.finfo(place.dtype).smallest_normal
    rows = torch.zeros(5, 40, dtype=torch.float64)
    rows[1, 3] = tiny
    rows[2] = tiny * torch.linspace(-1, 1, 40)
    rows[3] = tiny * torch.finfo(place.dtype).eps  # the smallest denormal
    rows[4, 0], rows[4, 1] = torch.finfo(place.dtype).max, tiny
    x = rows.to(place.dtype).to(place.device)
    for got in (quantize_rows(x), quantize_rows_ref(x)):
        assert got.scale_T1[0].item() == 1 and (got.scale_T1 > 0).all()
        assert got.data.float().isfinite().all() and not got.data[0].float().any()
        check(got, x.double(), DIVIDED)
    zeros = torch.zeros(2, 40, dtype=place.dtype, device=place.device)
    for got in (function(zeros) for both in OPS.values() for function in both):
        assert not got.data.float().any() and (got.scale_T1 == 1).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_kernel_shows_nan_and_infinity_and_spares_other_rows(place, draw, bad):
    x = draw((3, 74), place)
    x[1, 50] = bad
    for run, ref in OPS.values():
        for got in (run(x), ref(x)):
            assert not got.scale_T1[1].isfinite()
            assert got.dequantize()[1].isnan().all()
            assert got.dequantize()[::2].isfinite().all()


def test_kernel_reads_views_and_leaves_them_alone(place, draw):
    x, residual, weight = (draw((5, 36), place, seed=n) for n in range(3))
    wide = torch.full((10, 40), float("nan"), dtype=place.dtype, device=place.device)
    rows = wide[::2, 2:38].copy_(x)
    columns = x.t().contiguous().t()
    broad = torch.stack([weight[0], weight[0]], 1)[:, 0]  # a weight with stride 2
    for other in (rows, columns):
        for run, _ in OPS.values():
            for left, right in zip(run(other), run(x), strict=True):
                assert torch.equal(left.float(), right.float())
        got, r = add_rms_norm_fp8(x, residual, weight[0], EPS)
        for left, left_r in (
            add_rms_norm_fp8(other, residual, broad, EPS),
            add_rms_norm_fp8(residual, other, weight[0], EPS),
        ):
            assert torch.equal(left.data.float(), got.data.float()) and torch.equal(left_r, r)
    assert torch.equal(rows, x) and wide[1::2].isnan().all()


def test_kernel_empty(place):
    nothing = torch.zeros(0, 8, dtype=place.dtype, device=place.device)
    for run, _ in OPS.values():
        got = run(nothing)
        assert got.shape[0] == 0 and got.scale_T1.shape == (0, 1)
    got, r = add_rms_norm_fp8(nothing, nothing, torch.ones(8).to(nothing), EPS)
    assert got.shape == r.shape == (0, 8)


# What only a GPU can show: real sizes, and the hardware's cast.


def on_gpu(rows, width, dtype=torch.bfloat16, scale=1.0):
    noise = torch.Generator("cuda").manual_seed(0)
    return (scale * torch.randn(rows, width, device="cuda", generator=noise)).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(("tokens", "width"), [(131_072, 4096), (16_384, 14_336), (16_383, 507)])
def test_real_sizes_and_the_same_bits_again(backend, tokens, width):
    x = on_gpu(tokens, width)
    some = torch.tensor([0, 1, tokens // 2, tokens - 1], device="cuda")
    residual, weight, refused = on_gpu(tokens, width).flip(0), on_gpu(1, width)[0], []
    for op, run, truth, slack in [
        ("quantize_rows", quantize_rows, lambda: x[some].double(), DIVIDED),
        ("add_rms_norm_fp8", lambda x: add_rms_norm_fp8(x, residual, weight, EPS)[0],
         lambda: norm_truth((x + residual)[some], weight), NORMED),
        ("swiglu_fp8", lambda x: swiglu_fp8(x[:, : width // 2 * 2]),
         lambda: swiglu_truth(x[some, : width // 2 * 2]), GATED),
    ]:  # fmt: skip
        reason = ops.available(op, "cuda", torch.bfloat16).get(backend, "no such kernel")
        if reason is not None:
            refused.append(reason)
            continue
        with ops.use(backend, op):
            got, again = run(x), run(x)
        assert torch.equal(got.data.view(torch.uint8), again.data.view(torch.uint8))
        assert torch.equal(got.scale_T1, again.scale_T1)
        check(QuantTensor(got.data.view(torch.uint8)[some].view(got.data.dtype),
                          got.scale_T1[some]), truth(), slack)  # fmt: skip
    if len(refused) == 3:
        pytest.skip("; ".join(refused))


@pytest.mark.gpu
def test_the_cast_of_the_hardware():
    """Every bf16 number up to 448 in rows whose scale is 1, against torch's own cast."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = bits[bits.float().abs() <= 448]
    values = values[: len(values) // 64 * 64].view(64, -1)
    x = torch.cat([torch.full((64, 1), 448.0, dtype=torch.bfloat16), values], 1)
    with ops.use("triton"):
        got = quantize_rows(x.cuda())
    assert (got.scale_T1 == 1).all()
    assert torch.equal(got.data.cpu().float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.gpu
def test_offsets_past_two_billion():
    gate_up = torch.zeros(160_000, 28_672, dtype=torch.bfloat16, device="cuda")
    gate_up[-1] = on_gpu(1, 28_672)[0]
    with ops.use("triton"):
        got = swiglu_fp8(gate_up)  # 2.3e9 elements out, 4.6e9 in
        alone = swiglu_fp8(gate_up[-1:].clone())
    assert torch.equal(got.data[-1:].float(), alone.data.float())
    assert torch.equal(got.scale_T1[-1:], alone.scale_T1) and alone.scale_T1.item() != 1
    assert (got.scale_T1[:-1] == 1).all()
    del got
    with ops.use("triton"):
        wide = quantize_rows(gate_up)
        assert torch.equal(wide.data[-1].float(), quantize_rows(gate_up[-1:]).data[0].float())
        del wide
        norm, r = add_rms_norm_fp8(gate_up, gate_up, on_gpu(1, 28_672)[0], EPS)
    assert torch.equal(r[-1], gate_up[-1] + gate_up[-1])
    check(QuantTensor(norm.data[-1:], norm.scale_T1[-1:]),
          norm_truth(r[-1:], on_gpu(1, 28_672)[0]), NORMED)  # fmt: skip
