"""SIGKILL at many moments of a training, each time resumed by the same command: the losses of all
steps are bit for bit those of a run that nobody killed, on one rank and on two.

Runs are forked from one process that has imported torch: `python -m llm2vec_fast train` otherwise
costs six seconds each time. The run on two ranks that nobody kills is torchrun's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from llm2vec_fast.train import checkpoint
from llm2vec_fast.train.loop import LOG

STEPS, SAVED = 26, 2  # steps of a run, and between checkpoints
# Where a run kills itself, and at which turn there.
PLACES = [
    ("before the first step", 1),
    ("in a step", 2),
    ("log line half written", 2),
    ("optimiser half written", 2),
    ("checkpoint whole, not renamed", 1),
    ("checkpoint renamed", 2),
    ("older one half deleted", 2),
    ("log cut, not replaced", 1),
    ("next batch being prepared", 3),
    ("random", 1),
    ("random", 2),
    ("model half written", 1),  # after the last checkpoint
]


def kill_at(place: str, turn: int) -> None:
    """The process that calls this dies there."""
    from llm2vec_fast.train import loop, mntp, run, simcse

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def half_a_line(self, line):
        with open(self.output / LOG, "a") as file:
            file.write(json.dumps(line)[:30])
        die()

    def half_the_tensors(tensors, path):
        path.write_bytes(bytes([16, *bytes(99)]))
        die()

    def half_deleted(directory, **options):
        (directory / checkpoint.TENSORS).unlink()
        die()

    def half_a_model(config, encoder, directory, ranks):
        (directory / "adapter_model.safetensors").write_bytes(b"torn")
        die()

    def always(*args, **kwargs):
        return True

    def named(suffix: str):
        return lambda path, *args, **options: path.name.endswith(suffix)

    places = {
        "before the first step": [(loop.Loop, "_evaluate", die, always)],
        "in a step": [(loop.Optimizer, "step", die, always)],
        "log line half written": [(loop.Loop, "_write", half_a_line, always)],
        "optimiser half written": [(checkpoint, "write_safetensors", half_the_tensors, always)],
        "checkpoint whole, not renamed": [(checkpoint, "_sync", die, named(".partial"))],
        "checkpoint renamed": [(checkpoint, "_sync", die, named("out"))],
        "older one half deleted": [
            (checkpoint.shutil, "rmtree", half_deleted, named(".old.partial"))
        ],
        "log cut, not replaced": [(Path, "replace", die, named(".jsonl.partial"))],
        "next batch being prepared": [
            (mntp.Mntp, "prepare", die, always),
            (simcse.Contrastive, "prepare", die, always),
        ],
        "model half written": [
            (run, "save_model", half_a_model, lambda c, e, d, r: d.name == "out")
        ],
    }
    turns = []
    for owner, name, dies, is_there in places[place]:
        setattr(owner, name, counted(getattr(owner, name), dies, is_there, turns, turn))


def counted(real, dies, is_there, turns: list, turn: int):
    def instead(self, *args, **kwargs):
        if is_there(self, *args, **kwargs):
            turns.append(1)
            if len(turns) == turn:
                return dies(self, *args, **kwargs)
        return real(self, *args, **kwargs)

    return instead


def run_once(arguments: list[str], rank: int, world: int, port: int, place, told: str) -> None:
    """The command line, as rank of a world; it ends this process."""
    from llm2vec_fast import cli
    from llm2vec_fast.train import run

    run.matmul_rate = lambda *given: 1e9  # half a second that nothing here depends on
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if place:
        kill_at(*place)
    sys.argv = ["llm2vec-fast", *arguments]
    code = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stderr.flush()
        os._exit(code or 0)


def serve() -> None:
    """Forks a run for each line; tells the pids of its ranks, and how it ended."""
    import torch
    from transformers import get_scheduler  # noqa: F401 imported once, not in every run

    import llm2vec_fast.train  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        arguments, world, place, victim, told = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(world):
            pid = os.fork()
            if not pid:
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                run_once(arguments, rank, world, port, place if rank == victim else None, told)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(end_of(pids, victim), flush=True)


def end_of(pids: list[int], victim: int) -> int:
    """How a run ended: its victim, if that was killed, else its worst rank. When a rank fails, the
    others are killed, as torchrun does.
    """
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            time.sleep(0.1)  # a rank also fails because another was killed just before
            for other in set(pids) - codes.keys():
                gone, status = os.waitpid(other, os.WNOHANG)
                codes[other] = os.waitstatus_to_exitcode(status) if gone else 0
                if not gone:
                    os.kill(other, signal.SIGKILL)
                    os.waitpid(other, 0)
    return codes[pids[victim]] or max(codes.values(), key=abs)


class Server:
    """The process that forks. `start` a run, then ask for its `end`: 0, 1 or minus a signal."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(self, arguments, world=1, place=None, victim=0, told=os.devnull) -> list[int]:
        told = [arguments, world, place, victim, str(told)]
        self.process.stdin.write(json.dumps(told) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    found = Server()
    yield found
    found.process.stdin.close()
    found.process.wait(30)


@pytest.fixture(scope="module")
def place(tiny_model, add_tokenizer, tmp_path_factory):
    """A directory with a model, texts and a configuration file for each training."""
    place = tmp_path_factory.mktemp("kill")
    base = add_tokenizer(tiny_model(place, "llama", causal_lm=True))
    texts = [f"{'list of values ' * (n % 9)}number {n}" for n in range(60)]
    (place / "t.txt").write_text("\n".join(texts))
    common = {
        "model_name_or_path": str(base), "train_file": str(place / "t.txt"), "seed": 7,
        "max_steps": STEPS, "save_steps": SAVED, "save_total_limit": 1, "logging_steps": 1,
        "per_device_train_batch_size": 4, "lora_r": 4, "learning_rate": 0.01, "warmup_steps": 3,
        "torch_dtype": "float32", "max_seq_length": 24, "tokens_per_batch": 64,
    }  # fmt: skip
    for kind in ("mntp", "simcse"):
        (place / f"{kind}.json").write_text(json.dumps(common))
    return place


def command(place: Path, kind: str, output: Path) -> list[str]:
    return ["train", kind, str(place / f"{kind}.json"), "--output_dir", str(output)]


def torchrun(arguments: list[str]) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *words, "-m", "llm2vec_fast", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 1, "one rank speaks"
    assert json.loads(done.stdout)["steps"] == STEPS


def log_of(output: Path) -> list[tuple]:
    """Steps, losses and what else must not depend on when a run was killed."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    with suppress(FileNotFoundError):
        lines = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
        return [tuple(line[name] for name in kept) for line in lines]
    return []


def n_lines(output: Path) -> int:
    with suppress(FileNotFoundError):
        return (output / LOG).read_bytes().count(b"\n")
    return 0


def newest(output: Path) -> int:
    """The step that a resumed run begins after; every checkpoint that there is can be read."""
    found = [checkpoint.read(path)[0]["step"] for path in checkpoint.found(output)]
    return max(found, default=0)


def kill_at_random(pid: int, output: Path, random: np.random.Generator) -> None:
    """Some steps later, and then somewhere in the work on the next."""
    goal = newest(output) + random.integers(1, 4)
    with suppress(ProcessLookupError):  # over too early: its end tells
        while n_lines(output) < goal:
            os.kill(pid, 0)
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("kind", "world", "seed"), [("mntp", 1, 1), ("simcse", 2, 2)])
def test_killed_and_resumed(server, place, tmp_path, kind, world, seed):
    random, out, whole = np.random.default_rng(seed), tmp_path / "out", tmp_path / "whole"
    if world == 2:
        torchrun(command(place, kind, whole))
    else:
        server.start(command(place, kind, whole))
        assert server.end() == 0
    told = tmp_path / "told.txt"
    places = PLACES if world == 1 else PLACES[1::2]  # two ranks take twice as long
    for moment, turn in places:
        before = newest(out)
        fixed = None if moment == "random" else (moment, turn)
        both = moment in ("in a step", "next batch being prepared", "random")
        victim = world - 1 if both else 0  # what rank 1 does as well
        pids = server.start(command(place, kind, out), world, fixed, victim, told)
        if fixed is None:
            kill_at_random(pids[victim], out, random)
        assert server.end() == -signal.SIGKILL, f"not killed {moment}: {told.read_text()[-900:]}"
        assert newest(out) >= before, "a good checkpoint is lost"
        assert n_lines(out) - newest(out) <= SAVED + 1, "more than a checkpoint's steps are lost"
    assert newest(out) == STEPS
    server.start(command(place, kind, out), world, None, 0, told)
    assert server.end() == 0, told.read_text()[-900:]
    log = log_of(out)
    assert [line[0] for line in log] == list(range(1, STEPS + 1))
    assert log == log_of(whole), "not bit for bit the losses of a run that nobody killed"
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (whole / adapter).read_bytes()
    assert not list(out.glob("*.partial")) and len(checkpoint.found(out)) == 1
    resumed = {line for line in told.read_text().splitlines() if line.startswith("resuming")}
    assert len(resumed) >= 3, "it began anew instead"


if __name__ == "__main__":
    serve()
