"""How cost grows: with documents, shards, tokens of a document, and dimensions of a vector.

    python -m benchmarks.bench_scale documents --write       # 10^3 to 10^7
    python -m benchmarks.bench_scale shards --write          # 10 to 10^4, of 16 documents each
    python -m benchmarks.bench_scale lengths --write
    python -m benchmarks.bench_scale dimensions --write
    python -m benchmarks.bench_scale estimate --write        # a billion documents, by arithmetic

`documents`, `shards`: `llm2vec-fast embed` in a process of its own, of a tiny random model, watched
from outside. `seconds` is what embed itself reports, `beside_s` the rest of the process (imports,
loading, the end). Then the same command again, which finds everything done: `resume_s` and
`resume_beside_s`. `skip_s` is what a rank takes to pass by the whole input, none of it its own.
`time_exponent` is the slope of log seconds against log documents: 1 is linear.
`lengths`: equally many tokens in texts of 16 to 8,192. `attention_of_flop` is arithmetic,
`attention_of_time` measured by torch's profiler in the same passes.
`dimensions`: bytes on disk against the bytes of the vectors, and the time to write them.
`estimate`: arithmetic from the slopes measured here and from a speed of GPUs that is assumed.

Each call replaces its own row of benchmarks/results/bench_scale-cpu.json, after every point, and
leaves the others'. Temporary files go where TMPDIR says; 10^7 documents take about 2.5 GB.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import RESULTS, forward_flop, median, write_rows
from benchmarks.shapes import MEDIAN, MODELS, P99, SIGMA, random_ids
from benchmarks.watch import watch
from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed
from llm2vec_fast.corpus.read import Columns, Rows, open_sources
from llm2vec_fast.corpus.worker import ROWS_PER_SHARD
from llm2vec_fast.demo import ensure_model
from llm2vec_fast.doctor import machine
from llm2vec_fast.model import ModelConfig
from llm2vec_fast.text import Tokens

NAME = "bench_scale-cpu"
WORDS = [name for name in sorted(sys.stdlib_module_names) if not name.startswith("_")]
DISK = 300  # bytes of a document, input and output, with something to spare
STEADY = 20  # shards of a run from which on its memory tells of growth, not of the start
SMALL_SHARD = 16
LENGTHS = (16, 64, 256, 1024, 4096, 8192)
# Our kernel, and torch's for long texts, as the profiler calls them.
ATTENTION = ("llm2vec_fast_cpu::attention", "aten::scaled_dot_product_attention")
WIDTHS = (48, 96, 192, 384, 768, 1024)
CUTS = (64, 256, 1024)
BYTES = {"float32": 4, "float16": 2, "int8": 1, "binary": 1 / 8}
GPUS = (1, 8, 64)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(slope, value at 0) of the straight line nearest to two points or more."""
    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(start)


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """k of y ~ x^k; None where there is one point only."""
    return line(np.log(x), np.log(y))[0] if len(x) > 1 else None


def columns_of(points: Sequence[dict], *keys: str) -> list[list[float]]:
    return [[point[key] for point in points] for key in keys]


def tiny_model(directory: Path, width: int = 64, tokenizer: Path | None = None) -> Path:
    """One layer of random weights, with SmolLM2's tokenizer where no other is given."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    heads = max(2, width // 64)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy((tokenizer or ensure_model()) / name, directory / name)
    return directory


def write_input(path: Path, documents: int, words: int) -> None:
    """jsonl of so many documents of random words, no more than a line of it in memory."""
    free = shutil.disk_usage(path.parent).free
    if free < documents * DISK:
        raise SystemExit(
            f"{documents} documents need about {documents * DISK / 1e9:.1f} GB in {path.parent}, "
            f"which has {free / 1e9:.1f} GB: set TMPDIR to a larger disk, or give --most"
        )
    noise = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(noise.choices(WORDS, k=words))
            file.write(f'{{"id": {number}, "text": "{text}"}}\n')


def one_corpus(folder: Path, model: Path, documents: int, rows_per_shard: int, words: int) -> dict:
    """A point: so many documents embedded, and the same command again."""
    source, output = folder / "texts.jsonl", folder / "out"
    write_input(source, documents, words)
    command = [
        sys.executable, "-m", "llm2vec_fast", "embed", str(source), "--model", str(model),
        "--output", str(output), "--id-column", "id", "--dtype", "float32", "--device", "cpu",
        "--rows-per-shard", str(rows_per_shard), "--json",
    ]  # fmt: skip
    told, seen, memory = watch(command)
    again, seen_again, _ = watch(command)
    assert (told["documents"], again["reused"]) == (documents, documents)
    began = time.perf_counter()
    with Rows(open_sources([str(source)])[0], Columns()) as rows:
        rows.skip(documents)
    skip_s = time.perf_counter() - began
    names = os.listdir(output)
    shards = sum(name.startswith("part-") for name in names)
    late = memory[memory[:, 0] > seen["process_s"] - 0.8 * told["seconds"]]  # caches are warm
    mb_per_s = line(*late.T)[0] if shards >= STEADY and len(late) > 1 else None
    return {
        "documents": documents, "shards": shards, "tokens": told["tokens"],
        "seconds": told["seconds"], "beside_s": seen.pop("process_s") - told["seconds"],
        "documents_per_s": documents / told["seconds"], "stages": told["stages"], **seen,
        "growth_mb_per_million": mb_per_s and mb_per_s * told["seconds"] / documents * 1e6,
        "output_bytes": told["bytes"], "input_bytes": source.stat().st_size,
        "manifest_bytes": (output / "manifest.json").stat().st_size, "entries": len(names),
        "resume_s": again["seconds"], "resume_beside_s": seen_again["process_s"] - again["seconds"],
        "skip_s": skip_s,
    }  # fmt: skip


def corpora(
    counts: Sequence[int], rows_per_shard: int, words: int = 8, tokenizer: Path | None = None
) -> Iterator[dict]:
    """The row, with one point more after each corpus."""
    row: dict = {"rows_per_shard": rows_per_shard, "words": words, "points": []}
    with tempfile.TemporaryDirectory() as made:
        model = tiny_model(Path(made), tokenizer=tokenizer)
        for documents in counts:
            with tempfile.TemporaryDirectory() as folder:
                point = one_corpus(Path(folder), model, documents, rows_per_shard, words)
            row["points"].append(point)
            print(point, flush=True)
            yield row | slopes(row["points"])


def slopes(points: list[dict]) -> dict:
    """How time grows with documents; what memory and a resume did in the largest corpus."""
    pairs = itertools.pairwise(points)
    last = points[-1]
    return {
        "time_exponent": exponent(*columns_of(points, "documents", "seconds")),
        "exponents_between": [exponent(*columns_of(p, "documents", "seconds")) for p in pairs],
        "growth_mb_per_million": last["growth_mb_per_million"],
        "resume_ms_per_shard": 1000 * last["resume_s"] / last["shards"],
    }


def powers(low: int, most: int) -> list[int]:
    """10^low and so on, and `most` itself as the last."""
    return [10**n for n in range(low, 20) if 10**n < most] + [most]


def documents(args) -> Iterator[dict]:
    yield from corpora(powers(3, args.most or 10**7), ROWS_PER_SHARD)


def shards(args) -> Iterator[dict]:
    """Far more shards than their documents need: what a shard costs by itself."""
    counts = [SMALL_SHARD * count for count in powers(1, args.most or 10**4)]
    yield from corpora(counts, SMALL_SHARD, words=1)


def lengths(args) -> Iterator[dict]:
    points: list[dict] = []
    with tempfile.TemporaryDirectory() as made:
        models = {"tiny": (tiny_model(Path(made)), args.tokens)}
        most = max(args.most or LENGTHS[-1], LENGTHS[0])
        chosen = [length for length in LENGTHS if length <= most]
        models["SmolLM2-135M"] = ensure_model(), max(chosen[-1], args.tokens // 8)
        for name, (path, tokens) in models.items():
            model = LLM2Vec.from_pretrained(path, device="cpu")
            one_length(model, 16, 256, 1)  # warm
            for length in chosen:
                point = {"model": name, "dtype": str(model.dtype).removeprefix("torch.")}
                points.append(point | one_length(model, length, tokens, args.rounds))
                print(points[-1], flush=True)
                yield {"rounds": args.rounds, "points": points}


def one_length(model: LLM2Vec, length: int, tokens: int, rounds: int) -> dict:
    """A point: texts of one length, `tokens` in all; the median of rounds."""
    config, count = model.model.config, max(1, tokens // length)
    texts = [Tokens(ids, 0, length) for ids in random_ids([length] * count, config.vocab_size)]
    seconds, shares = [], []
    for _ in range(rounds):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            began = time.perf_counter()
            model.embed_tokens(texts)()
            seconds.append(time.perf_counter() - began)
        spent = {event.key: event.cpu_time_total for event in profile.key_averages()}
        shares.append(sum(spent.get(name, 0.0) for name in ATTENTION) / 1e6 / seconds[-1])
    flop, second = forward_flop(config, [length]), median(seconds)
    return {
        "length": length, "texts": count, "tokens_per_s": count * length / second,
        "gflop_per_s": count * flop / second / 1e9, "all_seconds": seconds,
        "attention_of_flop": attention_flop(config) * length**2 / flop,
        "attention_of_time": median(shares),
    }  # fmt: skip


def attention_flop(config: ModelConfig) -> float:
    """FLOP of attention of one token with one other: what of `forward_flop` grows as n^2."""
    return (forward_flop(config, [2]) - 2 * forward_flop(config, [1])) / 2


def dimensions(args) -> Iterator[dict]:
    row: dict = {"documents": args.documents, "widths": [], "forms": []}
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "texts.jsonl"
        write_input(source, args.documents, 1)
        for width in WIDTHS:
            path = tiny_model(Path(made) / str(width), width)
            model = LLM2Vec.from_pretrained(path, device="cpu", dtype="float32")
            runs = [one_form(source, model, "float16", width) for _ in range(args.rounds)]
            write_us = median([run["write_us_per_document"] for run in runs])
            row["widths"].append(runs[0] | {"write_us_per_document": write_us})
            print(row["widths"][-1], flush=True)
        for precision, cut in itertools.product(BYTES, CUTS):  # of the last model, the widest
            row["forms"].append(one_form(source, model, precision, cut))
            print(row["forms"][-1], flush=True)
    written = columns_of(row["widths"], "vector_bytes", "write_us_per_document")
    row["write_us_per_byte"] = line(*written)[0]
    for precision in BYTES:
        forms = [form for form in row["forms"] if form["precision"] == precision]
        slope, beside = line(*columns_of(forms, "vector_bytes", "bytes_per_document"))
        row[precision] = {"per_vector_byte": slope, "beside": beside}
    yield row


def one_form(source: Path, model: LLM2Vec, precision: str, cut: int) -> dict:
    """A point: what a document takes on disk, and to write."""
    with tempfile.TemporaryDirectory() as output:
        told = embed(
            source, model, output, id_column="id", precision=precision, truncate_dim=cut,
            show_progress=False,
        )  # fmt: skip
    return {
        "precision": precision, "dimension": cut, "vector_bytes": cut * BYTES[precision],
        "bytes_per_document": told.bytes / told.documents,
        "write_us_per_document": 1e6 * told.stages["write"] / told.documents,
    }  # fmt: skip


def mean_tokens() -> float:
    """Of log-normal lengths with MEDIAN and P99."""
    return MEDIAN * math.exp(SIGMA**2 / 2)


def gpu_speed(config: ModelConfig, flop_per_s: float) -> float:
    """Tokens/s of log-normal documents: body, and attention by the mean of squared lengths."""
    pair = attention_flop(config)
    squares = MEDIAN**2 * math.exp(2 * SIGMA**2)
    return flop_per_s / (forward_flop(config, [1]) - pair + pair * squares / mean_tokens())


def cost(
    corpus: dict, forms: dict, *, documents: int, gpus: int, tokens_per_s: float, dimension: int
) -> dict:
    """What documents in one file take on so many GPUs, by arithmetic; vectors in float16.

    corpus, forms: the rows of `documents` and `dimensions`
    """
    most = corpus["points"][-1]
    tokens, shards = documents * mean_tokens(), math.ceil(documents / ROWS_PER_SHARD)
    seconds = tokens / tokens_per_s / gpus
    stored = forms["float16"]["per_vector_byte"] * 2 * dimension + forms["float16"]["beside"]
    text = tokens * most["input_bytes"] / most["tokens"]
    written_s = documents / gpus * forms["write_us_per_byte"] * 2 * dimension / 1e6
    skipped_s = text * most["skip_s"] / most["input_bytes"] * (gpus > 1)
    return {
        "gpus": gpus, "hours": seconds / 3600, "disk_tb": documents * stored / 1e12,
        "input_tb": text / 1e12, "shards": shards, "shard_mb": ROWS_PER_SHARD * stored / 1e6,
        "entries_of_directory": shards + 1 + gpus,  # the manifest, a summary a rank
        "manifest_bytes": most["manifest_bytes"],
        "resume_s": shards * corpus["resume_ms_per_shard"] / 1000,
        "share_of_time": {  # of a rank's host, beside its GPU
            "tokenising": tokens_per_s * most["stages"]["tokenise"] / most["tokens"],
            "writing": written_s / seconds, "passing by others' input": skipped_s / seconds,
        },
    }  # fmt: skip


def estimate(args) -> Iterator[dict]:
    rows = read_rows()
    if missing := [name for name in ("documents", "dimensions") if name not in rows]:
        raise SystemExit(f"measure first, with --write: {', '.join(missing)}")
    speed, why = args.tokens_per_s, "given"
    if not speed:
        config = ModelConfig.from_dict(MODELS[args.shape])
        speed = gpu_speed(config, args.share * args.sustained_tflops * 1e12)
        why = f"assumed: {args.share} of {args.sustained_tflops} TFLOP/s, {args.shape} in bf16"
    given = {"documents": args.documents, "tokens_per_s": speed, "dimension": args.dimension}
    corpus, forms = rows["documents"], rows["dimensions"]
    points = [cost(corpus, forms, gpus=gpus, **given) for gpus in GPUS]
    print(*points, sep="\n")
    yield {
        "kind": "arithmetic from the slopes of documents and dimensions; no GPU has run it",
        "speed_of_a_gpu": why, **given, "precision": "float16", "rows_per_shard": ROWS_PER_SHARD,
        "tokens_of_a_document": {"median": MEDIAN, "p99": P99, "mean": mean_tokens()},
        "measured": {"documents": corpus["utc"], "up to": corpus["points"][-1]["documents"],
                     "dimensions": forms["utc"]},
        "points": points,
    }  # fmt: skip


def read_rows(directory: Path = RESULTS) -> dict[str, dict]:
    """{measurement: its row} of what was written before."""
    path = directory / f"{NAME}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {row["what"]: row for row in rows}


def keep_row(what: str, row: dict, directory: Path = RESULTS) -> Path:
    """Replaces one row. Each has its own time and machine; the file has those of the last."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"what": what, "utc": now, "machine": machine()} | row
    return write_rows(NAME, list((read_rows(directory) | {what: row}).values()), directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = {run.__name__: run for run in (documents, shards, lengths, dimensions, estimate)}
    parser.add_argument("what", choices=runs)
    parser.add_argument("--most", type=int, help="the largest of documents, shards or lengths")
    parser.add_argument("--documents", type=int, help="dimensions: 8192; estimate: 10^9")
    parser.add_argument("--tokens", type=int, default=65_536, help="lengths; SmolLM2: an eighth")
    parser.add_argument("--rounds", type=int, default=3, help="lengths, dimensions")
    parser.add_argument("--dimension", type=int, default=4096, help="estimate")
    parser.add_argument("--tokens-per-s", type=float, help="estimate: of a GPU; else assumed from")
    parser.add_argument("--shape", choices=list(MODELS), default="Mistral-7B")
    parser.add_argument("--sustained-tflops", type=float, default=790, help="of bf16 products")
    parser.add_argument("--share", type=float, default=0.82, help="of them that a run reaches")
    parser.add_argument("--write", action="store_true", help=f"into benchmarks/results/{NAME}.json")
    args = parser.parse_args()
    for name in ("most", "documents", "tokens", "rounds", "dimension"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    args.documents = args.documents or (10**9 if args.what == "estimate" else 8192)
    for row in runs[args.what](args):
        if args.write:
            print(keep_row(args.what, row))
    told = {key: value for key, value in row.items() if key not in ("points", "forms", "widths")}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
