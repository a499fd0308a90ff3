"""The long run of the soak: a million short documents again and again, a fault every 30 s."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks import faults
from benchmarks.bench_scale import write_input
from benchmarks.faults import Job, recover, row_of, shards
from benchmarks.watch import _look

LONG_PER_SHARD = 16_384
EVERY = 30.0  # seconds between two faults
LOOK = 0.5  # seconds between two looks at memory
NEXT = ("truncated shard", "second writer", "kill -9", "orphaned parts", "flipped bit", "SIGTERM")


class Life:
    """One process of the long run, from its first shard on: what it used, second by second."""

    def __init__(self) -> None:
        self.looks: list[tuple[float, float, int]] = []  # seconds, MB, open files

    def look(self, pid: int, seconds: float) -> None:
        self.looks += [(seconds, kb["VmRSS"] / 1024, files) for kb, files in _look(pid)]

    def growth(self) -> tuple[float, int] | None:
        """MB and files gained from its second third to its last; None if it was short."""
        if len(self.looks) < 30:
            return None
        _, second, last = np.array_split(np.array(self.looks), 3)
        return (
            float(np.median(last[:, 1]) - np.median(second[:, 1])),
            int(last[:, 2].max() - second[:, 2].max()),
        )


class Long:
    """Jobs one after the other, a fault every 30 s until the time is over."""

    def __init__(self, job: Job, minutes: float, noise: random.Random, every: float = EVERY):
        self.job, self.noise, self.every = job, noise, every
        self.began = time.monotonic()
        self.stop, self.next = self.began + 60 * minutes, self.began + every
        self.kinds, self.faults = itertools.cycle(NEXT), Counter()
        self.lives: list[Life] = []
        self.times: list[float] = []

    def one_job(self, output: Path, disturbed: bool = True) -> None:
        """A job from its beginning to its end, over as many processes as it takes."""
        code = None
        while code != 0:
            self.lives.append(life := Life())
            before, began, first = shards(output), time.monotonic(), None
            process = self.job.start(output)
            while process.poll() is None:
                time.sleep(LOOK)
                now = time.monotonic()
                first = first or (now - began if shards(output) - before else None)
                if first:  # what is loaded before is no growth
                    life.look(process.pid, now - began)
                if disturbed and self.next <= now < self.stop and first:
                    self.harm(process, output)
                    self.next = max(self.next + self.every, time.monotonic())
            self.times += [first] if first and code is not None else []
            code = self.job.end(process, (0, -9, 143))
        if disturbed:
            recover(self.job, output, "--verify")

    def harm(self, process: subprocess.Popen, output: Path) -> None:
        kind = next(self.kinds)
        self.faults[kind] += 1
        if kind == "kill -9":
            faults.kill_all(process)
        elif kind == "SIGTERM":
            faults.terminate(process, self.noise)
        elif kind == "second writer":
            self.job.run(output, codes=(0, 1))
        else:
            do = {"truncated shard": faults.truncate, "flipped bit": faults.flip}
            do.get(kind, faults.orphan)(output, self.noise)


def long_run(folder: Path, model: Path, documents: int, minutes: float, every: float) -> dict:
    """The row of the long run: first undisturbed, to know what is right, then with faults."""
    source, whole = folder / "long.jsonl", folder / "long-whole"
    write_input(source, documents, 4)
    per_shard = min(LONG_PER_SHARD, max(1, documents // 20))
    alone = Long(Job(model, source, per_shard), 0, random.Random(0))
    alone.one_job(whole, disturbed=False)
    long = Long(alone.job, minutes, random.Random(1), every)
    jobs, lost, doubled, exact = 0, 0, 0, True
    while not jobs or time.monotonic() < long.stop:
        output = folder / f"long-{jobs}"
        long.one_job(output)
        counts = faults.lost_and_doubled(output, documents)
        lost, doubled, jobs = lost + counts[0], doubled + counts[1], jobs + 1
        exact = exact and faults.is_exact(output, whole)
        shutil.rmtree(output)
    lives = alone.lives + long.lives
    growths = [growth for life in lives if (growth := life.growth())]
    looks = [look for life in lives for look in life.looks]
    row = row_of("one every half minute", "one process", long.faults.total(), long.times)
    return row | {
        "what": "long run", "documents_of_a_job": documents, "jobs": jobs,
        "minutes": (time.monotonic() - long.began) / 60, "faults": dict(long.faults),
        "survived": long.faults.total(), "rows_lost": lost, "rows_doubled": doubled, "exact": exact,
        "processes": len(long.lives), "peak_mb": max((mb for _, mb, _ in looks), default=None),
        "growth_mb": [round(mb, 1) for mb, _ in growths],
        "growth_undisturbed_mb": (alone.lives[0].growth() or (None,))[0],
        "growth_of_open_files": max((files for _, files in growths), default=None),
        "files_open": max((files for *_, files in looks), default=None),
    }  # fmt: skip
