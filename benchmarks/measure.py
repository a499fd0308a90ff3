"""What every measurement needs: ceilings of the same run, floating-point work, and result rows."""

from __future__ import annotations

import datetime
import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llm2vec_fast.doctor import machine
from llm2vec_fast.model.work import forward_flop, matmul_rate, seconds_of

__all__ = [
    "OutOfTime",
    "datasheet_rate",
    "distance",
    "ending",
    "forward_flop",
    "matmul_rate",
    "median",
    "seconds_of",
    "write_rows",
]

RESULTS = Path(__file__).parent / "results"
# FLOP/s of dense bf16 products by NVIDIA's datasheets, found by a part of the device's name (that
# of H100 SXM5 is "NVIDIA H100 80GB HBM3"). The PCIe and NVL cards are slower ones.
DATASHEET = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}
WITH_FP8 = ("H100", "H200")  # twice as fast in it


def median(values: list[float]) -> float:
    return statistics.median(values)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest 1 - cosine between two sets of vectors."""
    a, b = (x.astype(np.float64) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((1 - (a * b).sum(axis=1) / norms).max())


def datasheet_rate(gpu: str, dtype: str) -> float | None:
    """FLOP/s that the datasheet promises for a device name and "bfloat16", "float16" or "fp8";
    None where none is known.
    """
    rate = next(
        (rate for name, rate in DATASHEET.items() if name in gpu and "NVL" not in gpu), None
    )
    if dtype == "fp8":
        return 2 * rate if rate and any(name in gpu for name in WITH_FP8) else None
    return rate if dtype in ("bfloat16", "float16") else None


def write_rows(name: str, rows: list[dict], directory: Path = RESULTS) -> Path:
    """Writes rows as JSON with the machine, the versions and the time beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = directory / f"{name}.json"
    text = json.dumps({"machine": machine(), "utc": now, "rows": rows}, indent=1) + "\n"
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)  # a run that is cut while it writes keeps the rows it had
    return path


class OutOfTime(BaseException):
    """The time is over. Not an Exception: nothing that a rival runs may swallow it."""


@contextmanager
def ending(at: float) -> Iterator[None]:
    """Raises OutOfTime inside, whatever runs there, when time.perf_counter() reaches `at`."""

    def stop(*_):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, at - time.perf_counter()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
