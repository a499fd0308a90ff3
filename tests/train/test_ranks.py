"""Two ranks over gloo are one process with both batches: same loss, same gradients.

Every case runs in one pair of processes, forked from one that has imported torch; they save what
they computed, and the tests compare.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm2vec_fast.train.config import load
from llm2vec_fast.train.pairs import Example
from llm2vec_fast.train.ranks import ALONE, Ranks, local_device
from llm2vec_fast.train.run import load_encoder, train
from llm2vec_fast.train.simcse import SimCSE
from llm2vec_fast.train.supervised import Supervised

CPU = torch.device("cpu")
TEXTS = [f"{'a list of values ' * (n * n % 7)}number {n}" for n in range(32)]
ROWS = [
    Example(TEXTS[n], TEXTS[(n + 5) % 32], (f"no {n}", f"never {TEXTS[(n + 9) % 32]}"), "t")
    for n in range(32)
]
ROWS[7] = ROWS[20] = ROWS[3]  # equal texts, also on different ranks
B = 8  # on each rank
CASES = {
    "simcse": {"kind": "simcse"},
    "simcse, chunks": {"kind": "simcse", "tokens_per_batch": 64},
    "symmetric": {"kind": "simcse", "symmetric": True, "tokens_per_batch": 64},
    "negatives": {"kind": "supervised"},
    "negatives, chunks": {"kind": "supervised", "tokens_per_batch": 48},
    "symmetric negatives": {"kind": "supervised", "symmetric": True},
    "no duplicates": {"kind": "supervised", "mask_duplicates": True},
    "alone": {"kind": "supervised", "gather_negatives": False},
    "alone, chunks": {"kind": "simcse", "gather_negatives": False, "tokens_per_batch": 64},
    "accumulated": {"kind": "simcse", "gradient_accumulation_steps": 2},
}


def make_encoder(base: str):
    """Adapters that do something, the same in every process."""
    given = {"model_name_or_path": base, "output_dir": "o", "train_file": "t", "lora_r": 4}
    encoder = load_encoder(load("simcse", None, given | {"torch_dtype": "float32"})[0], CPU)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters(encoder):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    return encoder


def parameters(encoder):
    return [p for p in encoder.model.parameters() if p.requires_grad]


def make_objective(encoder, case: dict, ranks: Ranks, batch: int = B):
    values = {"tokens_per_batch": 4096, "simcse_dropout": 0.0, "lora_dropout": 0.0} | case
    kind = values.pop("kind")
    given = {"model_name_or_path": "m", "output_dir": "o", "train_file": "t"}
    given["per_device_train_batch_size"] = batch
    if kind == "supervised":
        del values["simcse_dropout"]
        return Supervised(encoder, ROWS, load(kind, None, given | values)[0], ranks)
    return SimCSE(encoder, TEXTS, load(kind, None, given | values)[0], ranks)


def one_step(encoder, objective) -> dict:
    """The loss and gradients of step 0 as this rank alone has them, and in how many chunks."""
    for parameter in parameters(encoder):
        parameter.grad = None
    work = objective.prepare(0)
    loss = objective.backward(work)
    gradients = [p.grad for p in parameters(encoder)]
    return {"loss": loss, "gradients": gradients, "chunks": [len(p.chunks) for p in work.parts]}


def be_a_rank(rank: int, port: str, base: str, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = port
    ranks = Ranks.join(CPU)
    encoder, results = make_encoder(base), {}
    for name, case in CASES.items():
        found = one_step(encoder, make_objective(encoder, case, ranks))
        # As the optimiser and the loop average them.
        found["loss"] = ranks.mean_(found["loss"])
        found["gradients"] = [ranks.mean_(g) for g in found["gradients"]]
        results[name] = found
    told = {"everyones": ranks.everyones(f"rank {rank}"), "sum": ranks.sum_(torch.ones(3) + rank)}
    ranks.agree("the seed", 5)
    try:
        ranks.agree("the step to go on from", 7 * rank)
    except RuntimeError as error:
        told["disagreed"] = str(error)
    ranks.wait()
    told |= {"rank": (ranks.rank, ranks.world)}
    ranks.leave()
    told["left"] = not torch.distributed.is_initialized()
    torch.save((results, told), out / f"{rank}.pt")


@pytest.fixture(scope="module")
def base(tiny_model, add_tokenizer, tmp_path_factory):
    return str(add_tokenizer(tiny_model(tmp_path_factory.mktemp("ranks"), "llama")))


@pytest.fixture(scope="module")
def encoder(base):
    return make_encoder(base)


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    """[(results by case, what else it saw) of each rank]"""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, __file__, json.dumps([str(port), base, str(out)])]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


def assert_same(got: dict, loss: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    assert got["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(got["gradients"], gradients, strict=True):
        scale = theirs.abs().max().item()
        assert scale > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5 * scale)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "gather_negatives" not in c])
def test_two_ranks_are_one_batch(two, encoder, name):
    expected = one_step(encoder, make_objective(encoder, CASES[name], ALONE, 2 * B))
    for results, _ in two:
        assert_same(results[name], expected["loss"], expected["gradients"])


@pytest.mark.parametrize("name", ["alone", "alone, chunks"])
def test_without_gathering_it_is_the_mean_of_two_losses(two, encoder, name):
    parts = [
        one_step(encoder, make_objective(encoder, CASES[name], Ranks(rank, 2))) for rank in range(2)
    ]
    loss = (parts[0]["loss"] + parts[1]["loss"]) / 2
    gradients = [
        (a + b) / 2 for a, b in zip(parts[0]["gradients"], parts[1]["gradients"], strict=True)
    ]
    for results, _ in two:
        assert_same(results[name], loss, gradients)
    gathered = make_objective(encoder, CASES[name] | {"gather_negatives": True}, ALONE, 2 * B)
    assert abs(one_step(encoder, gathered)["loss"] - loss) > 0.05, "these would be told apart"


def test_ranks_may_cut_their_batches_differently(two):
    """Above, collectives met although the ranks had different numbers of chunks."""
    chunks = [[results[name]["chunks"] for results, _ in two] for name in CASES]
    assert any(first != second for first, second in chunks)
    assert two[0][0]["simcse, chunks"]["chunks"] > [1]


def test_what_ranks_tell_each_other(two):
    for rank, (_, told) in enumerate(two):
        assert told["rank"] == (rank, 2)
        assert told["everyones"] == ["rank 0", "rank 1"]
        assert told["sum"].tolist() == [3, 3, 3]
        assert "the step to go on from: [0, 7]" in told["disagreed"]
        assert told["left"]


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.join(CPU)
    assert ranks == ALONE == Ranks(0, 1, None)
    x = torch.ones(2)
    assert ranks.mean_(x) is x and ranks.sum_(x).tolist() == [1, 1]
    assert ranks.everyones(3) == [3]
    ranks.agree("anything", 3)
    ranks.wait()
    ranks.leave()


@pytest.mark.parametrize(
    ("asked", "gpus", "local", "device"),
    [
        (None, True, "3", "cuda:3"),
        ("cuda", True, "3", "cuda:3"),
        ("cuda:1", True, "3", "cuda:1"),
        ("cpu", True, "3", "cpu"),
        (None, False, "3", None),
        (None, True, None, None),
        ("cuda", True, None, "cuda"),
    ],
)
def test_each_rank_has_its_own_gpu(monkeypatch, asked, gpus, local, device):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert local_device(asked) == device
    assert chosen == ([device] if device and device.startswith("cuda:") else [])


def child_of(process: subprocess.Popen, rank: int) -> int:
    """The process that torchrun has started as this rank."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_a_rank_is_killed_and_the_run_resumes_to_what_one_process_gives(base, tmp_path):
    """By torchrun: the other rank ends in seconds, the killed one is named, the same command goes
    on, and losses and adapter are those of one process with the batches of both.
    """
    out, alone = tmp_path / "out", tmp_path / "alone"
    (tmp_path / "t.txt").write_text("\n".join(TEXTS))
    given = {
        "model_name_or_path": base, "train_file": str(tmp_path / "t.txt"), "max_steps": 60,
        "save_steps": 5, "logging_steps": 1, "torch_dtype": "float32", "device": "cpu",
        "simcse_dropout": 0.0, "lora_dropout": 0.0, "lora_r": 4, "learning_rate": 1e-3,
    }  # fmt: skip
    path = tmp_path / "c.json"
    path.write_text(json.dumps(given | {"per_device_train_batch_size": 4}))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "llm2vec_fast", "train", "simcse", str(path), "--output_dir", str(out),
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while len(losses(out)) < 12:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    os.kill(child_of(process, 1), signal.SIGKILL)
    began = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 20
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", told), told[-2000:]
    assert 12 <= len(losses(out)) < 60, "it was over before the kill"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr[-2000:]
    one = given | {"per_device_train_batch_size": 8, "output_dir": str(alone)}
    train(load("simcse", None, one)[0])
    assert len(losses(out)) == 60
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (out, alone))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.any()
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def losses(output: Path) -> list[float]:
    """Of every step that is logged whole."""
    path = output / "training_log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [told["loss"] for told in map(json.loads, lines) if "loss" in told]


def main(port: str, base: str, out: str) -> int:
    """Forks the two ranks."""
    torch.set_num_threads(1)
    pids = []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            be_a_rank(rank, port, base, Path(out))
            os._exit(0)
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


if __name__ == "__main__":
    sys.exit(main(*json.loads(sys.argv[1])))
