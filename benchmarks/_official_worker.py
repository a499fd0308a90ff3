"""Runs the official llm2vec inside its own environment; `benchmarks.official.run_many` starts it.

    python _official_worker.py DIRECTORY

reads DIRECTORY/requests.json (a list), writes DIRECTORY/replies.json (a list, in that order) and,
for vectors, DIRECTORY/<number>.npz. It must import nothing of llm2vec_fast, which that environment
does not have.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from llm2vec import LLM2Vec
from peft import PeftModel
from transformers import AutoTokenizer

SEPARATOR = "!@#$%^&*()"
SETTINGS = ("pooling_mode", "max_length", "doc_max_length", "skip_instruction")
CONFIGS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config"}


def encoder_settings(request: dict) -> dict:
    return {name: request[name] for name in SETTINGS if name in request}


def text_half(request: dict) -> LLM2Vec:
    """The official object without weights: enough for everything that happens to text."""
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    config = getattr(transformers, CONFIGS[request.get("family", "llama")])()
    config._name_or_path = request.get("name", "")
    return LLM2Vec(SimpleNamespace(config=config), tokenizer, **encoder_settings(request))


def tokenize(request: dict) -> dict:
    """Ids and pooled span of each row, one text per call; None where the official code crashes."""
    encoder = text_half(request)
    rows = [tokenize_one(encoder, *row) for row in request["rows"]]
    return {"ids": [row and row[0] for row in rows], "spans": [row and row[1] for row in rows]}


def tokenize_one(encoder: LLM2Vec, instruction: str, text: str) -> tuple | None:
    try:
        joined = encoder.prepare_for_tokenization(encoder._convert_to_str(instruction, text))
        features = encoder.tokenize([joined])
        ids = features["input_ids"][0][features["attention_mask"][0] == 1].long().tolist()
        # Each position's state is its own unit vector, so that the official pooling itself tells
        # which positions it pools. (A text with several BOS gives several rows: the first counts.)
        weights = encoder.get_pooling(features, torch.eye(len(ids))[None])[0]
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    pooled = weights.nonzero().flatten().tolist() or [0, -1]
    return ids, [pooled[0], pooled[-1] + 1]


def shorten(request: dict) -> dict:
    """The texts after the official shortening to doc_max_length."""
    encoder = text_half(request)
    joined = [encoder._convert_to_str("", text) for text in request["texts"]]
    return {"texts": [text.removeprefix(SEPARATOR) for text in joined]}


def load(request: dict) -> LLM2Vec:
    encoder = LLM2Vec.from_pretrained(
        request["model"],
        enable_bidirectional=request.get("enable_bidirectional", True),
        torch_dtype=getattr(torch, request.get("dtype", "float32")),
        **encoder_settings(request),
    )
    for adapter in request.get("adapters", ()):
        encoder.model = PeftModel.from_pretrained(encoder.model, adapter).merge_and_unload()
    return encoder


def encode(request: dict, vectors_path: Path) -> dict:
    """Vectors of the rows, and the seconds that `encode` takes after a warm-up."""
    started = time.perf_counter()
    encoder = load(request)
    loaded = time.perf_counter() - started
    rows, seconds = request["rows"], []
    options = {"batch_size": request.get("batch_size", 32), "show_progress_bar": False}
    options["device"] = request.get("device")
    encoder.encode(rows[: request.get("warmup_rows", options["batch_size"])] or rows, **options)
    for _ in range(request.get("repeats", 1)):
        started = time.perf_counter()
        vectors = encoder.encode(rows, **options)
        seconds.append(time.perf_counter() - started)
    np.savez(vectors_path, vectors=vectors.numpy())
    return {
        "vectors": vectors_path.name,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "load_seconds": loaded,
    }


def main(directory: Path) -> None:
    requests = json.loads((directory / "requests.json").read_text(encoding="utf-8"))
    replies = []
    for number, request in enumerate(requests):
        if request.get("threads"):
            torch.set_num_threads(request["threads"])
        action = request["action"]
        if action == "encode":
            replies.append(encode(request, directory / f"{number}.npz"))
        else:
            replies.append({"tokenize": tokenize, "shorten": shorten}[action](request))
    (directory / "replies.json").write_text(json.dumps(replies), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
