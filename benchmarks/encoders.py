"""The rivals of bench_encode: each turns the same texts, or the same token ids, into vectors.

A rival is made once for a `Workload` (which may search for its best batch, or raise with the reason
why it cannot run here) and then called with it, or with a part of it. All pool by the mean, and all
but the official library, which has an environment of its own, compute on the same weights.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import official as official_library
from benchmarks.measure import seconds_of
from benchmarks.shapes import MAX_TOKENS, Workload, copy_of
from llm2vec_fast import LLM2Vec, ops
from llm2vec_fast.bench import stock_model
from llm2vec_fast.corpus import embed
from llm2vec_fast.text import Tokens

BATCH = 32
BATCHES = {"cpu": (4, 8, 16, 32), "cuda": (8, 32, 128)}
VARLEN = "llm2vec_fast_varlen"


@dataclass
class Ready:
    """A rival that can be called: `encode(work)` gives (N, D) vectors, or (seconds, vectors) where
    it times itself.

    way:           what a search chose
    padding_waste: share of the computed tokens that are padding; None if only it knows
    """

    encode: Callable[[Workload], np.ndarray | tuple[float, np.ndarray]]
    padding_waste: float | None = 0.0
    way: str = ""


@dataclass(frozen=True)
class Rival:
    """A row of the table. It enters with "ids" or "text", and leaves with vectors or shards."""

    name: str
    make: Callable[[Workload], Ready]
    enters: str = "ids"
    dtype: str | None = None  # None: that of the case


def fastest(seconds: Callable[[int], float], sizes: tuple[int, ...]) -> int:
    """The batch size of the least seconds, by one run of each after one to warm up; one that does
    not fit into memory ends the search, which goes upwards.
    """
    found: dict[int, float] = {}
    for size in sizes:
        try:
            if not found:
                seconds(size)
            found[size] = seconds(size)
        except torch.OutOfMemoryError:
            break
    if not found:
        raise RuntimeError(f"out of memory at its smallest batch, {sizes[0]}")
    return min(found, key=found.__getitem__)


def padding_waste(lengths: list[int], batch: int, by_length: bool) -> float:
    """Share of the tokens of padded batches that are padding."""
    batches = batches_of(lengths, batch, by_length)
    total = sum(len(rows) * max(lengths[i] for i in rows) for rows in batches)
    return 1 - sum(lengths) / total


def batches_of(lengths: list[int], batch: int, by_length: bool) -> list[list[int]]:
    """Texts in batches, longest first or as they come."""
    order = list(range(len(lengths)))
    if by_length:
        order.sort(key=lambda i: -lengths[i])
    return [order[at : at + batch] for at in range(0, len(order), batch)]


# Ours


def ours_ids(work: Workload) -> Ready:
    return Ready(lambda part: embed_ids(part.ours, part.ids))


def embed_ids(model: LLM2Vec, ids: list[np.ndarray]) -> np.ndarray:
    return model.embed_tokens([Tokens(text, 0, len(text)) for text in ids])()


def ours_fp8(work: Workload) -> Ready:
    from llm2vec_fast.model import fp8

    body = copy_of(work.ours.model)
    fp8.quantize_(body)
    model = LLM2Vec(body, None, work.ours.sources, work.ours.settings)
    kept = f"{', '.join(body.fp8_keep)} in bf16" if body.fp8_keep else "all in e4m3"
    return Ready(lambda part: embed_ids(model, part.ids), way=kept)


def ours_text(work: Workload) -> Ready:
    return Ready(lambda part: part.ours.encode(part.texts, convert_to_numpy=True))


def ours_shards(work: Workload) -> Ready:
    """`corpus.embed`, from a file to fsynced shards of float16; reading them back is not timed."""
    import pyarrow.parquet as pq

    folder, numbers = tempfile.TemporaryDirectory(prefix="bench-encode-"), itertools.count()

    def encode(part: Workload) -> tuple[float, np.ndarray]:
        place = Path(folder.name) / str(next(numbers))
        place.mkdir()
        source = place / "texts.jsonl"
        lines = (json.dumps({"text": text}) + "\n" for text in part.texts)
        source.write_text("".join(lines), encoding="utf-8")
        rows = max(1, len(part) // 5)
        seconds = seconds_of(
            lambda: embed(source, part.ours, place / "out", rows_per_shard=rows,
                          show_progress=False), part.device,
        )  # fmt: skip
        shards = sorted((place / "out").glob("part-*.parquet"))
        columns = [pq.read_table(shard)["embedding"].to_pylist() for shard in shards]
        return seconds, np.array(list(itertools.chain(*columns)), dtype=np.float32)

    return Ready(encode)


# transformers, padded


@torch.inference_mode()
def padded(model, ids: list[np.ndarray], batch: int, by_length: bool) -> np.ndarray:
    """Vectors of padded batches."""
    device = model.rotary_emb.inv_freq.device
    out = torch.empty(len(ids), model.config.hidden_size, device=device)
    for rows in batches_of([len(text) for text in ids], batch, by_length):
        ids_BL, mask_BL = (x.to(device) for x in pad([ids[i] for i in rows]))
        states = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
        mask_BL1 = mask_BL.unsqueeze(-1)
        pooled = (states.last_hidden_state * mask_BL1).sum(1, dtype=torch.float32) / mask_BL1.sum(1)
        out[torch.tensor(rows, device=device)] = pooled
    return out.cpu().numpy()


def pad(texts: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask, padded on the right."""
    lengths = torch.tensor([len(text) for text in texts])
    rows = [torch.from_numpy(text).long() for text in texts]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids_BL, (torch.arange(ids_BL.shape[1])[None] < lengths[:, None]).long()


def stock_batch(work: Workload) -> int:
    """The batch size at which stock transformers is fastest, sorted; searched for once."""
    if work.stock_batch is None:
        probe = work.probe()
        work.stock_batch = fastest(
            lambda size: seconds_of(lambda: padded(work.stock, probe.ids, size, True), work.device),
            BATCHES[work.device.type],
        )
    return work.stock_batch


def stock(work: Workload, batch: int | None = BATCH, by_length=True, text=False) -> Ready:
    """transformers' own model with sdpa. Without a batch size, its best one is searched for."""
    way = "" if batch else f"best batch {stock_batch(work)}"
    size = batch or stock_batch(work)
    waste = padding_waste(work.lengths, size, by_length)

    def encode(part: Workload) -> np.ndarray:
        ids = tokenized(work, part.texts) if text else part.ids
        return padded(work.stock, ids, size, by_length)

    return Ready(encode, waste, way)


def tokenized(work: Workload, texts: list[str]) -> list[np.ndarray]:
    told = work.tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return [np.array(ids, dtype=np.int32) for ids in told]


def compiled(work: Workload) -> Ready:
    """Sorted, in batches of 32, through torch.compile with dynamic shapes: a compilation for every
    length would never end.
    """
    if work.device.type != "cuda":
        raise RuntimeError("measured on a GPU only")
    torch.compiler.reset()
    model = stock_model(work.ours.model)
    model.forward = torch.compile(model.forward, dynamic=True)
    waste = padding_waste(work.lengths, BATCH, True)
    return Ready(lambda part: padded(model, part.ids, BATCH, True), waste, f"batch {BATCH}")


# transformers, without padding


def varlen(module, query, key, value, mask, scaling=None, **flat):
    """transformers' door for attention, opened with our choice of kernel."""
    q_TNH, k_TKH, v_TKH = (x[0].transpose(0, 1) for x in (query, key, value))
    o_TNH = ops.attention(
        q_TNH, k_TKH, v_TKH, flat["cu_seq_lens_q"], flat["max_length_q"], scale=scaling
    )
    return o_TNH.unsqueeze(0), None


def unpadded(work: Workload) -> Ready:
    """transformers' model on texts laid end to end in one row, as sentence-transformers 6 runs it
    where flash-attn is installed; here with the attention kernel that ours uses, so that it runs
    everywhere and the rest is what differs. At its best batch.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen)
    model, probe = stock_model(work.ours.model, VARLEN), work.probe()
    best = fastest(
        lambda size: seconds_of(lambda: flattened(model, probe.ids, size), work.device),
        BATCHES[work.device.type],
    )
    return Ready(lambda part: flattened(model, part.ids, best), way=f"best batch {best}")


@torch.inference_mode()
def flattened(model, ids: list[np.ndarray], batch: int) -> np.ndarray:
    """Vectors of batches without padding."""
    device = model.rotary_emb.inv_freq.device
    out = torch.empty(len(ids), model.config.hidden_size, device=device)
    for rows in batches_of([len(text) for text in ids], batch, True):
        lengths = torch.tensor([len(ids[i]) for i in rows])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
        ids_1T = torch.from_numpy(np.concatenate([ids[i] for i in rows])).long()[None].to(device)
        positions_1T = torch.cat([torch.arange(n) for n in lengths.tolist()])[None].to(device)
        longest = int(lengths.max())
        states = model(
            input_ids=ids_1T, position_ids=positions_1T, use_cache=False, cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds, max_length_q=longest, max_length_k=longest,
        )  # fmt: skip
        texts_T = torch.repeat_interleave(torch.arange(len(rows)), lengths).to(device)
        sums = torch.zeros(len(rows), out.shape[1], device=device)
        sums.index_add_(0, texts_T, states.last_hidden_state[0].float())
        out[torch.tensor(rows, device=device)] = sums / lengths.to(device)[:, None]
    return out.cpu().numpy()


def sentence_transformers(work: Workload) -> Ready:
    """The library itself, which un-pads where transformers finds flash-attn or, through the package
    `kernels`, one on the hub. Not tried yet: written against its sources (6.1).
    """
    from sentence_transformers import SentenceTransformer

    kind = {"attn_implementation": "flash_attention_2", "dtype": work.ours.dtype}
    model = SentenceTransformer(str(work.path), device=str(work.device), model_kwargs=kind)
    model.max_seq_length = MAX_TOKENS
    for module in model[0].modules():  # a config's key is too late for modules that exist
        for holder in (module, getattr(module, "config", None)):
            if hasattr(holder, "is_causal"):
                holder.is_causal = False
    if not model[0].can_flatten_inputs:
        raise RuntimeError("transformers finds no varlen kernel, so that it would pad")

    def encode(part: Workload, size: int) -> np.ndarray:
        return model.encode(part.texts, batch_size=size, show_progress_bar=False)

    probe = work.probe()
    best = fastest(
        lambda size: seconds_of(lambda: encode(probe, size), work.device),
        BATCHES[work.device.type],
    )
    return Ready(lambda part: encode(part, best), way=f"best batch {best}")


# Official llm2vec


def official(work: Workload) -> Ready:
    """llm2vec 0.2.3 at its best batch; it times itself, without its start."""
    kind, device = str(work.ours.dtype).removeprefix("torch."), work.device.type

    def request(part: Workload, size: int) -> dict:
        return {
            "action": "encode", "model": str(part.path), "rows": part.texts, "batch_size": size,
            "max_length": MAX_TOKENS, "doc_max_length": MAX_TOKENS, "skip_instruction": False,
            "warmup_rows": 8, "threads": torch.get_num_threads(), "dtype": kind,
            "device": device,
        }  # fmt: skip

    probe = work.probe()
    sizes = BATCHES[device]
    replies = official_library.run_many([request(probe, size) for size in sizes])
    best = min(zip(sizes, replies, strict=True), key=lambda tried: tried[1]["seconds"])[0]

    def encode(part: Workload) -> tuple[float, np.ndarray]:
        reply = official_library.run(request(part, best))
        return reply["seconds"], reply["vectors"]

    return Ready(encode, None, f"best batch {best}")


RIVALS = {
    "ours": Rival("llm2vec_fast", ours_ids),
    "fp8": Rival("llm2vec_fast fp8", ours_fp8, dtype="fp8"),
    "unpadded": Rival("transformers un-padded", unpadded),
    "best": Rival("transformers sorted, best batch", functools.partial(stock, batch=None)),
    "sorted": Rival("transformers sorted, batch 32", stock),
    "arrival": Rival(
        "transformers as it comes, batch 32", functools.partial(stock, by_length=False)
    ),
    "compiled": Rival("transformers compiled", compiled),
    "ours text": Rival("llm2vec_fast", ours_text, "text"),
    "ours shards": Rival("llm2vec_fast to shards", ours_shards, "text"),
    "best text": Rival(
        "transformers sorted, best batch", functools.partial(stock, batch=None, text=True), "text"
    ),
    "arrival text": Rival(
        "transformers as it comes, batch 32",
        functools.partial(stock, by_length=False, text=True), "text",
    ),
    "sentence-transformers": Rival(
        "sentence-transformers un-padded", sentence_transformers, "text"
    ),
    "official": Rival("official llm2vec", official, "text"),
}  # fmt: skip
