"""The bulk job: does it cost anything beside the encoder, and does it stay flat over a long corpus.

    python -m benchmarks.bench_corpus real --write
    python -m benchmarks.bench_corpus long --documents 1000000 --write

`real`: SmolLM2-135M on real skewed text (docstrings of Python's library, or `--text FILE`, one
line a document): `corpus.embed`, from a file on disk to fsynced shards, against `encode` alone on
the same texts in memory, in turn. Both have the model loaded.
`long`: short documents through a tiny random model with a real tokenizer: memory and speed by
tenths of the run, and how long a resume takes to reach its first job when a tenth and when nine
tenths are done. The interrupted runs end by an exception at that job.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import tempfile
import threading
import time
from pathlib import Path

import torch

from benchmarks.measure import median, write_rows
from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed
from llm2vec_fast.corpus import run as bulk
from llm2vec_fast.demo import docstrings, ensure_model

ROWS_PER_SHARD = 16_384


def real(args) -> list[dict]:
    model = LLM2Vec.from_pretrained(args.model or ensure_model(), max_length=512)
    if args.text:
        texts = args.text.read_text(encoding="utf-8", errors="replace").splitlines()
    else:
        texts = [" ".join(text.split()) for _, text in docstrings()]
    texts = [text for text in texts if text.strip()]
    random.Random(0).shuffle(texts)
    texts = texts[: args.documents or 300]
    tokens = sum(len(t) for t in model.tokenizer(texts, [""] * len(texts)))
    seconds: dict[str, list[float]] = {"encode": [], "embed": []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.txt"
        source.write_text("\n".join(texts) + "\n", encoding="utf-8")
        model.encode(texts[:32])
        for turn in range(args.rounds):
            began = time.perf_counter()
            model.encode(texts, show_progress_bar=False)
            seconds["encode"].append(time.perf_counter() - began)
            began = time.perf_counter()
            embed(
                source, model, Path(folder) / str(turn),
                rows_per_shard=max(1, len(texts) // 5), show_progress=False,
            )  # fmt: skip
            seconds["embed"].append(time.perf_counter() - began)
            print({name: round(tokens / s[-1]) for name, s in seconds.items()}, flush=True)
    ratios = [a / b for a, b in zip(seconds["encode"], seconds["embed"], strict=True)]
    row = {
        "what": "corpus.embed against encode alone", "model": "SmolLM2-135M",
        "text": args.text.name if args.text else "docstrings of Python's library",
        "dtype": str(model.dtype), "documents": len(texts), "tokens": tokens,
        "rounds": args.rounds, "embed_tokens_per_s": tokens / median(seconds["embed"]),
        "encode_tokens_per_s": tokens / median(seconds["encode"]),
        "share_of_encode": median(ratios), "all_shares": ratios,
    }  # fmt: skip
    print(f"{row['share_of_encode']:.1%} of encode's tokens/s")
    return [row]


def tiny_model(directory: Path) -> Path:
    """One layer of random weights, with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ensure_model() / name, directory / name)
    return directory


def resident_mb() -> float:
    """Memory that the process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


class Watch(threading.Thread):
    """(seconds, resident MB, finished shards) once a second."""

    def __init__(self, output: Path):
        super().__init__(daemon=True)
        self.output, self.samples, self.over = output, [], threading.Event()

    def run(self) -> None:
        began = time.perf_counter()
        while not self.over.wait(1.0):
            shards = sum(1 for _ in self.output.glob("part-*.parquet"))
            self.samples.append((time.perf_counter() - began, resident_mb(), shards))


def long(args) -> list[dict]:
    count = args.documents or 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        model = LLM2Vec.from_pretrained(tiny_model(Path(folder) / "model"), dtype="float32")
        source, output = Path(folder) / "texts.txt", Path(folder) / "out"
        words = [name for name, _ in docstrings()]
        noise = random.Random(0)
        with open(source, "w", encoding="utf-8") as file:
            for _ in range(count):
                file.write(" ".join(noise.choices(words, k=3)) + "\n")
        watch = Watch(output)
        watch.start()
        summary = embed(source, model, output, show_progress=False)
        watch.over.set()
        shards = sorted(output.glob("part-*.parquet"))
        row = {
            "what": "a long corpus of short documents", "documents": count,
            "tokens": summary.tokens, "seconds": summary.seconds, "shards": len(shards),
            "documents_per_s": count / summary.seconds, "stages": summary.stages,
            "tenths": _tenths(watch.samples, len(shards)),
        }  # fmt: skip
        for done in (0.9, 0.1):
            for path in shards[int(done * len(shards)) :]:
                path.unlink(missing_ok=True)
            key = f"seconds_to_first_job_of_resume_at_{done:.0%}"
            row[key] = _first_job(source, model, output)
    print({key: value for key, value in row.items() if key != "tenths"})
    for tenth in row["tenths"]:
        print(tenth)
    return [row]


def _tenths(samples, shards: int) -> list[dict]:
    """Seconds and the largest resident memory of each tenth of the shards."""
    tenths, before = [], 0.0
    for n in range(10):
        part = [s for s in samples if n * shards <= 10 * s[2] < (n + 1) * shards]
        if part:
            tenths.append({"seconds": part[-1][0] - before, "resident_mb": max(s[1] for s in part)})
            before = part[-1][0]
    return tenths


def _first_job(source: Path, model: LLM2Vec, output: Path) -> float:
    """Seconds from the call of embed to its first job's rows."""

    class Reached(Exception):
        pass

    def stop(*_):
        raise Reached

    began, honest = time.perf_counter(), bulk.prepare
    bulk.prepare = stop
    try:
        embed(source, model, output, show_progress=False)
    except Reached:
        return time.perf_counter() - began
    finally:
        bulk.prepare = honest
    raise AssertionError("there was nothing to resume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("real", "long"))
    parser.add_argument("--model", type=Path, help="real: default SmolLM2-135M, prepared once")
    parser.add_argument("--text", type=Path, help="real: a file, a line a document")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/*.json")
    args = parser.parse_args()
    rows = {"real": real, "long": long}[args.what](args)
    if args.write:
        of = f"{args.what}-{args.text.stem}" if args.text else args.what
        print(write_rows(f"bench_corpus-{of}-cpu", rows))


if __name__ == "__main__":
    main()
