"""SIGKILL at twenty moments, each time resumed: nothing is lost, doubled, or other than unkilled,
and each kill costs one computed shard at most, also where writing is the slowest stage.

Half of the moments are random times, the others lie exactly between two steps of the job: between a
shard's rename and all that follows it, between ids and their shard, between the two files of the
npy layout. Why it takes ten seconds: every kill needs a process, so torch is imported once, in a
process that forks a child for every run, forty-four in all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from llm2vec_fast.corpus import embed, verify
from llm2vec_fast.corpus.store import read_footer, read_shard, vectors_of

ROWS, PER_SHARD = 600, 6
KILLS = 20
RANDOM_TIMES = [None] * 11
# Where a run kills itself, and at which turn there; the first two are passed by new jobs alone.
NEW_JOB = [("manifest named for a while", 1), ("manifest there", 1)]
BETWEEN = [
    ("ids recorded", 2),
    ("lock taken", 3),
    ("shard whole, not renamed", 3),
    ("shard renamed", 3),  # in the npy layout the vectors of the second shard, without its table
    ("shard renamed", 4),
    ("shard stored", 2),
    ("on to the next shard", 2),
]


def kill_at(place: str, turn: int) -> None:
    """The process that calls this dies there."""
    from llm2vec_fast.corpus import atomic, ids, lock, plan, progress, run

    owner, name, after = {
        "manifest named for a while": (plan, "_write", True),
        "manifest there": (plan, "_create", True),
        "ids recorded": (ids.UniqueIds, "record", True),
        "lock taken": (lock.Locks, "take", True),
        "shard whole, not renamed": (Path, "replace", False),
        "shard renamed": (atomic, "_sync_directory", False),
        "shard stored": (run, "store", True),
        "on to the next shard": (progress.Progress, "finished", False),
    }[place]
    real, turns = getattr(owner, name), []

    def dies(*args, **kwargs):
        turns.append(place)
        if after:
            result = real(*args, **kwargs)
        if len(turns) == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return result if after else real(*args, **kwargs)

    setattr(owner, name, dies)


def told_in(log: Path, slow: str) -> None:
    """Every shard that is computed whole, and that begins to be stored, becomes a line. One of the
    stages takes longer than the others.
    """
    from llm2vec_fast.corpus import run

    compute, store = run.compute, run.store
    lines = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def computed(work, *rest):
        time.sleep(0.01 * (slow == "compute"))
        work = compute(work, *rest)
        os.write(lines, f"compute {work.job.shard}\n".encode())
        return work

    def stored(work, *rest):
        os.write(lines, f"store {work.job.shard}\n".encode())
        time.sleep(0.02 * (slow == "store"))
        return store(work, *rest)

    run.compute, run.store = computed, stored


def serve(model: str, source: str) -> None:
    """Forks a run for each line (output, layout, slow stage, place to die at); tells its pid, and
    how it ended.
    """
    from llm2vec_fast import LLM2Vec

    for line in sys.stdin:
        output, layout, slow, place = json.loads(line)
        pid = os.fork()
        if not pid:
            told_in(Path(output).with_suffix(".log"), slow)
            if place:
                kill_at(*place)
            embed(
                source, LLM2Vec.from_pretrained(model, dtype="float32"), output,
                id_column="key", unique_ids=True, output_format=layout, precision="float32",
                rows_per_shard=PER_SHARD, tokens_per_batch=64, show_progress=False,
            )  # fmt: skip
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Server:
    """The process that forks. `start` a run, then ask for its `end`: 0 or minus a signal."""

    def __init__(self, model: Path, source: Path):
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(model), str(source)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, output: Path, layout: str, slow: str = "", place=None) -> int:
        self.process.stdin.write(json.dumps([str(output), layout, slow, place]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tiny_model, add_tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("kill")
    source, random = directory / "t.jsonl", np.random.default_rng(0)
    texts = [f"{'list of values ' * random.integers(0, 9)}number {n}" for n in range(ROWS)]
    texts[7] = ""
    records = [json.dumps({"key": f"key {n}", "text": t}) + "\n" for n, t in enumerate(texts)]
    source.write_text("".join(records))
    found = Server(add_tokenizer(tiny_model(directory, "llama")), source)
    yield found
    found.process.stdin.close()
    found.process.wait(30)


def finished(output: Path) -> set[str]:
    """Names of the shards that need not be done again."""
    return {path.name for path in output.glob("part-*.parquet") if read_footer(path)}


def kill_at_random(pid: int, output: Path, random: np.random.Generator) -> None:
    """Some shards later, and then somewhere in the work on the next."""
    goal = len(finished(output)) + random.integers(0, 5)
    with suppress(ProcessLookupError):  # over too early: its end tells
        while len(list(output.glob("part-*.parquet"))) < goal:
            os.kill(pid, 0)
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)


def content(output: Path) -> Counter:
    """How often each row is there: its id, the bytes of its vector, and the rest."""
    found = Counter()
    for path in output.glob("part-*.parquet"):
        table = read_shard(path)
        vectors = vectors_of(table, "float32", 48)
        for row, vector in zip(table.drop(["embedding"]).to_pylist(), vectors, strict=True):
            found[row["id"], vector.tobytes(), row["status"], row["n_tokens"], row["note"]] += 1
    return found


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """undisturbed(layout) -> the output of a run that nobody killed"""
    made = {}

    def make(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("undisturbed") / "out"
            server.start(made[layout], layout)
            assert server.end() == 0
        return made[layout]

    return make


def killed(server: Server, output: Path, layout: str, slow: str, place, random) -> list[str]:
    """A run until its kill: the shards that it computed."""
    before, log = finished(output), output.with_suffix(".log")
    log.write_text("")
    pid = server.start(output, layout, slow, place)
    if place is None:
        kill_at_random(pid, output, random)
    assert server.end() == -signal.SIGKILL, f"the job was over before the kill at {place}"
    lines = [line.split() for line in log.read_text().splitlines()]
    computed = [shard for stage, shard in lines if stage == "compute"]
    assert not before.intersection(shard for _, shard in lines), "a finished shard was done again"
    after = finished(output)
    assert before <= after and len(set(computed)) == len(computed)
    assert len(set(computed) - after) <= 1, "more than one shard must be computed again"
    return computed


@pytest.mark.parametrize(
    ("layout", "slow", "seed"), [("parquet", "compute", 1), ("npy", "store", 2)]
)
def test_killed_twenty_times_and_resumed(server, undisturbed, tmp_path, layout, slow, seed):
    random, out = np.random.default_rng(seed), tmp_path / "out"
    moments = [*RANDOM_TIMES, *BETWEEN]
    moments = [*NEW_JOB, *(moments[n] for n in random.permutation(len(moments)))]
    assert len(moments) == KILLS
    computed = []
    for place in moments:
        computed += killed(server, out, layout, slow, place, random)
    missing = ROWS // PER_SHARD - len(finished(out))
    server.start(out, layout)
    assert server.end() == 0
    assert len(computed) + missing - ROWS // PER_SHARD <= KILLS
    whole, found = undisturbed(layout), content(out)
    assert found == content(whole)
    assert len(found) == ROWS and set(found.values()) == {1}, "rows are lost or doubled"
    assert len({row[0] for row in found}) == ROWS
    for path in whole.glob("part-*"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert verify(out) == [] and not list(out.glob("*.partial"))


if __name__ == "__main__":
    serve(*sys.argv[1:])
