"""From the start of a process to its first vector, and the latency of one short query.

    python -m benchmarks.bench_startup --write

Ours against stock transformers (AutoModel, AutoTokenizer, sdpa, mean pooling, bidirectional), from
the same files in the same dtype; 1-cos is how far their vectors are apart. On a CPU SmolLM2-135M;
on a GPU random weights in the shapes of SmolLM2-135M and Mistral-7B, written to a temporary
directory with a tokenizer trained on the spot.

start: every turn is a process of its own, rivals take turns, and the clock runs from before the
process is made until the vector of one query is on the host. Each rival has run once before, so
that files and Triton's kernels come from caches; `empty kernel cache` compiles them. Stages add up
to the whole. latency: one process, calls of both in turn, text to vector on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks._startup_worker import OURS, STOCK
from benchmarks.measure import RESULTS, median, write_rows
from benchmarks.shapes import MODELS, model_of, real_texts
from llm2vec_fast.demo import MODEL_DIR, ensure_model
from llm2vec_fast.model import ModelConfig, weights
from llm2vec_fast.settings import choose_device, choose_dtype

SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
SHIPPED = ["shipped:smollm2-135m-mntp", "shipped:smollm2-135m-simcse"]
COLD_KERNELS = f"{OURS}, empty kernel cache"
TEXTS = 20_000  # docstrings that a tokenizer is trained on


def ask(spec: dict, rival: str, minutes: float, **more) -> dict:
    """What the process of a rival prints. Raises RuntimeError with its last words."""
    env = dict(os.environ)
    with tempfile.TemporaryDirectory() as empty:
        if rival == COLD_KERNELS:
            env["TRITON_CACHE_DIR"] = empty
        told = json.dumps(spec | {"rival": rival, "began": time.time()} | more)
        command = [sys.executable, "-m", "benchmarks._startup_worker", told]
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=max(60 * minutes, 60)
        )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        raise RuntimeError(f"{rival}: {last[0]}"[:300])
    return json.loads(done.stdout.splitlines()[-1])


def start_rows(spec: dict, rounds: int, until: float) -> Iterator[list[dict]]:
    """The rows of all rivals, anew after every round; the first, which fills caches, is not one."""
    rivals = {OURS: {}, STOCK: {}}
    if spec["device"] != "cpu":
        rivals[COLD_KERNELS] = {}
    if spec["model"].endswith(MODEL_DIR):
        rivals[f"{OURS}, {len(SHIPPED)} adapters"] = {"adapters": SHIPPED}
    turns: dict[str, list[dict]] = {name: [] for name in rivals}
    for turn in range(rounds + 1):
        began = time.perf_counter()
        for name, more in rivals.items():
            turns[name].append(ask(spec, name, (until - began) / 60, **more))
        told = {name: round(found[-1]["seconds"], 2) for name, found in turns.items()}
        print(f"{spec['name']}, round {turn}{' (not counted)' * (not turn)}: {told}", flush=True)
        if not turn:
            turns = {name: [] for name in rivals}
            continue
        yield [_start_row(spec, name, turns) for name in rivals]
        if time.perf_counter() + (time.perf_counter() - began) > until:
            return


def _start_row(spec: dict, name: str, turns: dict[str, list[dict]]) -> dict:
    found = turns[name]
    row = _about(spec, "start", name) | {
        "rounds": len(found),
        "seconds": median([turn["seconds"] for turn in found]),
        "all_seconds": [turn["seconds"] for turn in found],
        "stages": {s: median([turn["stages"][s] for turn in found]) for s in found[0]["stages"]},
    }
    if name == STOCK:
        pairs = zip(turns[OURS], found, strict=True)
        row["ours_is_faster"] = median([b["seconds"] / a["seconds"] for a, b in pairs])
        row["1-cos"] = distance(turns[OURS][0]["vector"], found[0]["vector"])
    return row


def latency_rows(spec: dict, calls: int, until: float) -> list[dict]:
    minutes = (until - time.perf_counter()) / 60
    rows = []
    for tokens, found in ask(spec, "latency", minutes, calls=calls).items():
        times = {name: sorted(ms) for name, ms in found["ms"].items()}
        for name, ms in times.items():
            row = _about(spec, "latency of one query", name) | {"tokens": int(tokens)}
            row |= {"calls": len(ms), "ms": median(ms)}
            row |= {f"p{p}": ms[min(len(ms) - 1, len(ms) * p // 100)] for p in (20, 80, 99)}
            if name == STOCK:
                row["ours_is_faster"] = row["ms"] / median(times[OURS])
                row["1-cos"] = distance(found["vectors"][OURS], found["vectors"][STOCK])
            rows.append(row)
    return rows


def _about(spec: dict, what: str, rival: str) -> dict:
    about = {"op": "startup", "what": what, "model": spec["name"], "rival": rival}
    return about | {"device": spec["device"], "dtype": spec["dtype"], "page_cache": "warm"}


def distance(a: list[float], b: list[float]) -> float:
    """1 - cosine of two vectors."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    return 1 - torch.cosine_similarity(a, b, dim=0).item()


def random_model(name: str, shape: dict, folder: Path, device: str, dtype: str) -> Path:
    """A directory with random weights of a shape, as shards, and a tokenizer of its own.

    raises: OSError if the disk has no room for it
    """
    config = ModelConfig.from_dict(shape)
    need, free = 2 * config.n_parameters, shutil.disk_usage(folder).free
    if free < 1.2 * need:
        raise OSError(f"{folder} has {free / 1e9:.0f} GB free, {name} takes {need / 1e9:.0f}")
    directory = folder / name
    directory.mkdir()
    with mock.patch.dict(MODELS, {name: shape}):
        weights.save(model_of(name, device, getattr(torch, dtype)), directory)
    model_of.cache_clear()
    if device != "cpu":
        torch.cuda.empty_cache()  # the memory is wanted by others now
    (directory / "config.json").write_text(json.dumps(shape | {"torch_dtype": dtype}))
    _train_tokenizer(directory, shape["vocab_size"])
    return directory


def _train_tokenizer(directory: Path, vocabulary: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(real_texts(TEXTS), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))


def directories(chosen, folder: Path) -> dict[str, Callable[[], Path]]:
    """{name of a model: function that prepares its directory}"""
    if chosen.model:
        return {chosen.model.name: lambda: chosen.model}
    if chosen.device == "cpu":
        return {"SmolLM2-135M": ensure_model}
    return {
        f"{name} (random)": partial(random_model, name, shape, folder, chosen.device, chosen.dtype)
        for name, shape in (("SmolLM2-135M", SMOLLM2), ("Mistral-7B", MODELS["Mistral-7B"]))
    }


def line(row: dict) -> str:
    head = f"{row['what']:20} {row['model']:22} {row['rival']:32}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    if "stages" in row:
        stages = ", ".join(f"{stage} {s:.2f}" for stage, s in row["stages"].items())
        text = f"{head} {row['seconds']:6.2f} s ({stages})"
    else:
        text = f"{head} {row['tokens']:3} tokens {row['ms']:8.2f} ms, p99 {row['p99']:.2f}"
    if "ours_is_faster" in row:
        text += f", ours is {row['ours_is_faster']:.2f}x, 1-cos {row['1-cos']:.1e}"
    return text


def measure(
    spec: dict, prepare: Callable[[], Path], chosen, until: float, keep: Callable[[list], None]
) -> list[dict]:
    """All rows of one model; keep(rows so far) after each round. A failure becomes a row."""
    rows: list[dict] = []
    try:
        spec["model"] = str(prepare())
        began = time.perf_counter()
        for rows in start_rows(spec, chosen.rounds, began + 0.7 * (until - began)):
            keep(rows)
        rows = rows + latency_rows(spec, chosen.calls, until)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        rows = [*rows, _about(spec, "startup", "") | {"failed": f"{error}"[:300]}]
    keep(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="default: cuda if there is a GPU")
    parser.add_argument("--model", type=Path, help="a directory in place of the default models")
    parser.add_argument("--dtype", default="auto", help="of both: auto, float32, bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=15.0, help="no new round after that")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/*.json")
    parser.add_argument("--out", type=Path, help="write there instead")
    chosen = parser.parse_args()
    began, device = time.perf_counter(), choose_device(chosen.device, None)
    chosen.device = str(device)
    chosen.dtype = str(choose_dtype(chosen.dtype, device)).removeprefix("torch.")
    rows: list[dict] = []

    def keep(more: list[dict]) -> None:
        if chosen.write or chosen.out:
            write_rows(f"bench_startup-{device.type}", rows + more, chosen.out or RESULTS)

    with tempfile.TemporaryDirectory() as folder:
        found = directories(chosen, Path(folder))
        for n, (name, prepare) in enumerate(found.items(), 1):
            until = began + 60 * chosen.minutes * n / len(found)
            spec = {"name": name, "device": chosen.device, "dtype": chosen.dtype, "adapters": []}
            rows += measure(spec, prepare, chosen, until, keep)
    for row in rows:
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
