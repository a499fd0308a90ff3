"""One rival of bench_startup in a process of its own, timed from before the process was made.

    python -m benchmarks._startup_worker SPEC

SPEC, as JSON: {"rival": "transformers" | "latency" | any other is ours, "began": time.time() before
the process was made, "model": directory, "adapters", "device", "dtype", "calls"}. Prints a line of
JSON: seconds, stages and vector of a start, or the milliseconds of interleaved calls.
"""

from __future__ import annotations

# The standard library alone: what else a process needs is imported where the clock sees it.
import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from unittest import mock

OURS, STOCK = "llm2vec_fast", "transformers"
WORDS = "how to read the text of a file and then find all the names in it with one call".split()
QUERY_TOKENS = (8, 32)
WARM_UP = 10


class Clock:
    """Seconds of each stage since the moment when the process was asked for."""

    def __init__(self, began: float):
        self.began = self.last = began
        self.stages: dict[str, float] = {}

    def stamp(self, stage: str) -> None:
        """What has passed since the last stamp was `stage`; the device's work counts as done."""
        torch = sys.modules.get("torch")
        if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.time()  # the same clock in every process
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self.last
        self.last = now

    def around(self, stage: str, run: Callable) -> Callable:
        """`run`, whose time goes to `stage`, and what came before it to `config`."""

        def timed(*args, **kwargs):
            self.stamp("config")
            out = run(*args, **kwargs)
            self.stamp(stage)
            return out

        return timed


def ours(spec: dict, clock: Clock) -> Callable[[str], list[float]]:
    """text -> vector by llm2vec_fast. What is not a named stage of loading is `config`."""
    from llm2vec_fast import LLM2Vec, encoder

    clock.stamp("imports")
    _start_device(spec["device"], clock)
    with contextlib.ExitStack() as stack:
        for holder, name, stage in (
            (encoder, "make_tokenizer", "tokenizer"),
            (encoder.weights, "load", "weights"),
            (encoder.lora, "merge", "merge"),
            (encoder, "check_attention_mode", "check"),
        ):
            timed = clock.around(stage, getattr(holder, name))
            stack.enter_context(mock.patch.object(holder, name, timed))
        model = LLM2Vec.from_pretrained(
            spec["model"], spec["adapters"] or None, device=spec["device"], dtype=spec["dtype"],
            template="none", skip_instruction=False,  # pools all tokens, as stock does
        )  # fmt: skip
    clock.stamp("config")
    return lambda text: model.encode(text).tolist()


def stock(spec: dict, clock: Clock) -> Callable[[str], list[float]]:
    """text -> vector by transformers; on a GPU straight to the device where accelerate is there."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    clock.stamp("imports")
    _start_device(spec["device"], clock)
    config = AutoConfig.from_pretrained(spec["model"])
    config.is_causal = False  # on the config object: the only spelling that takes effect
    clock.stamp("config")
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    clock.stamp("tokenizer")
    straight = spec["device"] != "cpu" and importlib.util.find_spec("accelerate")
    model = AutoModel.from_pretrained(
        spec["model"], config=config, dtype=getattr(torch, spec["dtype"]),
        attn_implementation="sdpa", **({"device_map": spec["device"]} if straight else {}),
    )  # fmt: skip
    model = model.to(spec["device"]).eval()
    clock.stamp("weights")

    @torch.inference_mode()
    def run(text: str) -> list[float]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"].to(spec["device"])
        hidden = model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[0].mean(0, dtype=torch.float32).tolist()

    return run


def _start_device(device: str, clock: Clock) -> None:
    if device != "cpu":
        import torch

        torch.zeros(1, device=device)
        clock.stamp("device")


def work(spec: dict) -> dict:
    """What a process prints: stages and vector of a start, or times of interleaved calls."""
    clock = Clock(spec["began"])
    clock.stamp("interpreter")
    if spec["rival"] == "latency":
        return latency(spec, {OURS: ours(spec, clock), STOCK: stock(spec, clock)})
    run = (stock if spec["rival"] == STOCK else ours)(spec, clock)
    vector = run(" ".join(WORDS))
    clock.stamp("first vector")
    return {"seconds": clock.last - clock.began, "stages": clock.stages, "vector": vector}


def latency(spec: dict, rivals: dict[str, Callable[[str], list[float]]]) -> dict:
    """{tokens: {"ms": {rival: milliseconds of each call}, "vectors": {rival: vector}}}"""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(spec["model"]), {}
    for tokens in QUERY_TOKENS:
        text = text_of(tokens, lambda text: len(tokenizer(text)["input_ids"]))
        vectors = {name: [run(text) for _ in range(WARM_UP)][-1] for name, run in rivals.items()}
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(spec["calls"]):
            for name, run in rivals.items():
                began = time.perf_counter()
                run(text)
                times[name].append(1e3 * (time.perf_counter() - began))
        found[str(tokens)] = {"ms": times, "vectors": vectors}
    return found


def text_of(tokens: int, count: Callable[[str], int]) -> str:
    """Words that are `tokens` tokens. Raises ValueError if no words give that number."""
    text = ""
    for n in range(50 * tokens):
        longer = f"{text} {WORDS[n % len(WORDS)]}".strip()
        text = longer if count(longer) <= tokens else text
        if text and count(text) == tokens:
            return text
    raise ValueError(f"no text of {tokens} tokens could be put together from {WORDS}")


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
