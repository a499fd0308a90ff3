"""What every measurement needs: ceilings of the same run, floating-point work, and result rows."""

from __future__ import annotations

import datetime
import json
import statistics
from pathlib import Path

from llm2vec_fast.doctor import machine
from llm2vec_fast.model.work import forward_flop, matmul_rate, seconds_of

__all__ = ["forward_flop", "matmul_rate", "median", "seconds_of", "write_rows"]

RESULTS = Path(__file__).parent / "results"


def median(values: list[float]) -> float:
    return statistics.median(values)


def write_rows(name: str, rows: list[dict], directory: Path = RESULTS) -> Path:
    """Writes rows as JSON with the machine, the versions and the time beside them."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "utc": now, "rows": rows}, indent=1) + "\n")
    return path
