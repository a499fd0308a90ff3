"""The CUDA C++ kernels against formulas in fp64: emulated on the CPU, and on a GPU where one is.

The emulation (csrc/emulate.h) runs the kernels' own source and the real checks and outputs of
library.cpp as CPU operators. How the library is built and loaded is in test_cuda_build.py.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from llm2vec_fast.ops import _cuda, add_rms_norm_ref, pool_ref, swiglu_ref
from llm2vec_fast.vectors import finish

CSRC = Path(__file__).parents[2] / "csrc"
EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E4M3 = torch.float8_e4m3fn
# One block, warps that are not full, no whole pack, and rows beyond what registers hold.
WIDTHS = [1, 8, 37, 252, 507, 2056]
MODES = ("mean", "weighted_mean", "last", "first")
SPANS = [(0, 1), (1, 4), (6, 7), (7, 44), (50, 302), (302, 1040), (1041, 1042)]
TOKENS = 1050
ORDERS = ("backward", "1", "2")


class Emulation(NamedTuple):
    command: list  # that compiles, without files
    library: Path


@pytest.fixture(scope="session")
def emulation(tmp_path_factory) -> Emulation:
    """csrc/ compiled for the CPU; needs the CUDA toolkit's headers for the half types."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    torch_root = Path(torch.__file__).parent
    command = [  # with C++ nvcc only adds its headers to what the host compiler gets
        nvcc, "-std=c++17", "-O1", "-Xcompiler=-fPIC,-fno-strict-aliasing,-ffp-contract=off",
        "-DLLM2VEC_FAST_EMULATE", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL",
        "-isystem", torch_root / "include",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("emulation")
    names = ["library.cpp", *sorted(path.name for path in CSRC.glob("*.cu"))]
    running = [
        subprocess.Popen([*command, "-x", "c++", "-c", name, "-o", folder / f"{name}.o"], cwd=CSRC)
        for name in names
    ]
    assert [process.wait() for process in running] == [0] * len(names)
    library = folder / "emulated.so"
    objects = [folder / f"{name}.o" for name in names]
    libraries = ["-L", torch_root / "lib", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-shared", *objects, *libraries, "-o", library], check=True)
    return Emulation(command, library)


@pytest.fixture(scope="session")
def emulated_operators(emulation):
    return _cuda.load(emulation.library, "llm2vec_fast_emulated")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """Where the tests' tensors lie; on the CPU the functions of _cuda call the emulation."""
    if request.param == "cuda":
        _cuda.load()
        return "cuda"
    operators = request.getfixturevalue("emulated_operators")
    monkeypatch.setattr(_cuda, "load", lambda: operators)
    monkeypatch.setattr(_cuda, "_DEVICES", ("cpu",))
    return "cpu"


@pytest.fixture
def in_every_order(device, monkeypatch):
    """in_every_order(run): the same bits whatever order the threads run in (on a GPU: again)."""

    def check(run):
        want = run()
        for order in ORDERS:
            monkeypatch.setenv("LLM2VEC_FAST_EMULATE_ORDER", order)
            for again, first in zip(run(), want, strict=True):
                assert torch.equal(bits(again), bits(first))
        monkeypatch.delenv("LLM2VEC_FAST_EMULATE_ORDER")

    return check


def bits(x):
    return x.contiguous().view(torch.uint8)


def draw(shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    noise = torch.Generator().manual_seed(seed)
    wide = scale * torch.randn(shape, generator=noise, dtype=torch.float64)
    return wide.to(dtype).to(device)


def misaligned(x):
    """Equal to x, but neither its start nor its rows are aligned, and NaN lies around it."""
    room = torch.full((x.shape[0] + 1, x.shape[1] + 3), float("nan"), dtype=x.dtype)
    return room.to(x.device)[1:, 1:-2].copy_(x)


def in_wider_rows(x):
    """Equal to x, aligned, in rows that lie apart: a view of a wider matrix."""
    room = torch.full((x.shape[0], 2 * x.shape[1] + 8), float("nan"), dtype=x.dtype)
    return room.to(x.device)[:, : x.shape[1]].copy_(x)


LAYOUTS = {"contiguous": torch.clone, "misaligned": misaligned, "wider rows": in_wider_rows}


def norm_truth(summed, weight):
    wide = summed.double().cpu()
    rstd = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return wide * rstd * weight.double().cpu()


def swiglu_truth(gate_up):
    gate, up = gate_up.double().cpu().chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


def check_e4m3(data, scale, truth):
    """Row-wise: the largest value is 448 steps, every value the nearest that e4m3 has."""
    assert data.dtype == E4M3 and scale.dtype == torch.float32
    data, scale = data.cpu().double(), scale.cpu().double()
    assert data.shape == truth.shape and scale.shape == (*truth.shape[:-1], 1)
    torch.testing.assert_close(scale, truth.abs().amax(-1, keepdim=True) / 448, rtol=2e-6, atol=0.0)
    # Half a step of e4m3: 2^-4 of the value, or half of the smallest step, 2^-9.
    steps = (truth / scale).abs()
    allowed = torch.maximum(steps * 2**-4, torch.tensor(2**-10)) * (1 + 1e-5) + 1e-5
    assert (((data - truth / scale).abs() <= allowed) | (steps > 448)).all()
    assert (data[steps > 448].abs() == 448).all()


# ------------------------------------------------------------------------------- add_rms_norm


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(within_rule, device, dtype, width, layout):
    x, residual = (draw((6, width), dtype, device, seed) for seed in (0, 1))
    weight = 1 + draw((width,), dtype, device, 2) / 2
    y, r = _cuda.add_rms_norm(LAYOUTS[layout](x), LAYOUTS[layout](residual), weight, EPS)
    assert y.dtype == r.dtype == dtype
    assert torch.equal(r, x + residual)
    plain = (r * torch.rsqrt(r.square().mean(-1, keepdim=True) + EPS)) * weight
    within_rule(y.cpu(), plain.cpu(), norm_truth(r, weight))
    want, _ = add_rms_norm_ref(x, residual, weight, EPS)
    torch.testing.assert_close(y, want, rtol=8 * torch.finfo(dtype).eps, atol=0)

    y, r = _cuda.add_rms_norm(LAYOUTS[layout](x), None, weight, EPS)
    assert torch.equal(r, x)
    torch.testing.assert_close(
        y, add_rms_norm_ref(x, None, weight, EPS)[0], rtol=8 * torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_fp8(device, dtype, width, layout):
    x, residual = (draw((6, width), dtype, device, seed) for seed in (0, 1))
    x[3] = residual[3] = 0
    weight = 1 + draw((width,), dtype, device, 2) / 2
    data, scale, r = _cuda.add_rms_norm_fp8(
        LAYOUTS[layout](x), LAYOUTS[layout](residual), weight, EPS
    )
    assert torch.equal(r, x + residual)
    assert scale[3] == 1 and not data[3].float().any()
    full = [0, 1, 2, 4, 5]
    check_e4m3(data[full], scale[full], norm_truth(r, weight)[full])
    data, scale, r = _cuda.add_rms_norm_fp8(LAYOUTS[layout](x), None, weight, EPS)
    check_e4m3(data[full], scale[full], norm_truth(x, weight)[full])


@pytest.mark.parametrize("width", [4096, 8192, 16384, 16392])
def test_wide_rows(within_rule, device, width):
    x, residual = (draw((2, width), torch.bfloat16, device, seed) for seed in (0, 1))
    weight = 1 + draw((width,), torch.bfloat16, device, 2) / 2
    y, r = _cuda.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(r, x + residual)
    within_rule(y.cpu(), add_rms_norm_ref(x, residual, weight, EPS)[0].cpu(), norm_truth(r, weight))
    check_e4m3(*_cuda.add_rms_norm_fp8(x, residual, weight, EPS)[:2], norm_truth(r, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_a_weight_of_another_dtype(rounded_once, device, dtype, weight_dtype):
    x = draw((3, 264), dtype, device)
    weight = 1 + draw((264,), weight_dtype, device, 2) / 2
    truth = norm_truth(x, weight)
    rounded_once(_cuda.add_rms_norm(x, None, weight, EPS)[0].cpu(), truth)
    check_e4m3(*_cuda.add_rms_norm_fp8(x, None, weight, EPS)[:2], truth)


def test_leading_dimensions_and_no_rows(device):
    weight = torch.ones(8, device=device)
    x = draw((2, 3, 8), device=device)
    y, r = _cuda.add_rms_norm(x, x, weight, EPS)
    data, scale, _ = _cuda.add_rms_norm_fp8(x, None, weight, EPS)
    assert y.shape == r.shape == data.shape == x.shape and scale.shape == (2, 3, 1)
    assert _cuda.swiglu(x).shape == (2, 3, 4)
    none = x[:0]
    assert [t.shape for t in _cuda.add_rms_norm(none, none, weight, EPS)] == [none.shape] * 2
    assert _cuda.swiglu_fp8(none)[0].shape == (0, 3, 4)
    transposed = draw((8, 5), device=device).t()
    torch.testing.assert_close(
        _cuda.add_rms_norm(transposed, None, weight, EPS)[0],
        add_rms_norm_ref(transposed, None, weight, EPS)[0],
    )


# ------------------------------------------------------------------------------------- swiglu


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [*WIDTHS, 4104])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(within_rule, device, dtype, width, layout):
    gate_up = draw((3, 2 * width), dtype, device, scale=4.0)
    y = _cuda.swiglu(LAYOUTS[layout](gate_up))
    assert y.dtype == dtype
    gate, up = gate_up.chunk(2, -1)
    within_rule(y.cpu(), (torch.nn.functional.silu(gate) * up).cpu(), swiglu_truth(gate_up))
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    want = swiglu_ref(gate_up)
    torch.testing.assert_close(y, want, rtol=2 * limits.eps + 4e-6, atol=smallest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [*WIDTHS, 14336, 28672, 32776])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_fp8(device, dtype, width, layout):
    gate_up = draw((6 if width < 4096 else 1, 2 * width), dtype, device, scale=2.0)
    check_e4m3(*_cuda.swiglu_fp8(LAYOUTS[layout](gate_up)), swiglu_truth(gate_up))


def test_extreme_values(device):
    big = torch.tensor([[-200.0, 200.0, 0.0, -1e30, 3.0, 3.0, 3.0, 3.0]], device=device)
    torch.testing.assert_close(_cuda.swiglu(big).cpu(), swiglu_truth(big).float())
    for tiny in (1e-12, 1e-24, 1e-34, 1e-38):
        gate_up = torch.tensor([[40.0, 20.0, tiny, -tiny]], device=device)
        data, scale = _cuda.swiglu_fp8(gate_up)
        want = swiglu_truth(gate_up)
        torch.testing.assert_close(data.cpu().double() * scale.cpu(), want, rtol=2**-4, atol=1e-38)
    poisoned = draw((2, 512), torch.bfloat16, device)
    poisoned[0, 5] = float("nan")
    data, scale = _cuda.swiglu_fp8(poisoned)
    assert scale[0].isnan() and data[0].float().isnan().all()  # never lost in the maximum
    assert data[1].float().isfinite().all() and scale[1].isfinite()
    large = torch.full((1, 4096), 6e4, dtype=torch.float16, device=device)
    y, _ = _cuda.add_rms_norm(large, None, torch.ones_like(large[0]), EPS)
    assert torch.equal(y, torch.ones_like(y))


# --------------------------------------------------------------------------------------- pool


def spans_of(pairs, device="cpu", dtype=torch.int32):
    return torch.tensor(pairs, dtype=dtype, device=device)


def pool_truth(hidden, spans, mode, normalize=False):
    return pool_ref(hidden.double().cpu(), spans.cpu(), mode, normalize)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 37, 64, 507, 520])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool(device, dtype, mode, width, layout):
    hidden = draw((TOKENS, width), dtype, device)
    hidden[4:6] = hidden[44:50] = float("nan")  # between the spans
    for index, normalize in ((torch.int32, False), (torch.int64, True)):
        spans = spans_of(SPANS, device, index)
        got = _cuda.pool(LAYOUTS[layout](hidden), spans, mode, normalize)
        assert got.dtype == torch.float32
        want = pool_truth(hidden, spans, mode, normalize)
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("truncate_dim", [None, 1, 24, 37])
@pytest.mark.parametrize("mode", ["mean", "last"])
def test_stored_vectors_are_those_of_finish(device, mode, truncate_dim, normalize):
    hidden = draw((TOKENS, 40), torch.bfloat16, device)
    hidden[7:44] = 0  # a zero vector: scale 0, no bit set
    spans = spans_of(SPANS, device)
    options = (mode, normalize, truncate_dim)
    vectors, none = _cuda.pool_store(hidden, spans, *options, "float32")
    assert none is None and not vectors[3].any()
    want = torch.nn.functional.normalize if normalize else torch.clone
    whole = _cuda.pool(hidden, spans, mode)[:, :truncate_dim]
    torch.testing.assert_close(vectors, want(whole), rtol=2e-6, atol=0)
    for precision in ("float16", "int8", "binary"):
        got, scale = _cuda.pool_store(hidden, spans, *options, precision)
        want, want_scale = finish(vectors.cpu().numpy(), None, False, precision)
        np.testing.assert_array_equal(got.cpu().numpy(), want)
        assert (scale is None) == (want_scale is None)
        if scale is not None:
            np.testing.assert_array_equal(scale.cpu().numpy(), want_scale)


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_does_not_depend_on_its_neighbours(device, mode):
    hidden = draw((TOKENS, 40), torch.bfloat16, device)
    together = _cuda.pool(hidden, spans_of(SPANS, device), mode)
    for row, (start, end) in enumerate(SPANS):
        alone = _cuda.pool(hidden[start:end], spans_of([(0, end - start)], device), mode)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("mode", MODES)
def test_texts_of_every_kind_of_length(device, mode):
    """Lengths around the slice of 256 tokens, starts at every distance from its multiples."""
    lengths = [1, 255, 256, 257, 1, 511, 512, 513, *[3] * 90, 256, 256, 1, 1, 700]
    ends = np.cumsum(lengths)
    pairs = np.stack([ends - lengths, ends], 1).tolist()
    hidden = draw((int(ends[-1]), 8), torch.float32, device)
    got = _cuda.pool(hidden, spans_of(pairs, device), mode)
    want = pool_truth(hidden, spans_of(pairs), mode)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=2e-6)


def test_no_texts_and_no_tokens(device):
    hidden = draw((3, 7), torch.bfloat16, device)
    assert _cuda.pool(hidden, spans_of([], device).view(0, 2)).shape == (0, 7)
    assert not _cuda.pool(hidden, spans_of([(1, 1)], device), normalize=True).any()


# --------------------------------------------------------------------------- order of threads


@pytest.mark.parametrize("width", [40, 507, 2056])
def test_the_order_of_threads_changes_nothing(in_every_order, device, width):
    x, residual = (draw((5, width), torch.bfloat16, device, seed) for seed in (0, 1))
    weight = 1 + draw((width,), torch.bfloat16, device, 2) / 2
    gate_up = draw((5, 2 * width), torch.float16, device)
    in_every_order(lambda: _cuda.add_rms_norm(x, residual, weight, EPS))
    in_every_order(lambda: _cuda.add_rms_norm_fp8(x, residual, weight, EPS))
    in_every_order(lambda: (_cuda.swiglu(gate_up), *_cuda.swiglu_fp8(gate_up)))


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_threads_changes_no_vector(in_every_order, device, mode, precision):
    hidden = draw((TOKENS, 44), torch.bfloat16, device)
    spans = spans_of(SPANS, device)
    in_every_order(
        lambda: [
            t for t in _cuda.pool_store(hidden, spans, mode, True, 41, precision) if t is not None
        ]
    )


# ------------------------------------------------------------------------------------- errors


def test_wrong_arguments_are_named(device):
    x, weight = torch.zeros(4, 8, device=device), torch.zeros(8, device=device)
    spans = spans_of([(0, 4)], device)
    for told, call in {
        r"residual is \(4, 6\), x is \(4, 8\)": lambda: _cuda.add_rms_norm(
            x, x[:, :6], weight, EPS
        ),
        r"weight is \(6\), x is \(4, 8\)": lambda: _cuda.add_rms_norm(x, x, weight[:6], EPS),
        "dtype of x or be float32": lambda: _cuda.load().rms_norm(x, weight.half(), EPS),
        "residual and x differ": lambda: _cuda.add_rms_norm(x, x.half(), weight, EPS),
        "float32, float16 and bfloat16": lambda: _cuda.swiglu(x.double()),
        r"even, got \(4, 7\)": lambda: _cuda.swiglu(x[:, :7]),
        "no columns": lambda: _cuda.swiglu(x[:, :0].reshape(4, 0)),
        "unknown mode 'median'": lambda: _cuda.pool(x, spans, "median"),
        "unknown precision 'int4'": lambda: _cuda.pool_store(x, spans, precision="int4"),
        "truncate_dim must be 1 to 8, got 9": lambda: _cuda.pool_store(x, spans, truncate_dim=9),
        "int32 or int64": lambda: _cuda.pool(x, spans.float()),
        r"contiguous \(B, 2\), got \(2\)": lambda: _cuda.pool(x, spans[0]),
    }.items():
        with pytest.raises(RuntimeError, match=told):
            call()


def test_schemas_and_fakes_fit_the_kernels(emulated_operators):
    """torch's own check: what the fake tells is what the kernel returns, and inputs stay alone."""
    x, weight = draw((3, 12), torch.bfloat16), torch.ones(12, dtype=torch.bfloat16)
    spans = spans_of([(0, 1), (1, 3)])
    for name, arguments in {
        "rms_norm": (x, weight, EPS),
        "add_rms_norm": (x, x.clone(), weight, EPS),
        "rms_norm_fp8": (x, weight, EPS),
        "add_rms_norm_fp8": (x, x.clone(), weight, EPS),
        "swiglu": (x,),
        "swiglu_fp8": (x,),
        "pool": (x, spans, "mean", True, 9, "binary"),
    }.items():
        torch.library.opcheck(
            getattr(emulated_operators, name).default,
            arguments,
            test_utils=("test_schema", "test_faketensor"),
        )
    for precision in ("float32", "float16", "int8"):
        torch.library.opcheck(
            emulated_operators.pool.default,
            (x, spans, "last", False, None, precision),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_quotients_are_rounded_like_divisions(emulation, tmp_path):
    source, program = tmp_path / "divide.cpp", tmp_path / "divide"
    source.write_text(DIVIDE)
    subprocess.run([*emulation.command, "-I", CSRC, source, "-o", program], check=True)
    assert subprocess.run([program]).returncode == 0


DIVIDE = """
#include "common.cuh"
int main() {
  std::mt19937 random(0);
  std::uniform_real_distribution<float> unit(-1, 1);
  for (int exponent = -140; exponent <= 127; ++exponent) {
    for (int row = 0; row < 20; ++row) {
      const float largest = std::ldexp(1 + std::abs(unit(random)) * 0.999f, exponent);
      const float slack = exponent < -80 ? 0x1p-20f : 0.0f;
      const llm2vec_fast::E4m3Row quantize(largest);
      for (int i = 0; i < 200; ++i) {
        // What e4m3 rounds to zero anyway may differ in a last bit that nobody sees.
        const float v = largest * std::ldexp(unit(random), -(i % 20));
        const float want = v / quantize.scale;
        const float error = std::abs(quantize(v) - want);
        if (!(error <= slack * std::abs(want)) && std::abs(want) > 0x1p-12f) return 1;
      }
    }
  }
}
"""


# ------------------------------------------------------------------------------------ only GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_sizes(within_rule, dtype):
    x, residual = (draw((4096, 4096), dtype, "cuda", seed) for seed in (0, 1))
    weight = 1 + draw((4096,), dtype, "cuda", 2) / 2
    y, r = _cuda.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(r, x + residual)
    within_rule(y.cpu(), add_rms_norm_ref(x, residual, weight, EPS)[0].cpu(), norm_truth(r, weight))
    check_e4m3(*_cuda.add_rms_norm_fp8(x, residual, weight, EPS)[:2], norm_truth(r, weight))
    gate_up = draw((1024, 28672), dtype, "cuda")
    within_rule(_cuda.swiglu(gate_up).cpu(), swiglu_ref(gate_up).cpu(), swiglu_truth(gate_up))
    check_e4m3(*_cuda.swiglu_fp8(gate_up), swiglu_truth(gate_up))
    hidden = draw((16384, 4096), dtype, "cuda")
    spans = spans_of([(0, 8192), (8192, 8200), (8300, 16384)], "cuda")
    for mode in MODES:
        got = _cuda.pool(hidden, spans, mode, normalize=True)
        assert torch.equal(got, _cuda.pool(hidden, spans, mode, normalize=True))
        want = pool_truth(hidden, spans, mode, normalize=True)
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
def test_offsets_beyond_2_to_31():
    rows = 2**31 // 28672 + 5
    gate_up = torch.empty(rows, 28672, dtype=torch.bfloat16, device="cuda")
    gate_up[-4:] = draw((4, 28672), torch.bfloat16, "cuda")
    assert torch.equal(_cuda.swiglu(gate_up)[-4:], _cuda.swiglu(gate_up[-4:]))
    assert torch.equal(
        bits(_cuda.swiglu_fp8(gate_up)[0][-4:]), bits(_cuda.swiglu_fp8(gate_up[-4:])[0])
    )
    weight = torch.ones(14336, dtype=torch.bfloat16, device="cuda")
    y, _ = _cuda.add_rms_norm(gate_up[:, :14336], None, weight, EPS)
    assert torch.equal(y[-4:], _cuda.add_rms_norm(gate_up[-4:, :14336], None, weight, EPS)[0])
    pooled = _cuda.pool(gate_up[:, :4096], spans_of([(rows - 4, rows)], "cuda"))
    assert torch.equal(pooled, _cuda.pool(gate_up[-4:, :4096], spans_of([(0, 4)], "cuda")))


@pytest.mark.gpu
def test_the_current_stream_is_used():
    x = draw((512, 4096), torch.bfloat16, "cuda")
    want = _cuda.swiglu(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a launch on any other stream would end the capture
        got = _cuda.swiglu(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
