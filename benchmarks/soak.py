"""Nothing lost: faults done to bulk jobs again and again, and a long run with a fault every 30 s.

    make soak
    python -m benchmarks.soak --tries 20 --minutes 10 --write

The matrix: each fault `--tries` times where the whole command dies, a quarter of that where files
are harmed. Survived is a try after which the same command ended well; at the end the output must
hold exactly what an undisturbed run wrote. Time to recover: seconds from the start of the next run
(after a worker's death under Ray, from the death) to its first new shard, imports and all.

The long run: `--documents` short texts again and again until the minutes are over, at least once to
the end; memory and open files of the process, read in /proc twice a second, must not grow.

A tiny random model on the CPU. Linux. Rows go to benchmarks/results/soak-cpu.json with `--write`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import faults
from benchmarks.bench_scale import tiny_model, write_input
from benchmarks.faults import Harm, Job, new_shards, recover, row_of, shards
from benchmarks.measure import write_rows
from benchmarks.soak_long import EVERY, long_run

NAME = "soak-cpu"
DOCUMENTS, PER_SHARD = 6_000, 50  # of a job of the matrix: 120 shards
# Harm to a process: fault, how the job is started, what is done, how it may end.
DEADLY = [
    ("kill -9", "one process", faults.kill_all, (-9,)),
    ("kill -9", "torchrun", faults.kill_all, (-9,)),
    ("kill -9", "ray", faults.kill_all, (-9,)),
    ("SIGTERM", "one process", faults.terminate, (143,)),
    ("SIGINT", "one process", faults.interrupt, (130,)),
    ("kill -9 of a worker", "torchrun", faults.kill_worker, (1,)),
]


def checked(row: dict, survived: int, outputs: list[Path], whole: Path, documents: int) -> dict:
    """The row with what is left of the rows of all outputs of a fault."""
    counts = [faults.lost_and_doubled(output, documents) for output in outputs]
    return row | {
        "survived": survived,
        "rows_lost": sum(lost for lost, _ in counts),
        "rows_doubled": sum(doubled for _, doubled in counts),
        "exact": all(faults.is_exact(output, whole) for output in outputs),
    }


def deadly(job: Job, whole: Path, fault: str, harm, codes, tries: int, noise) -> dict:
    """One command after the other on one output, each ended by the fault at a random moment; a job
    that is done before is checked, and another begins.
    """
    folder, outputs, times, survived = whole.parent, [], [], 0
    name = f"{fault} {job.launcher}".replace(" ", "-")
    output, first = folder / f"{name}-0", True
    while survived < tries:
        before, began = shards(output), time.monotonic()
        process = job.start(output)
        wanted = noise.randrange(0 if harm is faults.kill_all else 1, 4)  # 0: while it starts
        if wanted == 0:
            time.sleep(noise.uniform(0, 3))
        elif new_shards(output, before, 1, process):
            times += [] if first else [time.monotonic() - began]
            new_shards(output, before, wanted, process)
            time.sleep(noise.uniform(0, 0.05))
        alive = process.poll() is None
        if alive:
            harm(process, noise)
        code = job.end(process, {*codes, 0} if alive else {0})  # 0: done a moment before
        survived, first = survived + (code != 0), False
        if code == 0:
            outputs, first = [*outputs, output], True
            output = folder / f"{name}-{len(outputs)}"
    times.append(recover(job, output))
    return checked(
        row_of(fault, job.launcher, tries, times), survived, [*outputs, output], whole, DOCUMENTS
    )


def worker_of_ray(job: Job, whole: Path, tries: int, noise) -> dict:
    """Its jobs go to a new worker, and the run ends well."""
    outputs, times = [], []
    for n in range(tries):
        outputs.append(whole.parent / f"worker-{n}")
        process = job.start(outputs[-1])
        new_shards(outputs[-1], set(), noise.randint(1, 5), process)
        before, began = shards(outputs[-1]), time.monotonic()
        faults.kill_worker(process, noise)
        times.append(
            time.monotonic() - began if new_shards(outputs[-1], before, 1, process) else None
        )
        job.end(process)
    row = row_of("kill -9 of a worker", job.launcher, tries, times, "the run goes on")
    return checked(row, tries, outputs, whole, DOCUMENTS)


def begun(job: Job, output: Path, noise) -> None:
    """A job that was killed after some shards."""
    process = job.start(output)
    new_shards(output, set(), noise.randint(1, 8), process)
    faults.kill_all(process, noise)
    job.end(process, (-9, 0))


# --- harm to files: each gives how it was done, and the seconds to recover ---


def full_disk(job: Job, output: Path, whole: Path, noise) -> tuple[str, float | None]:
    size = sum(path.stat().st_size for path in whole.iterdir() if path.is_file())
    size = int(size * noise.uniform(0.05, 0.8))
    with faults.small_disk(output.with_name(f"{output.name}-disk"), size) as remount:
        if remount is None:  # no right to mount: no file may be as large as a shard
            job.run(output, codes=(1,), preexec_fn=faults.limited_files(size // 500))
            return "files limited in size", recover(job, output)
        place = output.with_name(f"{output.name}-disk") / "out"
        job.run(place, codes=(1,))
        remount(f"size={1 << 30}")
        seconds = recover(job, place)
        shutil.copytree(place, output)
    return "a small tmpfs", seconds


def read_only(job: Job, output: Path, whole: Path, noise) -> tuple[str, float | None]:
    disk = output.with_name(f"{output.name}-disk")
    with faults.small_disk(disk, 1 << 30) as remount:
        place = disk / "out"
        begun(job, place, noise)
        if remount is None and os.geteuid() == 0:
            raise Harm("root can write everywhere, and nothing can be mounted here")
        before = shards(place)
        remount("ro") if remount else place.chmod(0o555)
        job.run(place, codes=(1,))
        if shards(place) != before:
            raise Harm("something was written")
        remount("rw") if remount else place.chmod(0o755)
        seconds = recover(job, place)
        shutil.copytree(place, output)
    return "a tmpfs remounted" if remount else "chmod", seconds


def harmed(job: Job, output: Path, whole: Path, noise, harm, *more: str) -> float | None:
    """A finished job, harmed, run again: only what was harmed is done again."""
    shutil.copytree(whole, output)
    before = shards(output)
    harm(output, noise)
    seconds = recover(job, output, *more)
    if len(shards(output) - before) > 1:
        raise Harm(f"{len(shards(output) - before)} shards were done again, not one")
    return seconds


def truncated(job: Job, output: Path, whole: Path, noise) -> tuple[str, float | None]:
    return "at a random byte", harmed(job, output, whole, noise, faults.truncate)


def flipped(job: Job, output: Path, whole: Path, noise) -> tuple[str, float | None]:
    return "found by --verify", harmed(job, output, whole, noise, faults.flip, "--verify")


def orphans(job: Job, output: Path, whole: Path, noise) -> tuple[str, float | None]:
    begun(job, output, noise)
    faults.orphan(output, noise)
    seconds = recover(job, output)
    if left := list(output.glob("*.partial")):
        raise Harm(f"left behind: {left}")
    return "parts, a lock", seconds


def two_writers(job: Job, output: Path, whole: Path, noise) -> tuple[str, float | None]:
    first = job.start(output)
    new_shards(output, set(), noise.randint(1, 8), first)
    second = job.start(output)
    codes = job.end(second, (0, 1)), job.end(first, (0, 1))
    if sum(codes) > 1:
        raise Harm("both were refused")
    return "the second is refused", None


FILES = {
    "disk full": full_disk,
    "read-only output": read_only,
    "truncated shard": truncated,
    "flipped bit": flipped,
    "orphaned parts": orphans,
    "two writers": two_writers,
}


def of_files(job: Job, whole: Path, fault: str, tries: int, noise) -> dict:
    outputs, times, how = [], [], ""
    for n in range(tries):
        outputs.append(whole.parent / f"{fault.replace(' ', '-')}-{n}")
        how, seconds = FILES[fault](job, outputs[-1], whole, noise)
        times.append(seconds)
    row = row_of(fault, job.launcher, tries, times, how)
    return checked(row, tries, outputs, whole, DOCUMENTS)


def matrix(folder: Path, model: Path, tries: int, wanted: str) -> Iterator[dict]:
    """One row a fault; one with another effect than it may have stands in its row as `failed`."""
    source, whole = folder / "texts.jsonl", folder / "whole"
    write_input(source, DOCUMENTS, 4)
    plain = Job(model, source, PER_SHARD)
    plain.run(whole)
    few = max(1, tries // 4)
    plan: list[tuple[str, str, int, Callable]] = [
        (fault, launcher, tries if "-9" in fault else few,
         lambda job, n, noise, f=fault, h=harm, c=codes: deadly(job, whole, f, h, c, n, noise))
        for fault, launcher, harm, codes in DEADLY
    ]  # fmt: skip
    plan.append(
        ("kill -9 of a worker", "ray", few,
         lambda job, n, noise: worker_of_ray(job, whole, n, noise))
    )  # fmt: skip
    plan += [
        (
            fault,
            "one process",
            few,
            lambda job, n, noise, f=fault: of_files(job, whole, f, n, noise),
        )
        for fault in FILES
    ]
    for number, (fault, launcher, count, do) in enumerate(plan):
        if wanted not in f"{fault} {launcher}":
            continue
        try:
            yield do(replace(plain, launcher=launcher), count, random.Random(number))
        except Harm as harm:
            yield row_of(fault, launcher, count, []) | {"failed": str(harm)[-1000:]}
        faults.kill_the_rest()
        for left in folder.glob("*-[0-9]*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


COLUMNS = {
    "fault": "fault", "launcher": "started as", "tries": "tries", "survived": "survived",
    "rows_lost": "rows lost", "rows_doubled": "rows doubled", "exact": "output exact",
    "recover_s": "s to recover", "recover_most_s": "at most",
}  # fmt: skip


def table(rows: list[dict]) -> Table:
    shown = Table(*COLUMNS.values())
    for row in rows:
        values = [
            "failed" if row.get("failed") and key == "survived" else row.get(key) for key in COLUMNS
        ]
        shown.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in values))
    return shown


def everything(args: argparse.Namespace, folder: Path, model: Path) -> Iterator[dict]:
    yield from matrix(folder, model, args.tries, args.only)
    if args.minutes:
        yield long_run(folder, model, args.documents, args.minutes, args.every)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10.0, help="0: no long run")
    parser.add_argument("--documents", type=int, default=1_000_000, help="of a job of the long run")
    parser.add_argument("--every", type=float, default=EVERY, help="seconds between two faults")
    parser.add_argument("--only", default="", help="rows of the matrix whose names hold this")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(arguments)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        folder = Path(made)
        model = tiny_model(folder / "model")
        for row in everything(args, folder, model):
            rows.append(row)
            print(row, flush=True)
            if args.write:
                write_rows(NAME, rows)
    Console(width=150).print(table(rows))
    if any(r.get("failed") or r["rows_lost"] or r["rows_doubled"] or not r["exact"] for r in rows):
        sys.exit("something was lost, doubled, changed, or ended as it may not")


if __name__ == "__main__":
    main()
