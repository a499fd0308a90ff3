"""A training step: ours against transformers' Trainer with PEFT, tokens/s and memory, in one run.

    python -m benchmarks.bench_train --write

MNTP (chunks of 128 tokens) and SimCSE (sentences, attention dropout 0.3) with LoRA on all seven
projections: on a CPU SmolLM2-135M on docstrings of Python's library; on a GPU a Mistral-7B of
random weights on random ids, against the official configuration (gradient checkpointing) too.

Both train on the same rows, in the same order, with the same masks, in the same precision. The
Trainer is at its best: its rows a pass, checkpointing and attention are tried first, and what was
tried stands in the row. Rivals take turns, each turn in a process of its own, so that a slow minute
hits both and a peak is theirs alone. Tokens are real tokens, never padding. Memory: the peak while
training, and that above what the process held before its first step (on a CPU resident memory, on
a GPU torch's). Losses of MNTP's first step must agree: adapters change nothing yet.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.measure import RESULTS, median, write_rows
from benchmarks.recipe import sentences
from benchmarks.shapes import MODELS
from llm2vec_fast.demo import docstrings, ensure_model

RECIPE = {"lora_r": 16, "lora_dropout": 0.05}
KINDS = ("mntp", "simcse")
CPU_FIELDS = {
    "mntp": {"max_seq_length": 128, "per_device_train_batch_size": 8},
    "simcse": {"max_seq_length": 64, "per_device_train_batch_size": 32, "simcse_dropout": 0.3},
}
GPU_FIELDS = {
    "mntp": {"max_seq_length": 512, "per_device_train_batch_size": 32},
    "simcse": {"max_seq_length": 128, "per_device_train_batch_size": 128, "simcse_dropout": 0.3},
}
OURS, BEST, OFFICIAL = "llm2vec_fast", "Trainer + PEFT", "official configuration"


class WorkerError(RuntimeError):
    """What the process of a rival said last."""


@dataclass(frozen=True)
class Way:
    """One way to let the Trainer do a step: rows a pass (accumulated), and what it saves."""

    micro: int
    checkpointing: bool = False
    attention: str = "sdpa"
    dtype: str | None = None  # None: that of ours
    autocast: bool = False  # adapters kept in fp32 compute in bf16, as ours do

    def __str__(self) -> str:
        flags = {"checkpointing": self.checkpointing, "autocast": self.autocast}
        told = [f"{self.micro} rows a pass", self.attention, *(k for k, on in flags.items() if on)]
        return ", ".join(told + [self.dtype] * bool(self.dtype))


class Bench:
    """One kind of training on one model: rows, rivals, rounds."""

    def __init__(self, kind: str, chosen, folder: Path, until: float):
        self.kind, self.chosen, self.folder, self.until = kind, chosen, folder, until
        on_gpu = chosen.device != "cpu"
        batch = {} if chosen.batch is None else {"per_device_train_batch_size": chosen.batch}
        self.fields = RECIPE | (GPU_FIELDS if on_gpu else CPU_FIELDS)[kind] | batch
        self.batch = self.fields["per_device_train_batch_size"]
        self.model = "Mistral-7B" if on_gpu and chosen.model is None else str(chosen.model)
        self.spec = {
            "kind": kind, "model": self.model, "device": chosen.device,
            "rows": str(folder / f"{kind}.pt"), "dtype": "bfloat16" if on_gpu else "float32",
            "fields": self.fields | {
                "model_name_or_path": self.model, "output_dir": str(folder / "none"),
                "train_file": str(folder / f"{kind}.jsonl"), "device": chosen.device,
                "torch_dtype": chosen.dtype,
            },
        }  # fmt: skip
        if chosen.device == "cpu":
            write_texts(kind, folder / f"{kind}.jsonl", chosen.texts)

    def run(self) -> Iterator[list[dict]]:
        """The rows of all rivals, anew after every round."""
        self.rows = self.ask("rows", steps=1 + self.chosen.steps)
        self.spec["dtype"] = self.rows["dtype"]
        best, tried = self.best_way()
        rivals = {OURS: None, BEST: best}
        if self.chosen.device != "cpu":
            rivals[OFFICIAL] = Way(self.batch, checkpointing=True)
        turns: dict[str, list[dict]] = {name: [] for name in rivals}
        for turn in range(self.chosen.rounds):
            began = time.perf_counter()
            for name, way in rivals.items():
                turns[name].append(self.measure(way))
            told = {name: round(self.rate(found[-1])) for name, found in turns.items()}
            print(f"{self.kind}, round {turn + 1}, tokens/s: {told}", flush=True)
            yield [self.row(name, way, turns, tried) for name, way in rivals.items()]
            if time.perf_counter() + (time.perf_counter() - began) > self.until:
                return

    def best_way(self) -> tuple[Way, dict[str, dict]]:
        """The Trainer's fastest way in our precision, and what each way took."""
        tried: dict[str, dict] = {}
        rates: dict[Way, float] = {}
        enough = time.perf_counter() + 0.6 * (self.until - time.perf_counter())
        for way in self.ways():
            if rates and time.perf_counter() > enough:
                tried[str(way)] = {"error": "not tried: the time was up"}
            else:
                self.try_out(way, tried, rates)
        if rates and self.spec["dtype"] == "bfloat16":
            fastest = max(rates, key=rates.__getitem__)
            self.try_out(replace(fastest, autocast=True), tried, rates)
        if not rates:
            raise SystemExit(f"{self.kind}: the Trainer could run in no way: {tried}")
        return max(rates, key=rates.__getitem__), tried

    def try_out(self, way: Way, tried: dict[str, dict], rates: dict[Way, float]) -> None:
        try:
            found = self.measure(way, steps=1)
        except WorkerError as error:  # out of memory, most likely
            tried[str(way)] = {"error": str(error)}
        else:
            rate, peak = self.rate(found), round(found["peak_mb"])
            tried[str(way)] = {"tokens_per_s": round(rate, 1), "peak_mb": peak}
            if way.dtype is None:
                rates[way] = rate
        print(f"{self.kind}: {way}: {tried[str(way)]}", flush=True)

    def ways(self) -> list[Way]:
        whole = self.batch
        if self.kind == "simcse":  # in-batch negatives: the Trainer needs them in one pass
            return [Way(whole), Way(whole, attention="eager"), Way(whole, checkpointing=True)]
        sizes = [n for n in (8, 4, 2) if whole % n == 0 and n < whole]
        ways = [Way(n) for n in (whole, *sizes)] + [Way(whole, checkpointing=True)]
        others = [d for d in ("float32", "bfloat16") if d != self.spec["dtype"]]
        if self.chosen.device == "cpu":  # told, not taken: the precisions must be one
            ways += [Way(whole, dtype=dtype) for dtype in others]
        return ways

    def measure(self, way: Way | None, steps: int | None = None) -> dict:
        if way is None:
            return self.ask("ours", steps=steps or self.chosen.steps)
        return self.ask(
            "stock", steps=steps or self.chosen.steps, micro=way.micro,
            checkpointing=way.checkpointing, attention=way.attention, autocast=way.autocast,
            dtype=way.dtype or self.spec["dtype"],
        )  # fmt: skip

    def ask(self, rival: str, **more) -> dict:
        path = self.folder / "spec.json"
        path.write_text(json.dumps(self.spec | {"rival": rival, "warm_up": 1} | more))
        command = [sys.executable, "-m", "benchmarks._train_worker", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            raise WorkerError(f"{rival}: {last[0]}"[:300])
        return json.loads(done.stdout.splitlines()[-1])

    def rate(self, found: dict) -> float:
        """Real tokens a second in the steps after the warm-up."""
        passes = 2 if self.kind == "simcse" else 1
        count = len(found["seconds"])
        return passes * sum(self.rows["tokens"][1 : 1 + count]) / sum(found["seconds"])

    def row(self, name: str, way: Way | None, turns: dict[str, list[dict]], tried: dict) -> dict:
        found = turns[name]
        mine = turns[OURS]
        above = [turn["peak_mb"] - turn["loaded_mb"] for turn in found]
        own = [turn["peak_mb"] - turn["loaded_mb"] for turn in mine]
        row = {
            "what": f"{self.kind} step", "rival": name, "model": Path(self.model).name,
            "dtype": self.spec["dtype"], "device": self.chosen.device, **self.fields,
            "tokens_a_step": self.rows["tokens"], "padded_a_step": self.rows["padded"],
            "rounds": len(found), "steps_a_round": self.chosen.steps,
            "tokens_per_s": median([self.rate(turn) for turn in found]),
            "all_tokens_per_s": [self.rate(turn) for turn in found],
            "peak_mb": median([turn["peak_mb"] for turn in found]),
            "training_mb": median(above),
            "losses": found[0]["losses"],
        }  # fmt: skip
        if way is not None:
            pairs = list(zip(mine, found, strict=True))
            row |= {
                "way": str(way), "tried": tried,
                "ours_is_faster": median([self.rate(a) / self.rate(b) for a, b in pairs]),
                "ours_of_peak": median([a["peak_mb"] / b["peak_mb"] for a, b in pairs]),
                "ours_of_training_memory": median(own) / median(above),
            }  # fmt: skip
            if self.model not in MODELS:  # random weights are not the same
                differ = abs(mine[0]["losses"][0] - found[0]["losses"][0])
                row["first_losses_differ"] = differ
        return row


def write_texts(kind: str, path: Path, count: int) -> None:
    """Docstrings, or the sentences in them, in a fixed random order."""
    texts = [text for _, text in docstrings()]
    if kind == "simcse":
        prose = (re.sub(r"\s+", " ", text) for text in texts if ">>>" not in text)
        texts = [part for text in prose for part in sentences(text) if len(part.split()) > 5]
    texts = list(dict.fromkeys(texts))
    random.Random(0).shuffle(texts)
    lines = (json.dumps({"text": text}) for text in texts[:count])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(row: dict) -> str:
    text = f"{row['what']:12} {row['rival']:24} {row['tokens_per_s']:8.0f} tokens/s, peak "
    text += f"{row['peak_mb']:7.0f} MB, {row['training_mb']:7.0f} MB of it for training"
    if "way" in row:
        text += f" ({row['way']}); ours is {row['ours_is_faster']:.2f}x with "
        text += f"{row['ours_of_peak']:.0%} of the peak, {row['ours_of_training_memory']:.0%} of "
        text += "training's memory"
    if "first_losses_differ" in row:
        text += f"; first losses differ by {row['first_losses_differ']:.1e}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=KINDS, help="default: both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M; on a GPU a random 7B")
    parser.add_argument("--dtype", default="auto", help="of the base: auto, float32, bfloat16")
    parser.add_argument("--batch", type=int, help="rows or pairs of a step")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--minutes", type=float, default=40.0, help="no new round after that")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/*.json")
    parser.add_argument("--out", type=Path, help="write there instead")
    chosen = parser.parse_args()
    if chosen.device == "cpu" and chosen.model is None:
        chosen.model = ensure_model()
    began, rows, kinds = time.perf_counter(), [], [chosen.kind] if chosen.kind else KINDS
    name = f"bench_train-{torch.device(chosen.device).type}"
    with tempfile.TemporaryDirectory() as folder:
        for n, kind in enumerate(kinds):
            until = began + 60 * chosen.minutes * (n + 1) / len(kinds)
            new: list[dict] = []
            for new in Bench(kind, chosen, Path(folder), until).run():
                if chosen.write or chosen.out:
                    write_rows(name, rows + new, chosen.out or RESULTS)
            rows += new
            for row in new:
                print(line(row), flush=True)


if __name__ == "__main__":
    main()
