"""Texts, or token ids, to vectors, end to end: ours against every rival, in one run.

    python -m benchmarks.bench_encode --device cpu --texts 100 --write
    python -m benchmarks.bench_encode --minutes 8 --out DIR          (on a GPU)
    python -m benchmarks.bench_encode --list

A case is a model, a set of lengths and a dtype: public shapes with random weights on random ids,
and SmolLM2-135M on real skewed text, docstrings of Python's library. All look both ways, pool by
the mean and give fp32 vectors on the host; vectors are compared with ours (the largest 1 - cosine
over the texts) and, on a few texts, with a pass of the references in fp32. Rivals take turns in
rounds, so that a slow minute hits them all; ratios are taken within a round. The first, in which
rivals are loaded and search for their best batch, warms up: it counts only where the time was up
before a second. Tokens are real tokens, never padding. `share_of_matmul` is of products measured
before every turn: the best of a large square and the model's own four shapes in that round, in the
dtype of the case (bf16 beside fp8, whose share may so pass 1). `peak_mb` is what a turn allocates
above what was there before, on a GPU; on a CPU, where rivals share a heap, it is not told.

A rival that cannot run has a row with the reason. The file is written anew after every turn, and
the run ends inside its minutes: what is most worth knowing is measured first. Only the CPU's cases
have run yet, none on a GPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import compare
from benchmarks.encoders import RIVALS, Ready, embed_ids
from benchmarks.measure import (
    RESULTS,
    OutOfTime,
    datasheet_rate,
    distance,
    ending,
    forward_flop,
    matmul_rate,
    median,
    seconds_of,
    write_rows,
)
from benchmarks.shapes import MODELS, Workload, copy_of, lengths_of, model_of
from llm2vec_fast import LLM2Vec, ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.demo import ensure_model
from llm2vec_fast.settings import choose_dtype

REAL = "SmolLM2-135M"
TRUTH = 4  # texts that the fp32 references compute too
# Seconds of each of five matrix products before every turn: over a case's turns about 3 s of each.
CEILING = 0.15
TOKENS = {"cpu": 4096, "cuda": 65_536}  # of random ids
TEXTS = {"cpu": (32, 100, 10), "cuda": (500, 4000, 1000)}  # at least, at most, a minute
PADDED = ("ours", "best", "unpadded", "sorted", "arrival")
TEXT = (
    "ours text", "best text", "official", "ours", "best", "unpadded", "sentence-transformers",
    "ours shards", "arrival text",
)  # fmt: skip
FP8, COMPILED = ("ours", "fp8"), ("ours", "compiled")


@dataclass(frozen=True)
class Bench:
    """A case: a model of MODELS or SmolLM2, a set of lengths, and who takes part."""

    model: str
    lengths: str
    dtype: str
    rivals: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model} {self.lengths} {self.dtype}"


def plan(device: str) -> list[Bench]:
    """All cases of a device, the most valuable first; a compilation, which may take long, last."""
    if device == "cpu":
        cases = [Bench(REAL, "docstrings", "float32", TEXT)]
        if choose_dtype("auto", torch.device("cpu")) == torch.bfloat16:
            cases.append(Bench(REAL, "docstrings", "bfloat16", TEXT))
        return cases + [
            Bench(REAL, kind, "float32", PADDED) for kind in ("fixed 512", "log-normal", "normal")
        ]
    first = [
        ("Mistral-7B", "fixed 512", PADDED), ("Mistral-7B", "log-normal", PADDED),
        ("S-LLaMA-1.3B", "log-normal", PADDED), ("S-LLaMA-1.3B", "fixed 512", PADDED),
        (REAL, "docstrings", TEXT),
        ("Mistral-7B", "fixed 512", FP8), ("Mistral-7B", "log-normal", FP8),
        ("Mistral-7B", "normal", PADDED), ("S-LLaMA-1.3B", "normal", PADDED),
    ]  # fmt: skip
    others = [
        (model, lengths, PADDED)
        for model in ("Llama-3-8B", "LLaMA-2-7B")
        for lengths in ("log-normal", "fixed 512", "normal")
    ]
    last = [("S-LLaMA-1.3B", "log-normal", COMPILED), ("Mistral-7B", "fixed 512", COMPILED)]
    return [Bench(model, kind, "bfloat16", who) for model, kind, who in first + others + last]


class Measurement:
    """One case: what each rival took in each round, and rows of what there is so far."""

    def __init__(self, case: Bench, work: Workload, save: Callable[[list[dict]], None]):
        self.case, self.work, self.save = case, work, save
        self.ready: dict[str, Ready] = {}  # also those that failed later
        self.failures: dict[str, str] = {}
        self.seconds: dict[str, dict[int, float]] = {key: {} for key in case.rivals}
        self.vectors: dict[str, np.ndarray] = {}
        self.peak_mb: dict[str, float | None] = {}
        self.rates: dict[int, float] = {}  # of matrix products, by round

    def run(self, rounds: int, until: float) -> list[dict]:
        """Rows after a round to warm up and `rounds` more; no new one is begun that would not fit,
        and what is under way at `until` is dropped.
        """
        try:
            with ending(until):
                self.truth = truth(self.work)
                for turn in range(rounds + 1):
                    began, self.preparing = time.perf_counter(), 0.0
                    for key in self.case.rivals:
                        if key not in self.failures:
                            self._or_fails(key, functools.partial(self._turn, turn=turn))
                    now = time.perf_counter()
                    if now + (now - began - self.preparing) > until:
                        break
        except OutOfTime:
            for key in self.case.rivals:
                if not self.seconds[key]:
                    self.failures.setdefault(key, "not measured: the time was up")
            self.save(self.rows())
        return self.rows()

    def _or_fails(self, key: str, step: Callable[[str], None]) -> None:
        try:
            step(key)
        except Exception as error:
            self.failures[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"[-500:]
            print(f"{self.case}: {RIVALS[key].name}: {self.failures[key]}", flush=True)
        self.save(self.rows())

    def _turn(self, key: str, turn: int) -> None:
        if key not in self.ready:
            self.preparing += seconds_of(lambda: self._prepare(key), self.work.device)
        config, dtype = self.work.ours.model.config, getattr(torch, self.case.dtype)
        rate = matmul_rate(config, dtype, self.work.device, CEILING)
        self.rates[turn] = max(self.rates.get(turn, 0.0), rate)
        kept, cuda = [], self.work.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = seconds_of(
            lambda: kept.append(self.ready[key].encode(self.work)), self.work.device
        )
        found = kept[0]
        own_seconds, self.vectors[key] = found if isinstance(found, tuple) else (seconds, found)
        self.seconds[key][turn] = own_seconds
        if cuda and key != "official":  # which runs in another process
            self.peak_mb[key] = (torch.cuda.max_memory_allocated() - before) / 2**20
        rate = sum(self.work.lengths) / own_seconds
        print(f"{self.case}: {RIVALS[key].name} ({RIVALS[key].enters}): {rate:.0f} tokens/s")

    def _prepare(self, key: str) -> None:
        self.ready[key] = RIVALS[key].make(self.work)

    def rows(self) -> list[dict]:
        return [self._row(key) for key in self.case.rivals if self._is_over(key)]

    def _is_over(self, key: str) -> bool:
        return key in self.failures or bool(self.seconds[key])

    def _row(self, key: str) -> dict:
        rival, work = RIVALS[key], self.work
        row = {
            "op": "encode", "model": self.case.model, "lengths": self.case.lengths,
            "dtype": rival.dtype or self.case.dtype, "rival": rival.name, "enters": rival.enters,
            "device": str(work.device), "texts": len(work), "tokens": sum(work.lengths),
            "longest": max(work.lengths),
        }  # fmt: skip
        if key in self.failures:
            row["error"] = self.failures[key]
        return row | self._figures(key, row["dtype"]) if self.seconds[key] else row

    def _figures(self, key: str, dtype: str) -> dict:
        work, ready, turns = self.work, self.ready[key], _counted(self.seconds[key])
        taken = list(turns.values())
        seconds = median(taken)
        rate = work.flop / seconds
        gpu = torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else "none"
        promised = datasheet_rate(gpu, dtype)
        figures = {
            "way": ready.way, "rounds": len(taken), "seconds": seconds,
            "p20": float(np.quantile(taken, 0.2)), "p80": float(np.quantile(taken, 0.8)),
            "all_seconds": taken,
            "tokens_per_s": sum(work.lengths) / seconds, "docs_per_s": len(work) / seconds,
            "padding_waste": ready.padding_waste,
            "tflop_per_s": rate / 1e12,
            "share_of_matmul": median([work.flop / s / self.rates[t] for t, s in turns.items()]),
            "share_of_datasheet": rate / promised if promised else None,
            "peak_mb": self.peak_mb.get(key),
            "distance_to_truth": distance(self.truth, self.vectors[key][: len(self.truth)]),
        }  # fmt: skip
        ours = "ours text" if RIVALS[key].enters == "text" else "ours"
        mine = _counted(self.seconds.get(ours, {}))
        ratios = [s / mine[turn] for turn, s in turns.items() if turn in mine]
        if ratios:
            figures |= {
                "ours_is_faster": median(ratios), "all_ratios": ratios,
                "distance_to_ours": distance(self.vectors[ours], self.vectors[key]),
            }  # fmt: skip
        return figures


def _counted(turns: dict[int, float]) -> dict[int, float]:
    """Without the first round, if there are others."""
    return {turn: s for turn, s in turns.items() if turn > 0} or turns


def truth(work: Workload) -> np.ndarray:
    """Vectors of the first few texts by the references in fp32."""
    ours = work.ours
    wide = LLM2Vec(copy_of(ours.model, torch.float32), None, ours.sources, ours.settings)
    with ops.use("reference"):
        return embed_ids(wide, work.head(TRUTH).ids)


def workload(case: Bench, chosen) -> Workload:
    tokens = chosen.tokens or TOKENS[chosen.device]
    if case.model in MODELS:
        return Workload.random(case.model, case.lengths, case.dtype, chosen.device, tokens)
    path = chosen.model or ensure_model()
    few, many, a_minute = TEXTS[chosen.device]
    texts = chosen.texts or int(min(many, max(few, a_minute * chosen.minutes)))
    return Workload.real(path, case.lengths, case.dtype, chosen.device, texts, tokens)


def measure(cases: Sequence[Bench], chosen, until: float, save) -> list[dict]:
    """Rows of all cases; each but the last may take half of the time that is left.

    save(rows) is called with all rows so far after every step
    """
    done: list[dict] = []
    for n, case in enumerate(cases):
        left = until - time.perf_counter()
        if left < 1:
            done.append({"op": "encode", "note": f"not measured, the time was up: {case}"})
            continue

        def keep(rows: list[dict], done=tuple(done)) -> None:
            save([*done, *rows])

        until_case = until if n == len(cases) - 1 else until - left / 2
        try:
            with ending(until_case):
                work = workload(case, chosen)
            new = Measurement(case, work, keep).run(chosen.rounds, until_case)
            del work
        except (Exception, OutOfTime) as error:
            told = f"{type(error).__name__}: {error}"[:500]
            new = [{"op": "encode", "model": case.model, "lengths": case.lengths,
                    "dtype": case.dtype, "error": told}]  # fmt: skip
        done += new
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for row in new:
            print(line(row), flush=True)
        save(done)
    save(done)
    return done


def line(row: dict) -> str:
    if "note" in row:
        return row["note"]
    head = f"{row['model']:13} {row['lengths']:11} {row['dtype']:9}"
    head += f" {row.get('enters', ''):4} {row.get('rival', ''):35}"
    if "seconds" not in row:
        return f"{head} {row['error']}"
    text = f"{head} {row['tokens_per_s']:8.0f} tokens/s {row['docs_per_s']:7.1f} docs/s"
    text += f" {row['share_of_matmul']:6.1%} of matmul"
    if row["share_of_datasheet"]:
        text += f" {row['share_of_datasheet']:6.1%} of datasheet"
    if row["padding_waste"]:
        text += f", {row['padding_waste']:.0%} padding"
    if row["peak_mb"] is not None:
        text += f", {row['peak_mb']:.0f} MB"
    text += f", 1-cos to truth {row['distance_to_truth']:.1e}"
    if "ours_is_faster" in row:
        text += f", to ours {row['distance_to_ours']:.1e}, ours is {row['ours_is_faster']:.2f}x"
    return text + (f" ({row['way']})" if row["way"] else "")


def cases(device: str) -> Iterator[compare.Case]:
    """For `benchmarks.cross_compile`: our forward pass and pooling on meta tensors, by Triton."""
    assert device == "meta", device
    for name in ("Mistral-7B", "S-LLaMA-1.3B"):
        model = model_of(name, device, torch.bfloat16)
        for kind in ("fixed 512", "log-normal", "fixed 2048"):
            lengths = lengths_of(kind, 16_384)

            def run(lengths=lengths, model=model):
                ids = [np.zeros(n, np.int32) for n in lengths]
                batch = PackedBatch.build(ids, device=device)
                with ops.use("triton"):
                    return ops.pool(model(batch), batch.spans, "mean")

            yield compare.Case(
                "encode", "forward", f"{name} {kind} T={sum(lengths)}", torch.bfloat16, tuple,
                {"ours triton": compare.forward(run)}, flop=forward_flop(model.config, lengths),
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="parts of the names of cases; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, help="docstrings; default: by the minutes")
    parser.add_argument("--tokens", type=int, help="of random ids")
    parser.add_argument("--model", type=Path, help=f"instead of {REAL}, which is prepared once")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/*.json")
    parser.add_argument("--out", type=Path, help="write there instead")
    chosen = parser.parse_args()
    until = time.perf_counter() + 60 * chosen.minutes
    chosen.device = torch.device(chosen.device).type
    todo = [c for c in plan(chosen.device) if all(part in str(c) for part in chosen.cases)]
    if chosen.list or not todo:
        print(*plan(chosen.device), sep="\n")
        return

    def save(rows: list[dict]) -> None:
        if chosen.write or chosen.out:
            write_rows(f"bench_encode-{chosen.device}", rows, chosen.out or RESULTS)

    measure(todo, chosen, until, save)


if __name__ == "__main__":
    main()
