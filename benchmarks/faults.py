"""A bulk job to do harm to: its commands, what can happen to it, and what is left of its rows."""

from __future__ import annotations

import itertools
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.measure import median
from llm2vec_fast.corpus.store import read_shard

PATIENCE = 300.0  # seconds after which a command hangs
EVERY = 0.005  # seconds between two looks for a shard
MARK = "LLM2VEC_FAST_SOAK"  # stands in the environment of all that a command starts
NUMBERS = itertools.count()
STARTED: list[subprocess.Popen] = []
PYTHON = (sys.executable, "-m")
# Before the command, and behind it.
LAUNCHERS = {
    "one process": ((*PYTHON, "llm2vec_fast"), ()),
    "torchrun": (
        (*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "llm2vec_fast"), (),
    ),
    "ray": ((*PYTHON, "llm2vec_fast"), ("--ray", "--num-workers", "2")),
}  # fmt: skip


class Harm(AssertionError):
    """A fault had another effect than it may have."""


@dataclass(frozen=True)
class Job:
    """One embed command, and where it is started from."""

    model: Path
    source: Path
    rows_per_shard: int
    launcher: str = "one process"

    def start(self, output: Path, *more: str, **options) -> subprocess.Popen:
        """Its errors go to a file beside the input."""
        before, behind = LAUNCHERS[self.launcher]
        command = [
            *before, "embed", str(self.source), "--model", str(self.model), "--output", str(output),
            "--id-column", "id", "--dtype", "float32", "--device", "cpu",
            "--rows-per-shard", str(self.rows_per_shard), *behind, *more,
        ]  # fmt: skip
        mark = f"{next(NUMBERS)} of {os.getpid()}"
        with open(self.errors, "w") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
                cwd=Path(__file__).parents[1], env=os.environ | {MARK: mark}, **options,
            )  # fmt: skip
        process.mark = f"{MARK}={mark}\0"
        STARTED.append(process)
        return process

    @property
    def errors(self) -> Path:
        return self.source.with_suffix(".err")

    def run(self, output: Path, *more: str, codes=(0,), **options) -> None:
        self.end(self.start(output, *more, **options), codes)

    def end(self, process: subprocess.Popen, codes=(0,)) -> int:
        """How it ended, as it may. Raises Harm if it hangs or ends otherwise."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            kill_all(process)
            raise Harm(f"it hangs: {self.errors.read_text()[-2000:]}") from None
        if code not in codes:
            raise Harm(f"ended with {code}, not {codes}: {self.errors.read_text()[-2000:]}")
        return code


def shards(output: Path) -> set[tuple[str, int]]:
    """Names and times of the finished shards."""
    found = set()
    for path in output.glob("part-*.parquet"):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def new_shards(output: Path, before: set, count: int, process: subprocess.Popen) -> bool:
    """Waits for so many shards that were not there; False if the command ends earlier."""
    deadline = time.monotonic() + PATIENCE
    while len(shards(output) - before) < count:
        if process.poll() is not None:
            return len(shards(output) - before) >= count
        if time.monotonic() > deadline:
            kill_all(process)
            raise Harm(f"no new shard in {PATIENCE} s")
        time.sleep(EVERY)
    return True


def recover(job: Job, output: Path, *more: str) -> float | None:
    """Runs the job to its end: seconds until its first new shard, None if there was none to do."""
    before, began = shards(output), time.monotonic()
    process = job.start(output, *more)
    seconds = time.monotonic() - began if new_shards(output, before, 1, process) else None
    job.end(process)
    return seconds


def lost_and_doubled(output: Path, documents: int) -> tuple[int, int]:
    """Rows of the input that are nowhere in the output, and rows that are there once too often."""
    found = Counter()
    for path in output.glob("part-*.parquet"):
        found.update(pq.read_table(path, columns=["id"]).column("id").to_pylist())
    missing = sum(str(n) not in found for n in range(documents))
    return missing, found.total() - (documents - missing)


def is_exact(output: Path, whole: Path) -> bool:
    """Whether the output holds what an undisturbed run wrote, and no rubbish beside."""
    names = [{path.name for path in place.glob("part-*")} for place in (output, whole)]
    return names[0] == names[1] and all(
        read_shard(output / name).equals(read_shard(whole / name)) for name in sorted(names[0])
    )


def row_of(fault: str, launcher: str, tries: int, times: list, how: str = "") -> dict:
    seconds = [t for t in times if t is not None]
    return {
        "fault": fault, "launcher": launcher, "how": how, "tries": tries,
        "recover_s": median(seconds) if seconds else None,
        "recover_most_s": max(seconds, default=None),
    }  # fmt: skip


# --- what can happen to a process ---


def kin(process: subprocess.Popen) -> list[int]:
    """All living processes that the command started: whoever became their parent since, and though
    some write their title over their environment.
    """
    parents, found = {}, {process.pid} if process.poll() is None else set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if process.mark.encode() in (path / "environ").read_bytes():
                found.add(int(path.name))
    while below := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= below
    return sorted(found & parents.keys())


def kill_all(process: subprocess.Popen, noise: random.Random | None = None) -> None:
    """kill -9 of everything the command started, as when a machine goes down."""
    while pids := kin(process):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()


def kill_the_rest() -> None:
    """Whatever is left of all commands."""
    while STARTED:
        kill_all(STARTED.pop())


def kill_worker(process: subprocess.Popen, noise: random.Random) -> None:
    """kill -9 of one process that computes."""
    workers = [pid for pid in kin(process) if pid != process.pid and _computes(pid)]
    if not workers:
        raise Harm("no worker was found")
    os.kill(noise.choice(workers), signal.SIGKILL)


def _computes(pid: int) -> bool:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return words[0].startswith(b"ray::Worker") or (
            b"llm2vec_fast" in words and b"embed" in words
        )
    return False


def terminate(process: subprocess.Popen, noise: random.Random) -> None:
    process.send_signal(signal.SIGTERM)


def interrupt(process: subprocess.Popen, noise: random.Random) -> None:
    process.send_signal(signal.SIGINT)


# --- what can happen to files ---


def truncate(output: Path, noise: random.Random) -> None:
    path = noise.choice(sorted(output.glob("part-*.parquet")))
    os.truncate(path, noise.randrange(path.stat().st_size))


def flip(output: Path, noise: random.Random) -> None:
    path = noise.choice(sorted(output.glob("part-*.parquet")))
    with open(path, "r+b") as file:
        file.seek(noise.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << noise.randrange(8)]))


def orphan(output: Path, noise: random.Random) -> None:
    """What a writer leaves that was killed: parts of files and a lock of nobody."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = f"{platform.node() or 'host'}-{gone.pid}.partial"
    for name in ("part-00000-000003.parquet", "manifest.json", "summary-00000.json"):
        (output / f"{name}.{owner}").write_bytes(noise.randbytes(noise.randrange(5000)))
    (output / ".locks").mkdir(exist_ok=True)
    (output / ".locks" / "part-00000-000003.parquet.lock").write_text(f"pid {gone.pid} on nowhere")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None] | None]:
    """A tmpfs of so many bytes on `folder`, and a function that remounts it with other options;
    None where nothing may be mounted.
    """
    folder.mkdir()
    tool = shutil.which("mount")

    def mount(options: str, *more: str) -> bool:
        command = [tool or "mount", *more, "-o", options, str(folder)]
        return bool(tool) and not subprocess.run(command, stderr=subprocess.DEVNULL).returncode

    there = mount(f"size={size}", "-t", "tmpfs", "tmpfs")
    try:
        yield (lambda options: mount(f"remount,{options}")) if there else None
    finally:
        if there:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def limited_files(size: int) -> Callable[[], None]:
    """For a process about to start: no file of it may grow beyond this, as on a full disk."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
