"""One operation against its rivals in one run: the frame of every bench_<op>.py.

    python -m benchmarks.bench_swiglu --minutes 1 --out DIR

A `Case` is one operation at one shape. Rivals take turns on the same random inputs, of which there
are enough sets to pass the L2 cache; each row has the median with p20 and p80, the traffic or work
that the operation cannot avoid (each input read once, each output written once) over that time, the
share of the copy or matmul rate of the same run, and the peak memory above the inputs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import RESULTS, write_rows
from llm2vec_fast import ops

Inputs = tuple  # of tensors and whatever else the operation takes
Prepare = Callable[[Inputs], Callable[[], object]]


@dataclass
class Case:
    """One operation at one shape.

    make:    fresh random inputs on the device; called once for each set
    rivals:  name -> prepare; prepare(inputs) gives the function without arguments that is timed.
             A rival whose package is absent is left out by whoever builds the case (`importable`)
    bytes:   traffic that cannot be avoided, in bytes; 0 if work is the limit
    flop:    floating-point operations that cannot be avoided; 0 if traffic is the limit
    """

    op: str
    what: str  # forward | backward | forward+backward
    shape: str
    dtype: torch.dtype
    make: Callable[[], Inputs]
    rivals: dict[str, Prepare]
    bytes: float = 0
    flop: float = 0
    notes: dict[str, str] = field(default_factory=dict)


def forward(function: Callable) -> Prepare:
    """Times function(*inputs) without gradients."""

    def prepare(inputs: Inputs):
        detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]

        def run():
            with torch.no_grad():
                return function(*detached)

        return run

    return prepare


def backward(function: Callable) -> Prepare:
    """Times the backward pass alone, again and again on one graph."""

    def prepare(inputs: Inputs):
        outputs, leaves, weights = _graph(function, inputs)
        return lambda: torch.autograd.grad(outputs, leaves, weights, retain_graph=True)

    return prepare


def both(function: Callable) -> Prepare:
    """Times forward and backward together."""

    def prepare(inputs: Inputs):
        return lambda: torch.autograd.grad(*_graph(function, inputs, fixed=True))

    return prepare


def _graph(function, inputs, fixed=False):
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.ones_like(y) if fixed else torch.randn_like(y) for y in outputs]
    return outputs, leaves, weights


def of_backends(
    op: str, function: Callable, device: str, dtype: torch.dtype
) -> dict[str, Callable]:
    """{"ours NAME": function} for each backend of `op` that can run here, each forced.

    On meta tensors that is Triton alone, whose launches `benchmarks.cross_compile` records there.
    """

    def forced(name: str) -> Callable:
        def run(*inputs):
            with ops.use(name, op):
                return function(*inputs)

        return run

    reasons = {"triton": None} if device == "meta" else ops.available(op, device, dtype)
    names = [name for name, reason in reasons.items() if reason is None]
    return {f"ours {name}": forced(name) for name in names}


def importable(**loaders: Callable[[], Callable]) -> dict[str, Callable]:
    """The rivals whose packages can be imported here; `loaders` import when called."""
    found = {}
    for name, load in loaders.items():
        try:
            found[name] = load()
        except (ImportError, OSError, RuntimeError, AttributeError):
            continue
    return found


@dataclass
class Ceilings:
    """Rates of this run that shares are taken of: bytes and floating-point operations a second."""

    copy: float
    matmul: dict[torch.dtype, float]


def ceilings(device: str, dtypes: Iterable[torch.dtype], seconds: float = 1.0) -> Ceilings:
    """The copy rate (read + write) and the matmul rate of random data, each measured here."""
    cuda = device == "cuda"
    x = torch.randn(1 << (28 if cuda else 24), device=device)
    y = torch.empty_like(x)
    copy = 2 * x.numel() * x.element_size() / _median_seconds([lambda: y.copy_(x)], device, seconds)
    matmul, side = {}, 8192 if cuda else 1024
    for dtype in dict.fromkeys(dtypes):
        a = torch.randn(side, side, device=device).to(dtype)
        b = torch.randn(side, side, device=device).to(dtype)
        matmul[dtype] = 2 * side**3 / _median_seconds([lambda a=a, b=b: a @ b], device, seconds)
    return Ceilings(copy, matmul)


def _median_seconds(runs, device, seconds) -> float:
    times = _times(runs, device, seconds)
    return times[len(times) // 2]


def _times(runs: list[Callable], device: str, seconds: float, most: int = 200) -> list[float]:
    """Sorted seconds of single calls, taken in turn from `runs`, for about `seconds` in all."""
    for run in runs[:2]:
        run()
    began, times = time.perf_counter(), []
    while len(times) < 5 or (time.perf_counter() - began < seconds and len(times) < most):
        times += _timed(runs, device)
    return sorted(times)


def _timed(runs: list[Callable], device: str) -> list[float]:
    if device != "cuda":
        times = []
        for run in runs:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    torch.cuda.synchronize()
    # The GPU waits until all launches are queued, half a millisecond for each run: gaps of the host
    # are not the kernel's.
    torch.cuda._sleep(1_000_000 * (len(runs) + 1))
    events[0].record()
    for run, event in zip(runs, events[1:], strict=True):
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def run_case(case: Case, device: str, rates: Ceilings, seconds: float = 1.0) -> list[dict]:
    """A row for each rival; a rival that fails gets a row with its error instead of a time."""
    sets = [case.make() for _ in range(_sets_past_cache(case.make(), device))]
    if any("compile" in name for name in case.rivals):
        # After 8 recompilations of one function dynamo quietly stays eager: a straw man.
        torch.compiler.reset()
    rows, turns = [], {}
    for name, prepare in case.rivals.items():
        row = {"op": case.op, "what": case.what, "shape": case.shape, "backend": name}
        rows.append(row | {"dtype": str(case.dtype).removeprefix("torch.")})
        try:
            turns[name] = [prepare(inputs) for inputs in sets]
            rows[-1]["peak_mb"] = _peak_mb(turns[name][0], device)
        except Exception as error:
            turns.pop(name, None)
            rows[-1]["error"] = f"{type(error).__name__}: {error}"[:200]
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(3):  # rivals in turn: a slow moment of the machine hits them all
        for name, runs in turns.items():
            times[name] += _times(runs, device, seconds / 3 / len(turns))
    for row in rows:
        if row["backend"] in times:
            row |= _figures(case, sorted(times[row["backend"]]), rates)
    return rows


def _figures(case: Case, times: list[float], rates: Ceilings) -> dict:
    middle = times[len(times) // 2]
    row = {"ms": 1e3 * middle, "p20": 1e3 * times[len(times) // 5]}
    row |= {"p80": 1e3 * times[len(times) * 4 // 5], "runs": len(times)}
    if case.bytes:
        row |= {"gb_per_s": case.bytes / middle / 1e9, "of_copy": case.bytes / middle / rates.copy}
    if case.flop:
        rate = case.flop / middle
        row |= {"tflop_per_s": rate / 1e12, "of_matmul": rate / rates.matmul[case.dtype]}
    return row | case.notes


def _sets_past_cache(inputs: Inputs, device: str) -> int:
    """How many sets of inputs pass the L2 cache (60 MB on Hopper) twice over; at most 8."""
    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    return min(8, math.ceil(120e6 / max(size, 1))) if device == "cuda" else 2


def _peak_mb(run: Callable, device: str) -> float | None:
    if device != "cuda":
        run()
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def run_cases(cases: Iterator[Case], device: str, until: float, out: Path, name: str) -> list[dict]:
    """Runs cases until `until` (time.perf_counter); the file is written anew after each."""
    rows: list[dict] = []
    rates = None
    for case in cases:
        if time.perf_counter() > until:
            rows.append({"op": case.op, "note": "stopped here: the time was up"})
            break
        if rates is None or case.dtype not in rates.matmul:
            known = set(rates.matmul) if rates else set()
            rates = ceilings(device, known | {case.dtype})
        left = until - time.perf_counter()
        new = run_case(case, device, rates, seconds=min(1.0, max(0.1, left / 10)))
        rows += new
        for row in new:
            print(_line(row), flush=True)
        write_rows(name, [_rates_row(rates), *rows], out)
        gc.collect()
    return rows


def _rates_row(rates: Ceilings) -> dict:
    matmul = {str(k).removeprefix("torch."): v / 1e12 for k, v in rates.matmul.items()}
    return {"ceiling": "this run", "copy_gb_per_s": rates.copy / 1e9, "matmul_tflop_per_s": matmul}


def _line(row: dict) -> str:
    head = f"{row['op']:18} {row['what']:17} {row['shape']:28} {row['dtype']:9} {row['backend']:14}"
    if "error" in row:
        return f"{head} {row['error']}"
    rate = f"{row['gb_per_s']:8.1f} GB/s {row['of_copy']:6.1%}" if "gb_per_s" in row else ""
    if "tflop_per_s" in row:
        rate += f"{row['tflop_per_s']:8.2f} TFLOP/s {row['of_matmul']:6.1%}"
    peak = "" if row.get("peak_mb") is None else f" {row['peak_mb']:9.1f} MB"
    return f"{head} {row['ms']:9.4f} ms {rate}{peak}"


def main(name: str, cases: Callable[[str], Iterator[Case]]) -> None:
    """The command line of one bench_<op>.py."""
    parser = argparse.ArgumentParser(description=f"{name}: ours and its rivals in one run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    until = time.perf_counter() + 60 * chosen.minutes
    run_cases(cases(chosen.device), chosen.device, until, chosen.out, f"{name}-{chosen.device}")
