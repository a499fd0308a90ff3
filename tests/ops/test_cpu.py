"""The CPU's C++ kernels against formulas in fp64, with each instruction set that runs here; views,
extremes, threads, and what the library refuses.

attention's own tests (masks, shapes, NaN) run the same kernel as backend `cpu`; rope's and the
others' as the backend that a CPU chooses. A library is loaded once: the other instruction sets run
this file again, in processes of their own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llm2vec_fast import ops
from llm2vec_fast.ops import _cpu, _library, add_rms_norm_ref, attention_ref, rope_ref_, swiglu_ref
from llm2vec_fast.ops.backend import Call, choose, chosen_for_gradients

if (reason := _cpu.refuses(Call("swiglu", "cpu", 0, torch.float32, forced=True))) is not None:
    pytest.skip(reason, allow_module_level=True)

ASKED = os.environ.get("LLM2VEC_FAST_ISA")
DTYPES = [torch.float32, torch.bfloat16]
# One number, less than a vector, whole vectors of every instruction set, and some more.
WIDTHS = [1, 3, 16, 64, 75, 576]
LENGTHS = (1, 2, 7, 33, 16, 15, 1, 250, 40)


@pytest.fixture(autouse=True)
def alone():
    """The kernels and nothing else; what they are to fill is NaN before."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with ops.use("cpu"), torch.no_grad():
        yield
    torch.use_deterministic_algorithms(before)


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    noise = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=noise, dtype=torch.float64)).to(dtype)


def wider(x):
    """Equal to x, in rows of a wider tensor, NaN around it."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype)
    return room[..., 2:-3].copy_(x)


@pytest.mark.skipif(ASKED is not None, reason="is one of them")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "plain"])
def test_other_instruction_sets(isa):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu and not place",
         __file__, Path(__file__).with_name("test_attention.py")],
        env={**os.environ, "LLM2VEC_FAST_ISA": isa}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


FLAGS = {"amx": "amx_bf16", "avx512": "avx512vl", "avx2": "avx2", "plain": ""}


def test_the_one_asked_for_runs():
    """Or the best, as far as the processor says that it has it."""
    told = Path("/proc/cpuinfo").read_text()
    if ASKED is not None:
        assert _cpu.load().isa() == ASKED or FLAGS[ASKED] not in told
    else:
        assert FLAGS[_cpu.load().isa()] in told


@pytest.fixture
def threads():
    """threads(n): torch's threads, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_rows_without_a_trace(threads, dtype):
    x, weight = draw(300, 576, dtype=dtype), draw(576, dtype=dtype, seed=2)
    qkv, at = draw(900, 96, dtype=dtype), torch.arange(900) % 64
    angle = torch.outer(torch.arange(64.0), 10_000.0 ** (-torch.arange(8) / 8))

    def everything():
        y, r = ops.add_rms_norm(x, x.flip(0), weight, 1e-5)
        return y, r, ops.swiglu(x), ops.rope_(qkv.clone(), at, angle.cos(), angle.sin(), 2, 2)

    threads(1)
    want = everything()
    for count in (2, 4, 7):
        threads(count)
        for one, other in zip(everything(), want, strict=True):
            assert torch.equal(one, other)


def test_operators_are_described_rightly(threads):
    """Schemas, fakes, what is written in place: torch's own checks."""
    x, tables = draw(5, 32), (torch.ones(8, 4), torch.zeros(8, 4))
    q, cu = draw(5, 2, 8), torch.tensor([0, 2, 5], dtype=torch.int32)
    operators = _cpu.load()
    for name, arguments in {
        "rms_norm": (x, draw(32), 1e-5),
        "add_rms_norm": (x, x, draw(32), 1e-5),
        "swiglu": (x,),
        "rope_": (x, torch.arange(5), *tables, 3),
        "attention": (q, q, q, cu, 3, False, None, 1.0, 512),
    }.items():
        found = torch.library.opcheck(getattr(operators, name).default, arguments)
        assert set(found.values()) == {"SUCCESS"}, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("layout", [torch.clone, wider])
def test_add_rms_norm(rounded_once, dtype, width, rows, layout):
    x, residual = draw(rows, width, dtype=dtype), draw(rows, width, dtype=dtype, seed=1)
    weight = 1 + draw(width, dtype=dtype, seed=2, scale=0.3)
    y, r = ops.add_rms_norm(layout(x), layout(residual), weight, 1e-5)
    assert torch.equal(r, x + residual) and y.dtype == dtype
    rounded_once(y, add_rms_norm_ref(r.double(), None, weight.double(), 1e-5)[0])
    alone, same = ops.add_rms_norm(layout(x), None, weight, 1e-5)
    rounded_once(alone, add_rms_norm_ref(x.double(), None, weight.double(), 1e-5)[0])
    assert torch.equal(same, x)


def test_a_weight_in_fp32_is_not_rounded(rounded_once):
    x, weight = draw(9, 70, dtype=torch.bfloat16), 1 + draw(70, seed=2)
    y, _ = ops.add_rms_norm(x, None, weight, 1e-5)
    rounded_once(y, add_rms_norm_ref(x.double(), None, weight.double(), 1e-5)[0])


def test_heads_are_normed_where_they_lie(rounded_once):
    qkv = draw(5, 3 * 24)
    heads = qkv.unflatten(1, (3, 24))[:, :2]
    y, _ = ops.add_rms_norm(heads, None, torch.ones(24), 1e-5)
    rounded_once(y, add_rms_norm_ref(heads.double(), None, torch.ones(24).double(), 1e-5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_swiglu(rounded_once, dtype, width, scale):
    gate_up = draw(37, 2 * width, dtype=dtype, scale=scale)
    exact = swiglu_ref(gate_up.double())
    rounded_once(ops.swiglu(gate_up), exact)
    assert torch.equal(ops.swiglu(wider(gate_up)), ops.swiglu(gate_up))


def test_swiglu_of_every_size_of_number():
    """The exponential: no overflow, nothing lost, NaN stays."""
    gate = torch.cat([torch.linspace(-120, 120, 100_001), torch.tensor([0.0, 3e38, -3e38])])
    got = ops.swiglu(torch.stack([gate, torch.ones_like(gate)], 1))[:, 0]
    exact = swiglu_ref(torch.stack([gate, torch.ones_like(gate)], 1).double())[:, 0]
    wrong = (got.double() - exact).abs()
    assert (wrong <= 4e-7 * exact.abs() + 1e-35).all()
    hurt = torch.tensor([[float("nan"), 1.0, 2.0, 1.0, float("nan"), 1.0]])
    assert ops.swiglu(hurt).isnan().tolist() == [[True, True, False]]


def test_rounding_to_bf16_is_that_of_torch():
    """Every pattern of 16 bits through the sum of the norm, with what lies between them."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x, other = bits[None], bits.roll(12_345)[None]
    _, r = ops.add_rms_norm(x, other, torch.ones(1 << 16).bfloat16(), 1e-5)
    want = x + other
    assert torch.equal(r.isnan(), want.isnan())
    tiny = want.abs() < torch.finfo(torch.bfloat16).tiny  # the processor's own rounding drops them
    assert (r[tiny].abs() <= want[tiny].abs()).all()
    assert torch.equal(r[~tiny & ~r.isnan()], want[~tiny & ~want.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [1, 4, 20, 32])
@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
def test_rope(rounded_once, dtype, half, positions):
    angle = torch.outer(torch.arange(64.0), 10_000.0 ** (-torch.arange(half) / half))
    tables = angle.cos(), angle.sin()
    qkv, at = draw(41, 4 * 2 * half, dtype=dtype), torch.randint(0, 64, (41,), dtype=positions)
    exact = rope_ref_(qkv.double(), at, *(t.double() for t in tables), 2, 1)
    got = wider(qkv)
    assert ops.rope_(got, at, *tables, 2, 1) is got
    rounded_once(got, exact)
    assert torch.equal(got[:, 3 * 2 * half :], qkv[:, 3 * 2 * half :])  # values stay
    room = got._base
    assert room[:, :2].isnan().all() and room[:, -3:].isnan().all()
    both = torch.cat(tables, -1).chunk(2, -1)  # tables whose rows lie apart
    _cpu.rotate_(got, at, *both, 2, 1, inverse=True)
    torch.testing.assert_close(got, qkv, rtol=0, atol=0.06 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_turns_gradients_back(within_rule, values_and_gradients, dtype):
    angle = torch.outer(torch.arange(64.0), 10_000.0 ** (-torch.arange(8) / 8))
    qkv, at = draw(9, 96, dtype=dtype), torch.arange(9)
    tables = angle.cos(), angle.sin()
    with torch.enable_grad():
        ours = values_and_gradients(lambda x: ops.rope_(x * 1, at, *tables, 2, 2), [qkv])
        with ops.use("reference"):
            run = lambda x: ops.rope_(x * 1, at, *(t.to(x.dtype) for t in tables), 2, 2)  # noqa: E731
            exact = values_and_gradients(run, [qkv], torch.float64)
            plain = values_and_gradients(run, [qkv])
    for one, other, true in zip(ours, plain, exact, strict=True):
        within_rule(one[0], other[0], true[0])


def test_a_position_outside_of_the_tables_is_refused():
    qkv, tables = torch.zeros(2, 12), (torch.ones(8, 2), torch.zeros(8, 2))
    for wrong in (8, -1):
        with pytest.raises(RuntimeError, match=f"position {wrong} is outside of tables of 8"):
            ops.rope_(qkv, torch.tensor([0, wrong]), *tables, 1, 1)
    with pytest.raises(RuntimeError, match=r"rows of qkv share memory"):
        ops.rope_(qkv[:1].expand(2, -1), torch.tensor([0, 1]), *tables, 1, 1)


def packed(lengths, n, k, size, dtype):
    qkv = draw(sum(lengths), (n + 2 * k) * size, dtype=dtype, scale=2.0)
    cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    return ops.split_heads(qkv, n, k), cu


MASKS = [*itertools.product([False, True], [None, 1, 20])]


@pytest.fixture(params=["ours", "by length"])
def longest(request, monkeypatch):
    """All texts through our kernel, or some of them through torch's."""
    most = 1 << 40 if request.param == "ours" else 16
    monkeypatch.setattr(_cpu, "longest", lambda dtype: most)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal, window", MASKS)
@pytest.mark.parametrize("heads, size", [((6, 2), 64), ((3, 3), 20), ((5, 1), 72)])
def test_attention(longest, within_rule, dtype, causal, window, heads, size):
    qkv, cu = packed(LENGTHS, *heads, size, dtype)
    got = ops.attention(*qkv, cu, max(LENGTHS), causal=causal, window=window)
    options = {"causal": causal, "window": window}
    exact = attention_ref(*(x.double() for x in qkv), cu, max(LENGTHS), **options)
    # attention_ref computes in fp32 and rounds once, as the kernel does.
    within_rule(got, attention_ref(*qkv, cu, max(LENGTHS), **options), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_text_gets_does_not_depend_on_its_batch_or_on_threads(longest, threads, dtype):
    (q, k, v), cu = packed((1100, *LENGTHS), 6, 2, 64, dtype)
    threads(4)
    whole = ops.attention(q, k, v, cu, 1100)
    for count in (1, 3):
        threads(count)
        assert torch.equal(ops.attention(q, k, v, cu, 1100), whole)
    for start, end in itertools.pairwise(cu.tolist()):
        text = slice(start, end)
        own = torch.tensor([0, end - start], dtype=torch.int32)
        assert torch.equal(ops.attention(q[text], k[text], v[text], own, end - start), whole[text])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 128, 200])
@pytest.mark.parametrize("scale", [0.3, 0.0, -0.5])
def test_sizes_and_scales(within_rule, dtype, size, scale):
    (q, k, v), cu = packed((9, 40), 2, 1, size, dtype)
    k, v = k.expand(-1, 2, -1), v.expand(-1, 2, -1)  # heads that share their memory
    got = ops.attention(q, k, v, cu, 40, scale=scale)
    exact = attention_ref(q.double(), k.double(), v.double(), cu, 40, scale=scale)
    within_rule(got, attention_ref(q, k, v, cu, 40, scale=scale), exact)


def test_nothing_is_written_beside(longest):
    """Rows past the last text stay as they are, whatever stands there."""
    (q, k, v), cu = packed((20, 4, 6), 2, 1, 8, torch.float32)
    cu = cu[:-1]
    want = ops.attention(q[:24], k[:24], v[:24], cu, 20)
    for x in (q, k, v):
        x[24:] = float("nan")
    got = ops.attention(q, k, v, cu, 20)
    assert got.shape == q.shape and torch.equal(got[:24], want) and got[24:].isnan().all()
    assert ops.attention(q, k, v, cu[:1], 0).shape == q.shape


def test_an_overflow_is_seen(longest):
    """A score of infinity makes its row NaN, and no other."""
    (q, k, v), cu = packed((4, 20), 2, 1, 8, torch.float32)
    q, k = q.clone(), k.clone()
    q[7, 1, 0], k[4:, 0, 0] = 3e38, 40.0
    hurt = ops.attention(q, k, v, cu, 20).isnan().all(-1)
    assert hurt.nonzero().tolist() == [[7, 1]]


def test_wrong_bounds_are_refused():
    q, k, v = (torch.zeros(5, 1, 8) for _ in range(3))
    for wrong in ([0, 3, 3], [0, 9], [2, 1]):
        with pytest.raises(RuntimeError, match=r"attention: text .* of 5 tokens"):
            ops.attention(q, k, v, torch.tensor(wrong, dtype=torch.int32), 9)
    with pytest.raises(RuntimeError, match=r"text 1 has 3 tokens, more than max_seqlen, 2"):
        ops.attention(q, k, v, torch.tensor([0, 2, 5], dtype=torch.int32), 2)


def test_a_huge_window_is_none():
    (q, k, v), cu = packed((20, 4), 2, 1, 8, torch.float32)
    for causal in (False, True):
        want = ops.attention(q, k, v, cu, 20, causal=causal)
        got = ops.attention(q, k, v, cu, 20, causal=causal, window=sys.maxsize)
        assert torch.equal(got, want)


def test_where_it_runs():
    with ops.use(None):
        fast = _cpu.load().isa() != "plain"
        for op in _cpu.OPS:
            for dtype in DTYPES:
                assert (choose(op, torch.zeros(3, 2, 4, dtype=dtype)) == "cpu") == fast
            assert choose(op, torch.zeros(3, 2, 4, dtype=torch.float16)) != "cpu"
            with torch.enable_grad():  # rope turns gradients back
                trains = choose(op, torch.zeros(3, 2, 4, requires_grad=True)) == "cpu"
                assert trains == (fast and op == "rope_")
            with chosen_for_gradients():
                assert (choose(op, torch.zeros(3, 2, 4)) == "cpu") == trains
        assert choose("attention", torch.zeros(3, 2, 4), dropout=True) != "cpu"


def test_refusals(monkeypatch, tmp_path):
    fits = Call("swiglu", "cpu", 0, torch.float32, forced=True)
    for told, change in {
        "no kernel for pool": {"op": "pool"},
        "on a CPU": {"device": "cuda"},
        "not torch.float16": {"dtype": torch.float16},
        "inference only": {"needs_grad": True},
    }.items():
        assert told in _cpu.refuses(fits._replace(**change))
    load = _cpu.load.__wrapped__
    monkeypatch.setattr(_cpu, "LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.setattr(_cpu, "load", load)
    assert "not built" in _cpu.refuses(fits)
    (tmp_path / "_cpu.so").write_text("no library")
    assert "does not load" in _cpu.refuses(fits)


@pytest.mark.parametrize("what", ["operators", "sources"])
def test_a_library_of_other_sources_is_told(monkeypatch, tmp_path, what):
    if what == "operators":
        monkeypatch.setattr(_cpu, "_FAKES", {"of_tomorrow": lambda x: x})
    else:
        (tmp_path / "checks.h").write_text("other")
        monkeypatch.setattr(_library, "CSRC", tmp_path)
    monkeypatch.setattr(_library, "_loaded", {})
    with pytest.raises(RuntimeError, match=r"built from other sources than csrc/ .*=1 python"):
        _cpu.load.__wrapped__()
