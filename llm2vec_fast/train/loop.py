"""The training loop: steps, schedule, log, checkpoints. It never waits for the device.

Losses are read a few steps late; a loss or gradient that is not finite stops the run then, before
anything of it is saved.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_fast.model.checkpoint import write_json
from llm2vec_fast.train import checkpoint
from llm2vec_fast.train.config import Config, as_json
from llm2vec_fast.train.optimizer import Optimizer
from llm2vec_fast.train.progress import Progress
from llm2vec_fast.train.ranks import Ranks
from llm2vec_fast.train.work import Objective, Work

LOG, RESOLVED = "training_log.jsonl", "train_config.json"
LAG = 2  # steps after which a loss is read


class TrainingError(RuntimeError):
    """A training that cannot go on: its loss or gradient is not finite."""


@dataclass(frozen=True)
class Summary:
    """What a training has done; `steps` counts those of earlier runs that it resumed."""

    output: str
    steps: int
    tokens: int
    seconds: float
    loss: float | None  # of the last logged interval


@dataclass
class Loop:
    """One training. `evaluate(step)` gives figures to log; `save_model(directory)` writes what the
    training is for.
    """

    config: Config
    objective: Objective
    optimizer: Optimizer
    ranks: Ranks
    device: torch.device
    made_of: dict
    save_model: Callable[[Path], None]
    evaluate: Callable[[], dict[str, float]]
    progress: Progress

    def __post_init__(self) -> None:
        config = self.config
        self.output = Path(config.output_dir)
        epochs = math.ceil(config.num_train_epochs * self.objective.steps_per_epoch)
        self.total = config.max_steps if config.max_steps > 0 else epochs
        self.end = min(self.total, config.stop_after_n_steps or self.total)
        self.schedule = self._schedule()
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.pending: deque = deque()
        self.window: list[tuple[float, float]] = []  # losses and norms since the last line
        self.loss: float | None = None

    def _schedule(self):
        from transformers import get_scheduler  # takes seconds to import

        warmup = self.config.warmup_steps or math.ceil(self.config.warmup_ratio * self.total)
        if warmup >= self.end:  # the recipe's 300 steps, and a small data set
            self.progress.say(
                f"the run ends after {self.end} steps, within its warm-up of {warmup}: the "
                "learning_rate is never reached. Set warmup_steps or warmup_ratio"
            )
        return get_scheduler(
            self.config.lr_scheduler_type,
            self.optimizer.adamw,
            num_warmup_steps=warmup,
            num_training_steps=self.total,
        )

    def run(self) -> Summary:
        """Goes on from the newest checkpoint to the last step.

        raises: TrainingError naming step and batch if the loss is not finite, CheckpointError
        """
        self._resume()
        if self.ranks.rank == 0:
            with checkpoint.told_where(self.output / RESOLVED):
                self.output.mkdir(parents=True, exist_ok=True)
                write_json(as_json(self.config), self.output / RESOLVED)
        self.began = self.told = time.monotonic()
        self.told_tokens, self.told_flop = self.tokens, 0.0
        if self.step == 0:
            self._evaluate()
        # A thread begins on GPU 0, and would pin its memory through that.
        here = () if self.device.type != "cuda" else (torch.cuda.set_device, (self.device,))
        with ThreadPoolExecutor(1, "prepare", *here) as pool, self.progress:
            self.progress.start(self.step, self.end)
            ahead = pool.submit(self.objective.prepare, self.step) if self.step < self.end else None
            while ahead is not None:
                work = ahead.result()
                more = self.step + 1 < self.end
                ahead = pool.submit(self.objective.prepare, self.step + 1) if more else None
                self._one(work)
        with checkpoint.told_where(self.output):
            self.save_model(self.output)
        self.ranks.wait()  # gloo may abort a rank that leaves while another still works
        return Summary(str(self.output), self.step, self.tokens, self._elapsed(), self.loss)

    def _one(self, work: Work) -> None:
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.clear()
        loss = self.objective.backward(work)
        norm = self.optimizer.step(self.ranks)
        self.schedule.step()
        # Numbers are filled in, not copied: a copy from the host may wait for the GPU.
        counts = loss.new_empty(2, dtype=torch.double)
        counts[0].fill_(work.tokens)
        counts[1].fill_(work.flop)
        stats = torch.stack([loss.double(), norm.double() / self.ranks.world, *counts])
        stats = self.ranks.sum_(stats)
        stats[0] /= self.ranks.world
        self.step += 1
        self.pending.append((self.step, work.rows, rate, *self._fetch(stats)))
        config, last = self.config, self.step == self.end
        evaluates = last or (config.eval_steps and self.step % config.eval_steps == 0)
        saves = last or (config.save_strategy == "steps" and self.step % config.save_steps == 0)
        waits = evaluates or saves or self.device.type != "cuda"
        self._read(0 if waits else LAG)
        if saves:
            self._save()  # first: an evaluation is a user's code, and may fail
        if evaluates:
            self._evaluate()

    def _fetch(self, stats: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """Starts the copy to the host; the event says when it is there."""
        if self.device.type != "cuda":
            return stats, None
        host = torch.empty_like(stats, device="cpu", pin_memory=True)
        host.copy_(stats, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _read(self, lag: int) -> None:
        """Looks at the losses of all but the last `lag` steps, and logs them."""
        while len(self.pending) > lag:
            step, rows, rate, host, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, tokens, flop = host.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._stop(step, rows, loss, norm)
            self.tokens += int(tokens)
            self.told_flop += flop
            self.window.append((loss, norm))
            self.progress.step(step, loss, norm, rate, int(tokens))
            if step == self.end or step % self.config.logging_steps == 0:
                self._log(step, rate)

    def _stop(self, step: int, rows, loss: float, norm: float) -> None:
        kept = checkpoint.found(self.output)
        shown = ", ".join(map(str, rows[:8].tolist())) + ", ..." * (len(rows) > 8)
        raise TrainingError(
            f"step {step}: the loss is {loss}, the gradient's norm {norm}. The batch holds rows "
            f"{shown} of the training data{' on this rank' * (self.ranks.world > 1)}. "
            + (f"The last good checkpoint is {kept[0]}" if kept else "No checkpoint was made yet")
            + ". Lower learning_rate, or set torch_dtype to float32"
        )

    def _log(self, step: int, rate: float) -> None:
        now = time.monotonic()
        losses = [loss for loss, _ in self.window]
        self.loss = math.fsum(losses) / len(losses)
        seconds = max(now - self.told, 1e-9)
        line = {
            "step": step,
            "loss": self.loss,
            "grad_norm": max(norm for _, norm in self.window),
            "learning_rate": rate,
            "epoch": round(step / self.objective.steps_per_epoch, 4),
            "tokens": self.tokens,
            "tokens_per_s": round((self.tokens - self.told_tokens) / seconds),
            "seconds": round(self._elapsed(), 1),
        }
        if self.progress.rate:
            share = self.told_flop / seconds / self.progress.rate / self.ranks.world
            line["matmul_share"] = round(share, 3)
        self._write(line)
        self.window, self.told, self.told_tokens, self.told_flop = [], now, self.tokens, 0.0

    def _evaluate(self) -> None:
        """Figures of the model as it is; the time they take counts for no speed."""
        began = time.monotonic()
        figures = self.evaluate()
        if figures:
            self._write({"step": self.step, "tokens": self.tokens, **figures})
        self.told += time.monotonic() - began

    def _write(self, line: dict) -> None:
        if self.ranks.rank == 0:
            path = self.output / LOG
            with checkpoint.told_where(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.progress.line(line)

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began

    def _save(self) -> None:
        if self.ranks.rank == 0:
            state = {
                "made_of": self.made_of,
                "layout": self.optimizer.layout(),
                "tokens": self.tokens,
                "seconds": self._elapsed(),
                "loss": self.loss,
                "tokens_per_batch": self.objective.budget,
            }
            tensors = checkpoint.to_host(self.optimizer.tensors())
            keep = self.config.save_total_limit
            checkpoint.write(self.output, self.step, state, tensors, keep, self.save_model)
        self.ranks.wait()

    def _resume(self) -> None:
        """Takes over the newest checkpoint, and cuts the log back to its step."""
        asked = self.config.resume_from_checkpoint
        if self.ranks.rank == 0:
            checkpoint.clean(self.output)
            is_others = checkpoint.made_of(self.output) not in (None, self.made_of)
            replaces = asked is None and self.config.overwrite_output_dir and is_others
            if asked is False or replaces:
                checkpoint.remove_all(self.output)
        self.ranks.wait()
        if isinstance(asked, str):
            found = checkpoint.read(Path(asked))
            checkpoint.refuse_others(Path(asked), found[0].get("made_of", {}), self.made_of)
            there = checkpoint.made_of(self.output)
            if there is not None:
                checkpoint.refuse_others(self.output, there, self.made_of)
        else:
            found = checkpoint.newest(self.output, self.made_of, self.progress.say)
        self.ranks.agree("the step to go on from", found[0]["step"] if found else 0)
        # By free memory, so that it may differ between ranks and runs; masks and dropout depend on
        # how a step is cut, and a resumed run has to cut it as before.
        budget = found[0]["tokens_per_batch"] if found else self.objective.budget
        self.objective.budget = min(self.ranks.everyones(budget))
        if found:
            self._take_over(*found)
        if self.ranks.rank == 0:
            with checkpoint.told_where(self.output / LOG):
                cut_log(self.output / LOG, self.step)

    def _take_over(self, state: dict, tensors: dict[str, Tensor]) -> None:
        if state["layout"] != self.optimizer.layout():
            raise checkpoint.CheckpointError(f"{self.output}: its checkpoint has other weights")
        self.optimizer.restore(tensors)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.loss = state["loss"]
        with warnings.catch_warnings():
            # torch takes it for a mistake that the optimiser has not stepped as often.
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(self.step):
                self.schedule.step()
        self.progress.say(f"resuming after step {self.step} of {self.end}")


def cut_log(path: Path, step: int) -> None:
    """Drops the lines of steps that are about to be done again, and a line torn by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and told.get("step", 0) <= step and step:
            kept.append(line)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)
