"""What fp8 costs in quality, on SmolLM2-135M with its shipped adapters, by simulation on a CPU.

    python -m benchmarks.fp8_quality --sts FILE --limit 200     # two minutes; --write: the rows

fp8 forms that keep different projections in bf16, against fp32 and bf16: Spearman's correlation
times 100 on the pairs of FILE, and 1-cos to the fp32 vectors of the same texts. The rule: Spearman
within 0.5 of bf16, 1-cos at most four times bf16's own. `bf16_share` is the part of the products'
work that stays in bf16, for this model and at the shape of Mistral-7B.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import write_rows
from benchmarks.shapes import MODELS
from llm2vec_fast import LLM2Vec
from llm2vec_fast.demo import ensure_model
from llm2vec_fast.evaluate.sts import Pairs, correlations, read_pairs
from llm2vec_fast.model import ModelConfig, Transformer, fp8

ADAPTERS = ["shipped:smollm2-135m-mntp", "shipped:smollm2-135m-simcse"]
STSB = Path(__file__).parents[2] / "shared/data/stsb/stsb-en-dev.csv"
KEEPS = (
    (), fp8.KEEP, ("down",), ("qkv",), ("0", "-1"), ("o", "down"), ("attn",), ("mlp",),
    ("qkv", "down"), ("attn", "0", "-1"), ("qkv", "mlp"),
)  # fmt: skip


def vectors(pairs: Pairs, dtype: str, keep: tuple[str, ...] | None = None) -> np.ndarray:
    """(2N, D) fp64 unit vectors of all first sentences, then of all second ones."""
    model = LLM2Vec.from_pretrained(ensure_model(), ADAPTERS, dtype=dtype, device="cpu")
    if keep is not None:
        fp8.quantize_(model.model, keep)
    texts = [*pairs.first, *pairs.second]
    # The simulation widens all weights at each batch: few of them.
    found = model.encode(texts, convert_to_numpy=True, tokens_per_batch=4096).astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def figures(pairs: Pairs, found: np.ndarray, exact: np.ndarray) -> dict:
    first, second = np.split(found, 2)
    off = 1 - (found * exact).sum(axis=1)
    return {
        "spearman": correlations((first * second).sum(axis=1), pairs.score)["spearman"],
        "mean_1_cos": float(off.mean()),
        "p99_1_cos": float(np.quantile(off, 0.99)),
    }


def bf16_share(config: ModelConfig, keep: tuple[str, ...]) -> float:
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    sizes = {n: p.numel() for n, p in model.layers.named_parameters() if p.dim() == 2}
    fp8.quantize_(model, keep)
    return sum(sizes[n] for n, _ in model.layers.named_parameters() if n in sizes) / sum(
        sizes.values()
    )


def measure(pairs: Pairs) -> Iterator[dict]:
    exact = vectors(pairs, "float32")
    yield {"form": "float32", **figures(pairs, exact, exact)}
    bf16 = figures(pairs, vectors(pairs, "bfloat16"), exact)
    yield {"form": "bfloat16", **bf16}
    configs = {
        "SmolLM2-135M": ModelConfig.from_file(ensure_model() / "config.json"),
        "Mistral-7B": ModelConfig.from_dict(MODELS["Mistral-7B"]),
    }
    for keep in KEEPS:
        found = figures(pairs, vectors(pairs, "bfloat16", keep), exact)
        found["spearman_off_bf16"] = found["spearman"] - bf16["spearman"]
        found["times_bf16"] = found["mean_1_cos"] / bf16["mean_1_cos"]
        found["within_spearman"] = abs(found["spearman_off_bf16"]) <= 0.5
        found["within_1_cos"] = found["times_bf16"] <= 4
        shares = {name: bf16_share(config, keep) for name, config in configs.items()}
        yield {"form": "fp8", "keep": list(keep), **found, "bf16_share": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sts", type=Path, default=STSB)
    parser.add_argument("--limit", type=int, help="only the first pairs")
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    told = parser.parse_args()
    pairs = read_pairs(told.sts, limit=told.limit)
    about = {"sts": told.sts.name, "pairs": len(pairs.score), "adapters": ADAPTERS}
    rows = []
    for row in measure(pairs):
        keep, times = "", ""
        if "keep" in row:
            keep = f" but {' '.join(row['keep']) or 'nothing'}"
            times = f", {row['times_bf16']:.1f} times bf16's"
        spearman, off = row["spearman"], row["mean_1_cos"]
        print(f"{row['form']}{keep}: Spearman {spearman:.2f}, 1-cos {off:.2e}{times}", flush=True)
        rows.append(about | row)
        if told.write:  # after each form: a run that is cut keeps what it has
            write_rows("fp8_quality-cpu", rows)


if __name__ == "__main__":
    main()
