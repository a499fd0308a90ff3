"""The bulk job: does it cost anything beside the encoder? How it grows is bench_scale's question.

    python -m benchmarks.bench_corpus real --write

SmolLM2-135M on real skewed text (docstrings of Python's library, or `--text FILE`, one
line a document): `corpus.embed`, from a file on disk to fsynced shards, against `encode` alone on
the same texts in memory, in turn. Both have the model loaded.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from benchmarks.measure import median, write_rows
from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed
from llm2vec_fast.demo import docstrings, ensure_model


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("real",))
    parser.add_argument("--model", type=Path, help="real: default SmolLM2-135M, prepared once")
    parser.add_argument("--text", type=Path, help="real: a file, a line a document")
    parser.add_argument("--documents", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/*.json")
    args = parser.parse_args()
    rows = real(args)
    if args.write:
        of = f"{args.what}-{args.text.stem}" if args.text else args.what
        print(write_rows(f"bench_corpus-{of}-cpu", rows))


if __name__ == "__main__":
    main()
