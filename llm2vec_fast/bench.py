"""A user's own model on a user's own texts: ours against stock transformers, in one run.

Both make the same vectors, which is checked: one copy of the weights with adapters merged, the same
token ids (made anew in each run), the same mask, pooled alike. Compared is the rest: packed batches
and our operations against padded batches and transformers' own model with sdpa, its texts sorted by
length at their fastest batch size, and as they come. Rounds take turns: a slow minute hits all;
ratios are taken within a round. Tokens are real ones, shares of matrix products of the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm2vec_fast import ops
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model.transformer import Transformer
from llm2vec_fast.model.weights import unfused
from llm2vec_fast.model.work import forward_flop, matmul_rate, seconds_of
from llm2vec_fast.settings import POOLING
from llm2vec_fast.text import Tokens

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # texts in a padded batch
ARRIVAL = 32  # what libraries take where nobody asks
CPU_TOKENS = 16_384  # in a padded batch on a CPU, where more takes memory and is no faster
HEADS = ("tokens/s", "docs/s", "of\nmatmul", "peak\nMB", "ours is\nfaster", "min\ncosine")
PASSES = 20  # of ours over all texts: about what finding sizes and two rounds take in all


def stock_model(model: Transformer, attention: str = "sdpa"):
    """transformers' own model on the memory of ours, its attention looking where ours looks."""
    from transformers import AutoConfig, AutoModel

    told = dict(model.config.source)
    config = AutoConfig.for_model(told.pop("model_type"), **told)
    # On the config object: as an argument of from_pretrained it is ignored without a word.
    config.is_causal = model.causal
    if not model.causal:  # with the causal mask the sliding window goes too
        config.sliding_window = None
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * config.num_hidden_layers
    with torch.device("meta"):
        stock = AutoModel.from_config(config, attn_implementation=attention)
    stock.load_state_dict(dict(unfused(model)), assign=True)
    # No weight, so that its buffers are still on meta: the only ones.
    stock.rotary_emb = type(stock.rotary_emb)(config).to(model.embed.weight.device)
    return stock.requires_grad_(False).eval()


class Stock:
    """transformers' own model on the weights of ours, without a copy; padded batches."""

    def __init__(self, ours: LLM2Vec):
        if ours.describe()["dtype"] == "fp8":
            raise ValueError("it has no such fp8: compare with --dtype bfloat16")
        self.tokenizer, self.device = ours.tokenizer, ours.device
        self.pooling = POOLING[ours.settings["pooling_mode"]]
        self.model = stock_model(ours.model)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], size: int, by_length: bool) -> np.ndarray:
        """(N, D) fp32 vectors, `size` texts in a batch; zero for a text without tokens."""
        tokens = self.tokenizer(texts, [""] * len(texts))
        order = [i for i, text in enumerate(tokens) if len(text)]
        if by_length:
            order.sort(key=lambda i: -len(tokens[i]))
        out = torch.zeros(len(tokens), self.model.config.hidden_size, device=self.device)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            out[torch.tensor(rows, device=out.device)] = self._pooled([tokens[i] for i in rows])
        return out.cpu().numpy()

    def _pooled(self, texts: list[Tokens]) -> torch.Tensor:
        ids = [torch.from_numpy(text.ids).long() for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.device)
        longest, lengths = ids.shape[1], torch.tensor([[len(text)] for text in texts])
        mask = (torch.arange(longest) < lengths).long().to(self.device)
        states = self.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        spans = [(n * longest + t.start, n * longest + t.end) for n, t in enumerate(texts)]
        return ops.pool(states.flatten(0, 1), torch.tensor(spans, device=ids.device), self.pooling)

    def best_size(self, texts: Sequence[str], sizes: Sequence[int]) -> int:
        """The fastest, sorted; tried upwards until two in a row are slower or memory is full."""
        timings: dict[int, float] = {}
        self.encode(texts[:1], 1, True)
        for size in sizes:
            try:
                timings[size] = seconds_of(partial(self.encode, texts, size, True), self.device)
            except torch.OutOfMemoryError:
                break
            if min(timings.values()) < min(list(timings.values())[-2:]):
                break
        return min(timings or sizes, key=lambda size: timings.get(size, 0.0))


@dataclass
class Rival:
    """One way to make the vectors, and what was measured of it; `error` says why it stopped."""

    name: str
    run: Callable[[], np.ndarray] | None = None
    error: str = ""
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # of the rate of matrix products
    peak_mb: float | None = None  # weights and activations on a GPU; a CPU does not tell
    vectors: np.ndarray | None = None

    def measure(self, device: torch.device, work: float, rate: float) -> None:
        """One run of `work` FLOP, where matrix products reach `rate` FLOP/s."""
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.seconds.append(seconds_of(self._run, device))
        self.shares.append(work / self.seconds[-1] / rate)
        if device.type == "cuda":
            self.peak_mb = torch.cuda.max_memory_allocated(device) / 2**20

    def _run(self) -> None:
        self.vectors = self.run()

    def row(self, ours: Rival, tokens: int) -> dict:
        """Medians over the rounds, and what they are beside ours, as JSON."""
        if self.error:
            return {"rival": self.name, "error": self.error}
        middle = statistics.median(self.seconds)
        ratios = [b / a for a, b in zip(ours.seconds, self.seconds, strict=True)]
        a, b = (torch.from_numpy(x).double() for x in (ours.vectors, self.vectors))
        cosines = torch.cosine_similarity(a, b)[a.any(1)]  # an empty text has no direction
        return {
            "rival": self.name, "rounds": len(ratios), "all_seconds": self.seconds,
            "tokens_per_s": tokens / middle, "docs_per_s": len(a) / middle,
            "of_matmul": statistics.median(self.shares), "peak_mb": self.peak_mb,
            "ours_is_faster": statistics.median(ratios), "all_ratios": ratios,
            "min_cosine": min([1.0, *cosines.tolist()]),
        }  # fmt: skip


def compare(
    model: LLM2Vec, texts: Sequence[str], minutes: float = 1.0, tokens_per_batch: int | None = None
) -> Iterator[list[dict]]:
    """Rows as JSON, ours first, anew after each round: at least two, until the minutes are over.

    texts: as many of them are taken, from the first on, as two rounds have time for
    """
    until = time.perf_counter() + 60 * minutes
    encode = partial(model.encode, convert_to_numpy=True, tokens_per_batch=tokens_per_batch)
    asked, count = len(texts), _fitting(encode, texts, model.device, 60 * minutes / PASSES)
    texts = texts[:count]
    tokens = model.tokenizer(texts, [""] * len(texts))
    lengths = [len(text) for text in tokens]
    told = {
        "model": Path(model.sources.name).name,
        "adapters": [Path(name).name for name in model.sources.named_adapters],
        "dtype": model.describe()["dtype"], "device": str(model.device),
        "texts": len(texts), "asked": asked, "tokens": sum(lengths),
        "truncated": sum(text.status == "truncated" for text in tokens),
    }  # fmt: skip
    work, lasted = forward_flop(model.model.config, lengths), 0.0
    ours = Rival("llm2vec_fast", partial(encode, texts))
    rivals = [ours, *_stock_rivals(model, texts, max(lengths))]
    while len(ours.seconds) < 2 or time.perf_counter() + lasted < until:
        began = time.perf_counter()
        rate = matmul_rate(model.model.config, model.dtype, model.device, 0.2)
        for rival in rivals:
            try:
                if not rival.error:
                    rival.measure(model.device, work, rate)
            except Exception as error:
                if rival is ours:
                    raise
                rival.error = repr(error)[:200]
        lasted = time.perf_counter() - began
        yield [told | rival.row(ours, sum(lengths)) for rival in rivals]


def _fitting(encode: Callable, texts: Sequence[str], device, seconds: float) -> int:
    """How many texts, from the first on, ours embeds in about so many seconds; at least two."""
    count = 2
    encode(texts[:count])  # kernels are compiled, memory is taken
    while True:
        took = seconds_of(partial(encode, texts[:count]), device)
        if 2 * took > seconds or count >= len(texts):
            return min(len(texts), max(2, int(count * seconds / took)))
        count *= 2


def _stock_rivals(model: LLM2Vec, texts: Sequence[str], longest: int) -> list[Rival]:
    """transformers' two ways, or why it has none: that is no reason to end."""
    most = CPU_TOKENS // max(longest, 1) if model.device.type == "cpu" else SIZES[-1]
    sizes = [1, *(size for size in SIZES if 1 < size <= min(most, 2 * len(texts) - 1))]
    usual = max(size for size in sizes if size <= ARRIVAL)
    try:
        stock = Stock(model)
        best = stock.best_size(texts[: max(32, len(texts) // 4)], sizes)
    except Exception as error:
        return [Rival("transformers", error=repr(error)[:200])]
    return [
        Rival(f"transformers, sorted, batch {best}", partial(stock.encode, texts, best, True)),
        Rival(f"transformers, unsorted, batch {usual}", partial(stock.encode, texts, usual, False)),
    ]


def show(rows: list[dict], machine: dict) -> None:
    """One table for a person."""
    ours = rows[0]
    title = " + ".join([ours["model"], *ours["adapters"]])
    table = Table(title=escape(f"{title} in {ours['dtype']}"), title_justify="left")
    table.add_column("")
    for name in HEADS:
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        if "error" not in row:
            cells = [f"{row['tokens_per_s']:,.0f}", f"{row['docs_per_s']:,.1f}"]
            peak = row["peak_mb"]
            cells += [f"{row['of_matmul']:.0%}", "-" if peak is None else f"{peak:,.0f}"]
        if cells and row is not ours:
            span = f"{min(row['all_ratios']):.2f}-{max(row['all_ratios']):.2f}"
            cells += [f"{row['ours_is_faster']:.2f}x\n{span}", f"{row['min_cosine']:.6f}"]
        table.add_row(row["rival"].replace(", ", "\n", 1), *cells)
    lines = [f"{row['rival']} did not run: {row['error']}" for row in rows if "error" in row]
    lines.append(
        f"{ours['texts']} of {ours['asked']} texts (what the minutes allow), {ours['tokens']:,} "
        f"tokens, {ours['truncated']} truncated; medians and range of {ours['rounds']} rounds"
    )
    chip = machine["gpu"] if ours["device"].startswith("cuda") else machine["cpu"]
    lines.append(f"{chip}; torch {machine['torch']}, transformers {machine['transformers']}")
    Console().print(table, *map(escape, lines), sep="\n")
