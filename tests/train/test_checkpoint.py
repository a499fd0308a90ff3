"""Checkpoints: whole or not at all, the newest good one, and never another run's."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llm2vec_fast.train import checkpoint
from llm2vec_fast.train.checkpoint import CheckpointError

RUN = {"seed": 1, "learning_rate": 0.1, "train_file": ["a.txt"]}


def nothing(directory) -> None:
    (directory / "adapter.json").write_text("{}")


def write(output, step, keep=None, run=RUN, save_model=nothing, size=64):
    tensors = {"values.0": torch.full((size,), float(step)), "step.0": torch.tensor(float(step))}
    return checkpoint.write(output, step, {"made_of": run}, tensors, keep, save_model)


def steps(output) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoint.found(output)]


def test_there_and_back(tmp_path):
    path = write(tmp_path / "out", 5)
    assert path == tmp_path / "out" / "checkpoint-5"
    names = {"adapter.json", checkpoint.STATE, checkpoint.TENSORS}
    assert {file.name for file in path.iterdir()} == names
    state, tensors = checkpoint.read(path)
    assert state == {"step": 5, "made_of": RUN}
    assert torch.equal(tensors["values.0"], torch.full((64,), 5.0)) and tensors["step.0"] == 5
    found, again = checkpoint.newest(tmp_path / "out", RUN, pytest.fail)
    assert found == state and torch.equal(again["values.0"], tensors["values.0"])


def test_nothing_there(tmp_path):
    assert checkpoint.newest(tmp_path / "none", RUN, pytest.fail) is None
    assert checkpoint.found(tmp_path / "none") == []
    assert checkpoint.made_of(tmp_path / "none") is None


@pytest.mark.parametrize(("keep", "left"), [(None, [100, 20, 9, 3]), (1, [100]), (2, [100, 20])])
def test_the_last_few_are_kept(tmp_path, keep, left):
    """By number, not by name: 100 is newer than 20."""
    for step in (3, 9, 20, 100):
        write(tmp_path, step, keep)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    for name in ("checkpoint-best", "checkpoint-7x", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.STATE).write_text('{"step": 9}')
    write(tmp_path, 1, keep=1)
    write(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2]
    checkpoint.remove_all(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-best", "checkpoint-7x", "checkpoints",
    }  # fmt: skip


def test_a_step_that_is_done_again_replaces_its_checkpoint(tmp_path):
    write(tmp_path, 4, size=8)
    write(tmp_path, 4, size=16)
    assert len(checkpoint.read(tmp_path / "checkpoint-4")[1]["values.0"]) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


# --- damage ---

DAMAGE = {
    "state cut": lambda p: (p / checkpoint.STATE).write_text('{"step": 4, "made'),
    "state empty": lambda p: (p / checkpoint.STATE).write_bytes(b""),
    "state without a step": lambda p: (p / checkpoint.STATE).write_text("{}"),
    "state of another kind": lambda p: (p / checkpoint.STATE).write_text("[4]"),
    "state not UTF-8": lambda p: (p / checkpoint.STATE).write_bytes(b"\xff\xfe"),
    "tensors missing": lambda p: (p / checkpoint.TENSORS).unlink(),
    "tensors empty": lambda p: (p / checkpoint.TENSORS).write_bytes(b""),
    "tensors cut": lambda p: (p / checkpoint.TENSORS).write_bytes(
        (p / checkpoint.TENSORS).read_bytes()[:-1]
    ),
    "tensors with more": lambda p: (p / checkpoint.TENSORS).write_bytes(
        (p / checkpoint.TENSORS).read_bytes() + b"0"
    ),
    "tensors of zeros": lambda p: (p / checkpoint.TENSORS).write_bytes(bytes(500)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_message(tmp_path, damage):
    write(tmp_path, 2)
    DAMAGE[damage](write(tmp_path, 4))
    said = []
    state, tensors = checkpoint.newest(tmp_path, RUN, said.append)
    assert state["step"] == 2 and tensors["values.0"][0] == 2
    (line,) = said
    assert "checkpoint-4" in line and "damaged" in line and "going back" in line
    with pytest.raises(CheckpointError, match=r"checkpoint-4.*damaged"):
        checkpoint.read(tmp_path / "checkpoint-4")


def test_a_torn_directory_is_no_checkpoint(tmp_path):
    """What a kill leaves while a checkpoint is written or deleted, or a copy that was cut short."""
    write(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-4.123.partial")
    (tmp_path / "checkpoint-1.9.old.partial").mkdir()
    (tmp_path / "checkpoint-6").mkdir()
    assert steps(tmp_path) == [2]
    assert checkpoint.newest(tmp_path, RUN, pytest.fail)[0]["step"] == 2
    checkpoint.clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-6"}
    assert write(tmp_path, 6).exists() and steps(tmp_path) == [6, 2]


def test_damaged_ones_push_no_good_ones_out(tmp_path):
    """After going back from step 4, step 3 is written: with one to keep it is that one."""
    write(tmp_path, 2)
    DAMAGE["tensors cut"](write(tmp_path, 4))
    write(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [4, 3]
    assert checkpoint.newest(tmp_path, RUN, lambda line: None)[0]["step"] == 3
    write(tmp_path, 4, keep=1)
    assert steps(tmp_path) == [4]
    assert checkpoint.newest(tmp_path, RUN, pytest.fail)[0]["step"] == 4


# --- other runs ---


def test_another_run_is_refused_with_the_differences(tmp_path):
    write(tmp_path, 2)
    ours = {"seed": 1, "learning_rate": 0.2, "train_file": ["b.txt"], "symmetric": True}
    with pytest.raises(CheckpointError) as told:
        checkpoint.newest(tmp_path, ours, pytest.fail)
    text = str(told.value)
    assert "learning_rate: 0.1 there, 0.2 here" in text and "['a.txt'] there" in text
    assert "symmetric: None there, True here" in text and "seed" not in text
    assert "overwrite_output_dir" in text and "output_dir" in text
    assert steps(tmp_path) == [2]


def test_what_is_missing_here_is_a_difference_too(tmp_path):
    with pytest.raises(CheckpointError, match="seed: 1 there, None here"):
        checkpoint.refuse_others(tmp_path, RUN, {k: v for k, v in RUN.items() if k != "seed"})
    checkpoint.refuse_others(tmp_path, RUN, dict(RUN))


def test_what_run_a_directory_is_of(tmp_path):
    write(tmp_path, 2)
    DAMAGE["state cut"](write(tmp_path, 4, run={"seed": 9}))
    assert checkpoint.made_of(tmp_path) == RUN


# --- disks ---


@pytest.mark.parametrize("size", [0, 100, 900], ids=["nothing", "a little", "half the tensors"])
def test_a_full_disk(room_for, tmp_path, size):
    """At the model's files, the tensors: it is told where, nothing is left, nothing is lost."""
    write(tmp_path, 2, size=400)
    before = {f.name: f.read_bytes() for f in (tmp_path / "checkpoint-2").iterdir()}
    with room_for(size), pytest.raises(CheckpointError) as told:
        write(tmp_path, 4, keep=1, size=400)
    assert "checkpoint-4 could not be written" in str(told.value)
    assert "File too large" in str(told.value) or "os error" in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "checkpoint-2").iterdir()} == before
    assert write(tmp_path, 4, keep=1, size=400).exists() and steps(tmp_path) == [4]


def test_an_error_of_the_models_own_files(tmp_path):
    def fails(directory):
        raise PermissionError(13, "Permission denied", str(directory))

    with pytest.raises(CheckpointError, match="checkpoint-4 could not be written: Permission"):
        write(tmp_path, 4, save_model=fails)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_does_not_change_with_the_next_step():
    x = torch.ones(3, requires_grad=True)
    copies = checkpoint.to_host({"x": x})
    with torch.no_grad():
        x.zero_()
    assert copies["x"].tolist() == [1, 1, 1] and not copies["x"].requires_grad


def test_everything_is_json_and_safetensors(tmp_path):
    path = write(tmp_path, 4)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((path / checkpoint.STATE).read_text())["step"] == 4


def test_another_kind_of_training_is_told_as_that_alone(tmp_path):
    """Not as all the fields that the two kinds do not share."""
    theirs = RUN | {"kind": "mntp", "mlm_probability": 0.2}
    write(tmp_path, 1, run=theirs)
    with pytest.raises(CheckpointError, match=r"\(kind: 'mntp' there, 'simcse' here\)"):
        checkpoint.newest(tmp_path, RUN | {"kind": "simcse", "loss_scale": 20.0}, pytest.fail)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=f"is no checkpoint: it has no {checkpoint.STATE}"):
        checkpoint.read(tmp_path / "none")
