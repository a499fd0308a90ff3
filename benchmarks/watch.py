"""A command in a process of its own, looked at from outside: memory, open files, seconds."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
EVERY = 0.1  # seconds between looks


def watch(command: Sequence[str]) -> tuple[dict, dict, np.ndarray]:
    """Runs a command that prints JSON. Linux only.

    returns: (what it printed, figures of the process, (N, 2) seconds and resident MB over time)
    raises:  RuntimeError with the last lines of its errors
    """
    looks: list[tuple[float, dict[str, int], int]] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT)
        try:
            while process.poll() is None:
                looks += [(time.perf_counter() - began, *seen) for seen in _look(process.pid)]
                time.sleep(EVERY)
            seconds = time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
        told = [file.seek(0) or file.read() for file in (out, err)]
    if process.returncode or not looks:
        why = f"ended with {process.returncode}: {told[1][-2000:]}"
        raise RuntimeError(f"{' '.join(command)} {why}")
    memory = np.array([(at, kb["VmRSS"] / 1024) for at, kb, _ in looks])
    tenths = [part for part in np.array_split(memory[:, 1], 10) if len(part)]
    return (
        json.loads(told[0]),
        {
            "process_s": seconds,
            # Not by getrusage: there a child begins with the peak of who started it.
            "peak_mb": max(kb["VmHWM"] for _, kb, _ in looks) / 1024,
            "resident_mb_by_tenths": [round(float(part.max()), 1) for part in tenths],
            "files_open": max(files for *_, files in looks),
        },
        memory,
    )


def _look(pid: int) -> list[tuple[dict[str, int], int]]:
    """[(kB of memory by name, open files)] of a process; [] once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return []
    kb = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in status.splitlines())
        if name in ("VmRSS", "VmHWM")
    }
    return [(kb, files)] if len(kb) == 2 else []
