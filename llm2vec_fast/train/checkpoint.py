"""Checkpoints: a directory that is there whole or not at all, and the way back from it.

checkpoint-<step>/ holds optimizer.safetensors (parameters, moments: bit for bit), the adapter in
PEFT's layout, and training_state.json: the step, what the run was made of, and what it has cost.
Random numbers and the place in the data are functions of (seed, step), so the step is all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llm2vec_fast.model.checkpoint import write_json, write_safetensors

STATE, TENSORS = "training_state.json", "optimizer.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or was made by another run."""


def write(
    output: Path,
    step: int,
    state: dict,
    tensors: dict[str, Tensor],
    keep: int | None,
    save_model: Callable[[Path], None],
) -> Path:
    """checkpoint-<step>, on the disk when this returns; then all but the last `keep` go.

    save_model: writes the model's own files into a directory
    raises:     CheckpointError if it cannot be written; older checkpoints stay
    """
    target = output / f"checkpoint-{step}"
    partial = output / f"checkpoint-{step}.{os.getpid()}.partial"
    try:
        with told_where(target):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_model(partial)
            write_safetensors(tensors, partial / TENSORS)
            write_json({"step": step, **state}, partial / STATE)
            for file in [*partial.iterdir(), partial]:
                _sync(file)
            if target.exists():
                _remove(target)
            partial.rename(target)
            _sync(output)
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep is not None:
        # Newer ones are damaged, or this step has been gone back from: they are no reason to let
        # go of those that are good.
        older = [path for path in found(output) if _step(path) < step]
        for path in older[keep - 1 :]:
            _remove(path)
    return target


@contextmanager
def told_where(target: Path) -> Iterator[None]:
    """A file that cannot be written, such as on a full disk, as a CheckpointError naming it."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors does not raise OSError
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{target} could not be written: {reason}. Older checkpoints are safe: once there is "
            "room, the same command goes on from the newest"
        ) from error


def _remove(directory: Path) -> None:
    """Deletes a checkpoint; killed meanwhile, it is none any more, and `clean` finds the rest."""
    doomed = directory.with_name(f"{directory.name}.{os.getpid()}.old.partial")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def found(output: Path) -> list[Path]:
    """The whole checkpoints of a run, newest first; what a killed writer left is not among them."""
    named = [path for path in output.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in named if (path / STATE).exists()), key=_step, reverse=True)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("checkpoint-"))


def clean(output: Path) -> None:
    """Removes what killed writers left."""
    for path in output.glob("checkpoint-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    """(state, tensors) of a checkpoint, on the CPU. Raises CheckpointError naming the file."""
    state = read_state(directory)
    try:
        return state, load_file(directory / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / TENSORS} is damaged: {error}") from error


def read_state(directory: Path) -> dict:
    """What a checkpoint says of itself. Raises CheckpointError naming the file."""
    path = directory / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} is no checkpoint: it has no {STATE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path} is damaged: it names no step")
    return state


def made_of(output: Path) -> dict | None:
    """What run the checkpoints of a directory are of, as the newest readable one says."""
    for directory in found(output):
        with suppress(CheckpointError):
            return read_state(directory).get("made_of", {})
    return None


def newest(
    output: Path, made_of: dict, say: Callable[[str], None]
) -> tuple[dict, dict[str, Tensor]] | None:
    """State and tensors of the newest whole checkpoint of this very run; None without any.

    made_of: what the run is made of (config, data, model); a checkpoint of another run is refused
    raises:  CheckpointError showing the differences
    """
    for directory in found(output):
        try:
            state, tensors = read(directory)
        except CheckpointError as error:
            say(f"{error}; going back to the one before")
            continue
        refuse_others(directory, state.get("made_of", {}), made_of)
        return state, tensors
    return None


def refuse_others(directory: Path, theirs: dict, ours: dict) -> None:
    """Raises CheckpointError with each difference between two runs."""
    if theirs.get("kind") != ours.get("kind"):  # every other difference follows from it
        theirs, ours = ({"kind": run.get("kind")} for run in (theirs, ours))
    names = [k for k in (*ours, *(theirs.keys() - ours.keys())) if theirs.get(k) != ours.get(k)]
    if names:
        shown = [f"{k}: {theirs.get(k)!r:.200} there, {ours.get(k)!r:.200} here" for k in names]
        raise CheckpointError(
            f"{directory} was made by another run ({'; '.join(shown)}). Choose another output_dir, "
            "or overwrite_output_dir=true to begin anew and delete its checkpoints"
        )


def remove_all(output: Path) -> None:
    """Deletes the checkpoints of a run that begins anew."""
    for path in found(output):
        _remove(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # directories cannot be opened there
        return
    with suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, so that a later step does not change what is being written."""
    return {name: torch.clone(t.detach().cpu()) for name, t in tensors.items()}
