"""Everything against its rivals, in one command that ends inside its budget.

    python -m benchmarks.run --out DIR --minutes 8

Texts to vectors (bench_encode) come first, with the largest share; then each bench_<op>.py that
has `cases(device)`, then the start of a process (bench_startup) and, on a GPU, whole training steps
(bench_train). Each runs in a process of its own: an illegal memory access ends one measurement, not
all. What is there is written to DIR/kernels-<device>.json after each, so that a cut run keeps what
it has. The time that is left is shared among what is left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import RESULTS, write_rows

FOLDER = Path(__file__).parent
# What decides most about speed is measured first; whatever is not named here follows.
FIRST = ("encode", "attention", "masked_token_loss", "add_rms_norm", "swiglu", "rope", "pool")
LAST = ("startup", "train")  # after the operations; they have no cases
ON_GPU = {"train"}  # alone
SHARES = {"encode": 12, "startup": 2, "train": 4}  # of the time, where an operation has one
GRACE = 45.0  # seconds: imports and the first compilations, before a process is ended by force


def names(asked: list[str], device: str) -> list[str]:
    """What to measure, the most important first, and what is in LAST at the end.

    raises: SystemExit if something is asked for that no bench_<name>.py measures on this device
    """
    found = []
    for path in FOLDER.glob("bench_*.py"):
        if "def cases(" in path.read_text(encoding="utf-8"):
            found.append(path.stem.removeprefix("bench_"))
    on_gpu = device.startswith("cuda")
    there = [name for name in LAST if (FOLDER / f"bench_{name}.py").exists()]
    found += [name for name in there if name not in found and (on_gpu or name not in ON_GPU)]
    if unknown := set(asked) - set(found):
        raise SystemExit(f"no cases for {', '.join(sorted(unknown))}; there are {sorted(found)}")
    rank = {name: n for n, name in enumerate(FIRST)}
    rank |= {name: len(FIRST) + 1 + n for n, name in enumerate(LAST)}
    return sorted(asked or found, key=lambda name: (rank.get(name, len(FIRST)), name))


def measure(name: str, device: str, seconds: float, limit: float) -> list[dict]:
    """Rows of one operation, asked to take `seconds`, ended by force after `limit` seconds; if it
    fails or overruns, what it had and a row saying so.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--device", device]
        command += ["--minutes", f"{seconds / 60:.3f}", "--out", folder]
        failure = None
        try:
            done = subprocess.run(command, timeout=limit, stderr=subprocess.PIPE)
            if done.returncode:
                last = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
                failure = f"exit {done.returncode}: {' | '.join(last)}"[:500]
        except subprocess.TimeoutExpired:
            failure = f"ended by force after {limit:.0f} s"
        rows = []
        for path in Path(folder).glob("*.json"):
            rows += json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows + ([{"op": name, "failed": failure}] if failure else [])


def main() -> None:
    parser = argparse.ArgumentParser(description="all operations against their rivals")
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args()
    until = time.perf_counter() + 60 * chosen.minutes
    todo, rows = names(chosen.ops, chosen.device), []
    for n, name in enumerate(todo):
        # A process overruns its share by its imports; that is taken off beforehand.
        left = until - time.perf_counter()
        shares = [SHARES.get(other, 1) for other in todo[n:]]
        share = left * shares[0] / sum(shares) - 10
        if share < 2:
            rows.append({"op": name, "failed": "not measured: the time was up"})
            continue
        print(f"== {name}: {share:.0f} s", flush=True)
        new = measure(name, chosen.device, share, min(left, share + GRACE))
        for row in new:
            if "failed" in row:
                print(row, flush=True)
        rows += new
        write_rows(f"kernels-{chosen.device}", rows, chosen.out)
    path = write_rows(f"kernels-{chosen.device}", rows, chosen.out)
    print(path)


if __name__ == "__main__":
    main()
