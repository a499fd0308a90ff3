"""The loop on a toy training: resumed bit for bit, stopped by a loss that is not finite, logged."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from llm2vec_fast.train import checkpoint, loop
from llm2vec_fast.train.checkpoint import CheckpointError
from llm2vec_fast.train.config import load
from llm2vec_fast.train.loop import LOG, RESOLVED, Loop, TrainingError, cut_log
from llm2vec_fast.train.optimizer import Optimizer
from llm2vec_fast.train.progress import Progress
from llm2vec_fast.train.ranks import ALONE
from llm2vec_fast.train.work import Work, generator

CPU = torch.device("cpu")
SIZE = 1000


class Toy:
    """Four numbers a step are regressed; `faults` maps a step to what goes wrong in it."""

    steps_per_epoch = 4
    fingerprint = "toy"

    def __init__(self, budget: int = 64, prepare=None, backward=None):
        noise = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(SIZE, generator=noise) / SIZE**0.5)
        self.budget, self.faults = budget, {"prepare": prepare or {}, "backward": backward or {}}
        self.prepared, self.budgets, self.thread = [], [], None

    def named(self):
        return [("weight", self.weight)]

    def prepare(self, step: int) -> Work:
        self.thread = threading.current_thread()
        self.prepared.append(step)
        self.budgets.append(self.budget)
        self.faults["prepare"].get(step, lambda: None)()
        x = torch.from_numpy(generator(1, step).standard_normal((4, SIZE))).float()
        return Work(step, 10, 1e6, np.arange(4 * step, 4 * step + 4), [x])

    def backward(self, work: Work) -> torch.Tensor:
        fault = self.faults["backward"].get(work.step, lambda loss: loss)
        loss = fault(((work.parts[0] @ self.weight - 1) ** 2).mean())
        loss.backward()
        return loss.detach()

    def evaluate(self):
        return {}


RUN = {"seed": 1}


def build(place, toy=None, output="out", made_of=RUN, evaluate=dict, save=None, **values) -> Loop:
    """A loop whose output is place / output, with these fields of the configuration."""
    toy = toy or Toy()
    given = {"model_name_or_path": "m", "output_dir": str(place / output), "train_file": "t"}
    given |= {"logging_steps": 1, "save_steps": 2, "max_steps": 9}
    config, _ = load("mntp", None, given | {"learning_rate": 0.003, "warmup_steps": 3} | values)
    optimizer = Optimizer(toy.named(), learning_rate=config.learning_rate, weight_decay=0.1)

    def save_model(directory):
        (directory / "weight.json").write_text(json.dumps(toy.weight.tolist()))

    return Loop(
        config, toy, optimizer, ALONE, CPU, made_of, save or save_model, evaluate,
        Progress(shown=False),
    )  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """make(toy=None, output="out", made_of=RUN, evaluate=dict, save=None, **config) -> Loop"""
    return partial(build, tmp_path)


def lines(tmp_path, output="out") -> list[dict]:
    return [json.loads(line) for line in (tmp_path / output / LOG).read_text().splitlines()]


def losses(tmp_path, output="out") -> list[tuple]:
    """All of the log that must not depend on when a run was interrupted."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "epoch", "tokens")
    return [tuple(line[k] for k in kept) for line in lines(tmp_path, output) if "loss" in line]


def weights(tmp_path, output="out") -> list[float]:
    return json.loads((tmp_path / output / "weight.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The log and weights of a run that nothing interrupted."""
    place = tmp_path_factory.mktemp("whole")
    summary = build(place).run()
    assert (summary.steps, summary.tokens) == (9, 90)
    return losses(place), weights(place)


def test_the_log(whole):
    log, _ = whole
    assert [line[0] for line in log] == list(range(1, 10))
    assert [line[5] for line in log] == list(range(10, 100, 10))
    rates = [line[3] for line in log]
    assert rates == pytest.approx([0.003 * min(n / 3, (9 - n) / 6) for n in range(9)])
    assert [line[4] for line in log] == [n / 4 for n in range(1, 10)]
    assert log[-1][1] < log[0][1]


@pytest.mark.parametrize("stops", [(2,), (1, 4, 5), (8,), (9,), (3, 3)])
def test_stopped_and_gone_on_bit_for_bit(make, tmp_path, whole, stops):
    """stop_after_n_steps ends a run; the schedule is that of all steps all the same."""
    for stop in stops:
        assert make(stop_after_n_steps=stop).run().steps == stop
    assert make().run().steps == 9
    assert (losses(tmp_path), weights(tmp_path)) == whole


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_an_error_in_preparing_is_told_and_what_was_saved_goes_on(make, tmp_path, whole, stop):
    def breaks():
        raise ValueError("row 17 is no text")

    toy = Toy(prepare={stop: breaks})
    with pytest.raises(ValueError, match="row 17 is no text"):
        make(toy).run()
    assert not toy.thread.is_alive() and toy.thread is not threading.main_thread()
    assert len(losses(tmp_path)) == stop, "steps before the bad one are done"
    make().run()
    assert (losses(tmp_path), weights(tmp_path)) == whole


def test_the_next_step_is_prepared_meanwhile_and_no_more(make):
    """One ahead, each once; none beyond the end."""
    toy, seen = Toy(), []

    def watch(loss):
        deadline = time.monotonic() + 5
        while max(toy.prepared) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(list(toy.prepared))
        return loss

    toy.faults["backward"] = {3: watch}
    make(toy, max_steps=6).run()
    assert seen == [[0, 1, 2, 3, 4]]
    assert toy.prepared == list(range(6))


# --- losses that are not finite ---


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 3, 4, 8])
def test_a_loss_that_is_not_finite(make, tmp_path, whole, step, value):
    """Named are step, rows and the last good checkpoint, and nothing of it is saved."""
    with pytest.raises(TrainingError) as told:
        make(Toy(backward={step: lambda loss: loss * value})).run()
    text = str(told.value)
    assert f"step {step + 1}:" in text and str(value) in text
    assert f"{4 * step}, {4 * step + 1}" in text
    last = step - step % 2
    found = checkpoint.found(tmp_path / "out")
    assert (f"checkpoint-{last}" in text) if last else ("No checkpoint" in text)
    assert [path.name for path in found][:1] == ([f"checkpoint-{last}"] if last else [])
    for path in found:
        _, tensors = checkpoint.read(path)
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (tmp_path / "out" / "weight.json").exists()
    make().run()  # without the fault
    assert (losses(tmp_path), weights(tmp_path)) == whole


def test_a_gradient_that_is_not_finite(make):
    def only_the_gradient(loss):
        return loss + (loss.detach() * 0 + 1e-30) * 0 + _Poison.apply(loss)

    with pytest.raises(TrainingError, match=r"step 3: the loss is \d.*gradient's norm nan"):
        make(Toy(backward={2: only_the_gradient})).run()


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, dx):
        return dx * math.nan


def test_poisoned_weights_are_never_saved(make, tmp_path):
    """Also where a checkpoint falls on that very step."""
    toy = Toy()

    def poison(loss):
        with torch.no_grad():
            toy.weight[5] = math.nan
        return loss * toy.weight.sum()

    toy.faults["backward"] = {3: poison}
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        make(toy).run()
    assert [path.name for path in checkpoint.found(tmp_path / "out")] == ["checkpoint-2"]


# --- late losses, as on a GPU ---


@pytest.fixture
def late(monkeypatch):
    """Losses are read two steps late, as on a GPU."""

    class Cuda:
        type = "cuda"

    def use(made: Loop) -> Loop:
        made._fetch = lambda stats: (stats, None)
        made.device = Cuda()
        return made

    monkeypatch.setattr(torch.Tensor, "to", _to(torch.Tensor.to))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return use


def _to(real):
    def to(self, *args, **kwargs):
        if args and getattr(args[0], "type", None) == "cuda":
            return self
        return real(self, *args, **kwargs)

    return to


def test_losses_read_late_stand_at_their_own_steps(make, tmp_path, whole, late):
    late(make(save_steps=4)).run()
    assert (losses(tmp_path), weights(tmp_path)) == whole


def test_a_late_loss_that_is_not_finite_is_seen_before_anything_is_saved(make, tmp_path, late):
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        late(make(Toy(backward={3: lambda loss: loss * math.nan}), save_steps=5)).run()
    with pytest.raises(TrainingError, match="step 4: the loss is nan"):
        late(make(Toy(backward={3: lambda loss: loss * math.nan}), save_steps=4)).run()
    assert checkpoint.found(tmp_path / "out") == []


# --- log and figures ---


def test_a_line_is_the_mean_of_its_steps(make, tmp_path, whole):
    summary = make(logging_steps=4).run()
    each = [line[1] for line in whole[0]]
    found = [(line["step"], line["loss"]) for line in lines(tmp_path)]
    means = [np.mean(each[:4]), np.mean(each[4:8]), each[8]]
    assert [step for step, _ in found] == [4, 8, 9]
    assert [loss for _, loss in found] == pytest.approx(means, rel=1e-12)
    assert summary.loss == found[-1][1]
    norms = [line[2] for line in whole[0]]
    assert [line["grad_norm"] for line in lines(tmp_path)] == [
        max(norms[:4]), max(norms[4:8]), norms[8],
    ]  # fmt: skip


def test_figures_are_logged_before_the_first_step_as_asked_and_at_the_end(make, tmp_path):
    calls = []

    def evaluate():
        calls.append(len(calls))
        return {"spearman": len(calls) / 10}

    make(evaluate=evaluate, eval_steps=4, eval_file="f", stop_after_n_steps=6).run()
    make(evaluate=evaluate, eval_steps=4, eval_file="f").run()
    found = [(line["step"], line["spearman"]) for line in lines(tmp_path) if "spearman" in line]
    assert found == [(0, 0.1), (4, 0.2), (6, 0.3), (8, 0.4), (9, 0.5)]
    seconds = [line["tokens_per_s"] for line in lines(tmp_path) if "loss" in line]
    assert all(rate > 0 for rate in seconds)


def test_the_time_of_figures_is_no_time_of_steps(make, tmp_path):
    def slow():
        time.sleep(0.3)
        return {"x": 1.0}

    make(evaluate=slow, eval_steps=1, eval_file="f", max_steps=4, save_strategy="no").run()
    assert all(line["tokens_per_s"] > 50 for line in lines(tmp_path) if "loss" in line)


def test_a_warm_up_that_outlasts_the_run_is_said(make, monkeypatch):
    told = []
    monkeypatch.setattr(Progress, "say", lambda self, text: told.append(text))
    make(warmup_steps=8)
    assert told == []
    make(warmup_steps=9)
    make(warmup_steps=5, stop_after_n_steps=4)
    assert [line.split(":")[0] for line in told] == [
        "the run ends after 9 steps, within its warm-up of 9",
        "the run ends after 4 steps, within its warm-up of 5",
    ]


def test_cutting_the_log(tmp_path):
    path = tmp_path / LOG
    cut_log(path, 3)
    assert not path.exists()
    kept = [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.5}, {"step": 3, "spearman": 0.5}]
    later = [{"step": 4, "loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in [*kept, *later])
    path.write_text(text + '[1]\n{"step": 2, "lo')
    cut_log(path, 3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept
    cut_log(path, 0)
    assert path.read_text() == "" and [p.name for p in tmp_path.iterdir()] == [LOG]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("bar", "shown"), [(True, True), (False, True), (True, False)])
def test_on_a_terminal_a_bar_and_otherwise_json_lines(monkeypatch, bar, shown):
    monkeypatch.setattr("sys.stderr", Terminal())
    with Progress(shown, bar) as progress:
        progress.start(2, 4)
        progress.step(3, 1.25, 0.5, 1e-3, 10)
        progress.line({"step": 3, "loss": 1.25})
        progress.line({"step": 3, "spearman": 0.75})
        progress.say("a word")
        told = sys.stderr.getvalue()
    if not shown:
        assert told == ""
    elif bar:
        assert "loss 1.2500, norm 0.50" in told and "3/4" in told
        assert "spearman 0.75" in told and "a word" in told and "{" not in told
    else:
        lines = [line for line in told.splitlines() if line.startswith("{")]
        assert [json.loads(line) for line in lines] == [
            {"step": 3, "loss": 1.25}, {"step": 3, "spearman": 0.75},
        ]  # fmt: skip
        assert "a word" in told and "3/4" not in told


# --- going on ---


def test_a_finished_run_only_writes_its_model_again(make, tmp_path, whole):
    first = make().run()
    (tmp_path / "out" / "weight.json").unlink()
    toy = Toy()
    again = make(toy).run()
    assert toy.prepared == [] and weights(tmp_path) == whole[1]
    assert (again.steps, again.tokens, again.loss) == (9, 90, first.loss)
    state, _ = checkpoint.read(tmp_path / "out" / "checkpoint-9")
    assert again.seconds >= state["seconds"] > 0


def test_going_on_leaves_the_checkpoint_as_it_is(make, tmp_path):
    """It is read, not mapped: later steps change their own memory."""
    make(stop_after_n_steps=4, save_total_limit=None).run()
    path = tmp_path / "out" / "checkpoint-4"
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    make(save_total_limit=None).run()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(make, tmp_path, whole):
    make(stop_after_n_steps=6).run()
    (tmp_path / "out" / "checkpoint-6" / checkpoint.TENSORS).write_bytes(b"torn")
    toy = Toy()
    make(toy).run()
    assert toy.prepared[0] == 4
    assert (losses(tmp_path), weights(tmp_path)) == whole


def test_a_step_is_cut_as_before_the_interruption(make):
    """Free memory, by which chunks are cut, may have changed."""
    make(Toy(budget=64), stop_after_n_steps=4).run()
    toy = Toy(budget=1000)
    make(toy).run()
    assert set(toy.budgets) == {64}


def test_another_run_is_refused_and_keeps_everything(make, tmp_path):
    make(stop_after_n_steps=4).run()
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="seed: 1 there, 2 here"):
        make(made_of={"seed": 2}, logging_steps=3).run()
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert json.loads((tmp_path / "out" / RESOLVED).read_text())["logging_steps"] == 1


def test_other_weights_are_refused(make, tmp_path):
    make(stop_after_n_steps=2).run()
    path = tmp_path / "out" / "checkpoint-2" / checkpoint.STATE
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"layout": [["weight", [SIZE + 1]]]}))
    with pytest.raises(CheckpointError, match="other weights"):
        make().run()


def test_overwriting_replaces_another_run_and_resumes_this_one(make, tmp_path, whole):
    make(made_of={"seed": 2}, stop_after_n_steps=4, learning_rate=0.1).run()
    toy = Toy()
    make(toy, overwrite_output_dir=True, stop_after_n_steps=6).run()
    assert toy.prepared[0] == 0
    toy = Toy()
    make(toy, overwrite_output_dir=True).run()
    assert toy.prepared[0] == 6, "the same command goes on"
    assert (losses(tmp_path), weights(tmp_path)) == whole


def test_overwriting_another_run_whose_newest_checkpoint_is_damaged(make, tmp_path, whole):
    make(made_of={"seed": 2}, stop_after_n_steps=4).run()
    (tmp_path / "out" / "checkpoint-4" / checkpoint.STATE).write_text("{")
    make(overwrite_output_dir=True).run()
    assert (losses(tmp_path), weights(tmp_path)) == whole


def test_overwriting_deletes_nothing_that_is_to_be_resumed_from(make, tmp_path):
    make(made_of={"seed": 2}, stop_after_n_steps=4).run()
    kept = tmp_path / "out" / "checkpoint-4"
    for asked in (str(kept), True):
        with pytest.raises(CheckpointError, match="seed: 2 there, 1 here"):
            make(overwrite_output_dir=True, resume_from_checkpoint=asked).run()
    assert kept.exists()


def test_anew(make, tmp_path, whole):
    make(stop_after_n_steps=4).run()
    toy = Toy()
    make(toy, resume_from_checkpoint=False).run()
    assert toy.prepared == list(range(9))
    assert (losses(tmp_path), weights(tmp_path)) == whole


def test_from_a_checkpoint_by_its_path(make, tmp_path, whole):
    make(stop_after_n_steps=6, save_total_limit=None).run()
    toy, path = Toy(), str(tmp_path / "out" / "checkpoint-2")
    make(toy, resume_from_checkpoint=path).run()
    assert toy.prepared[0] == 2
    assert (losses(tmp_path), weights(tmp_path)) == whole
    elsewhere = Toy()
    make(elsewhere, "other", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8")).run()
    assert elsewhere.prepared == [8] and weights(tmp_path, "other") == whole[1]


def test_from_a_path_that_is_no_checkpoint_or_another_runs(make, tmp_path):
    make(stop_after_n_steps=4).run()
    with pytest.raises(CheckpointError, match="none is no checkpoint"):
        make(resume_from_checkpoint=str(tmp_path / "none")).run()
    with pytest.raises(CheckpointError, match="seed: 1 there"):
        make(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"), made_of={}).run()
    # And into a directory of another run.
    make(output="other", made_of={"seed": 2}, stop_after_n_steps=8).run()
    with pytest.raises(CheckpointError, match="seed: 2 there, 1 here"):
        make(output="other", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")).run()
    assert (tmp_path / "other" / "checkpoint-8").exists()


# --- disks ---


@pytest.mark.parametrize("what", ["checkpoint", "log", "model"])
def test_what_cannot_be_written_is_named(make, tmp_path, monkeypatch, whole, what):
    full = OSError(28, "No space left on device")

    def fails(*args, **kwargs):
        raise full

    def no_model(directory):
        if directory == tmp_path / "out":
            raise full
        (directory / "weight.json").write_text("[]")

    if what == "checkpoint":
        make(stop_after_n_steps=2).run()
        monkeypatch.setattr(checkpoint, "write_safetensors", fails)
    elif what == "log":
        monkeypatch.setattr(loop, "open", fails, raising=False)
    name = {"checkpoint": "checkpoint-4", "log": LOG, "model": "out"}[what]
    with pytest.raises(CheckpointError, match=f"{name} could not be written: No space left"):
        make(save=no_model if what == "model" else None).run()
    monkeypatch.undo()
    make().run()
    assert (losses(tmp_path), weights(tmp_path)) == whole
