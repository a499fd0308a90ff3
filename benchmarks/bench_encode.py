"""Texts to vectors, end to end: ours, the official llm2vec, and stock transformers, in one run.

    python -m benchmarks.bench_encode --device cpu

The text is real and skewed: docstrings of Python's standard library. All compute the same vectors
(bidirectional, mean pooling, official truncation), which is checked. Stock transformers gets its
texts sorted by length and its own best batch size, official llm2vec (which sorts by characters) its
best batch size too. Rounds are interleaved, so that a slow minute of the machine hits everybody.
Tokens are real tokens, never padding; the share is of matrix products measured in each round.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import official
from benchmarks.measure import forward_flop, matmul_rate, median, seconds_of, write_rows
from llm2vec_fast import LLM2Vec
from llm2vec_fast.demo import docstrings, ensure_model

MAX_LENGTH = 512
BATCHES = (4, 8, 16, 32)


class Stock:
    """transformers' own model with sdpa, texts sorted by length, padded batches."""

    def __init__(self, model: Path, device: str, dtype: torch.dtype):
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        config = AutoConfig.from_pretrained(model)
        config.is_causal = False  # on the config object: the only spelling that takes effect
        self.model = AutoModel.from_pretrained(
            model, config=config, dtype=dtype, attn_implementation="sdpa"
        )
        self.model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.device = device

    @torch.inference_mode()
    def encode(self, texts: list[str], batch_size: int) -> np.ndarray:
        ids = self.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out = np.empty((len(ids), self.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            hidden = self.model(**batch, use_cache=False).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = (hidden * mask).sum(1, dtype=torch.float32) / mask.sum(1)
            out[rows] = pooled.cpu().numpy()
        return out


def sample(count: int) -> list[str]:
    """Docstrings drawn with a fixed seed, none over the limit (truncation is not what is timed)."""
    texts = [text for _, text in docstrings()]
    random.Random(0).shuffle(texts)
    return texts[:count]


def best_batch(run: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """The fastest of BATCHES by one timing each, and all timings."""
    timings = {size: run(size) for size in BATCHES}
    return min(timings, key=timings.__getitem__), timings


def official_encode(model: Path, texts: list[str], batch_size: int, repeats: int = 1) -> dict:
    return official.run(
        {
            "action": "encode", "model": str(model), "rows": texts, "batch_size": batch_size,
            "max_length": MAX_LENGTH, "doc_max_length": MAX_LENGTH, "repeats": repeats,
            "warmup_rows": 8, "threads": torch.get_num_threads(),
        }
    )  # fmt: skip


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest 1 - cosine between two sets of vectors."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return float(1 - (a * b).sum(axis=1).min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M, prepared once")
    parser.add_argument("--no-official", action="store_true", help="leave official llm2vec out")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/*.json")
    args = parser.parse_args()
    if not args.no_official:
        official.python_of_env()  # raises now rather than after minutes, if it is missing
    path = args.model or ensure_model()
    ours = LLM2Vec.from_pretrained(
        path,
        device=args.device,
        compat="official",
        max_length=MAX_LENGTH,
        doc_max_length=MAX_LENGTH,
    )
    stock = Stock(path, args.device, ours.dtype)
    texts = [t for t in sample(2 * args.texts) if len(ours.tokenizer.ids_of(t)) <= MAX_LENGTH]
    texts = texts[: args.texts]
    lengths = [len(t) for t in ours.tokenizer(texts, [""] * len(texts))]
    probe = texts[: max(32, args.texts // 4)]
    size, timings = best_batch(lambda b: seconds_of(lambda: stock.encode(probe, b), args.device))
    print(f"stock transformers, seconds by batch size: {timings}", flush=True)
    runs: dict[str, Callable[[], tuple[float, np.ndarray]]] = {
        "llm2vec_fast": lambda: _timed(lambda: ours.encode(texts, convert_to_numpy=True), args),
        f"transformers sorted, batch {size}": lambda: _timed(
            lambda: stock.encode(texts, size), args
        ),
    }
    if not args.no_official:
        best, timings = best_batch(lambda b: official_encode(path, probe, b)["seconds"])
        print(f"official llm2vec, seconds by batch size: {timings}", flush=True)

        def run_official() -> tuple[float, np.ndarray]:
            reply = official_encode(path, texts, best)
            return reply["seconds"], reply["vectors"]

        runs[f"official llm2vec, batch {best}"] = run_official
    rows = measure(runs, ours, lengths, args)
    for row in rows:
        print(
            f"{row['what']:36} {row['tokens_per_s']:7.0f} tokens/s {row['docs_per_s']:6.1f} docs/s "
            f"{row['share_of_matmul']:6.1%} of matmul, ours is {row['ours_is_faster']:.2f}x, "
            f"1-cos {row['distance']:.1e}"
        )
    if args.write:
        print(write_rows(f"bench_encode-{torch.device(args.device).type}", rows))


def _timed(run: Callable[[], np.ndarray], args) -> tuple[float, np.ndarray]:
    kept = []
    seconds = seconds_of(lambda: kept.append(run()), args.device)
    return seconds, kept[0]


def measure(runs, ours: LLM2Vec, lengths: list[int], args) -> list[dict]:
    """Interleaved rounds; medians, and ratios taken within each round."""
    config, tokens = ours.model.config, sum(lengths)
    work, seconds, shares, vectors = forward_flop(config, lengths), {}, {}, {}
    for turn in range(args.rounds):
        rates = []
        for name, run in runs.items():
            rates.append(matmul_rate(config, ours.dtype, args.device, 1.0))
            took, vectors[name] = run()
            seconds.setdefault(name, []).append(took)
        rate = max(rates)
        for name in runs:
            shares.setdefault(name, []).append(work / seconds[name][-1] / rate)
        told = ", ".join(f"{name} {tokens / s[-1]:.0f}" for name, s in seconds.items())
        print(f"round {turn + 1}: matmul {rate / 1e9:.0f} GFLOP/s; tokens/s: {told}", flush=True)
    mine = seconds["llm2vec_fast"]
    return [
        {
            "what": name,
            "model": Path(ours.sources.name).name,
            "dtype": str(ours.dtype).removeprefix("torch."),
            "device": args.device,
            "texts": len(lengths),
            "tokens": tokens,
            "rounds": args.rounds,
            "seconds": median(seconds[name]),
            "all_seconds": seconds[name],
            "tokens_per_s": tokens / median(seconds[name]),
            "docs_per_s": len(lengths) / median(seconds[name]),
            "share_of_matmul": median(shares[name]),
            "ours_is_faster": median([b / a for a, b in zip(mine, seconds[name], strict=True)]),
            "distance": distance(vectors["llm2vec_fast"], vectors[name]),
        }
        for name in runs
    ]


if __name__ == "__main__":
    main()
