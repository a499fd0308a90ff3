"""The whole forward pass and pooling: ours, packed, against transformers with sdpa, padded.

    python -m benchmarks.bench_forward

Bidirectional, mean pooling, random weights at full size that both share (the same memory), random
ids. `sorted` gives transformers its texts by length, `arrival` as they come; both in batches of 32,
ours in batches of at most 16,384 tokens. Tokens are real ones: padding is transformers' own loss.
1-cos is the largest distance between our vectors and theirs.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.compare import Case, Prepare, main
from benchmarks.measure import forward_flop
from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import ModelConfig
from llm2vec_fast.model.transformer import Transformer
from llm2vec_fast.model.weights import unfused

MODELS = {
    "Mistral-7B": {
        "model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096,
        "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "sliding_window": None,
    },
    "S-LLaMA-1.3B": {
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048,
        "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip
TOKENS = 16_384
HF_BATCH = 32


def lengths_of(kind: str, tokens: int) -> list[int]:
    """Lengths of texts that sum to about `tokens`: "512" = all of 512, "skewed" = log-normal with
    median 120 and 99th percentile 2,000.
    """
    if kind != "skewed":
        return [int(kind)] * max(1, tokens // int(kind))
    draw, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(max(4, min(4096, round(120 * 2.718281828 ** draw.gauss(0, 1.2093)))))
    return lengths


@functools.lru_cache(maxsize=1)  # a 7B and a 1.3B need not be there together
def model_of(name: str, device: str, dtype: torch.dtype) -> Transformer:
    config = ModelConfig.from_dict(MODELS[name])
    with torch.device("meta"):
        model = Transformer(config, causal=False)
    noise = None if device == "meta" else torch.Generator(device).manual_seed(0)
    weights = {}
    for key, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        if device != "meta":
            value.fill_(1) if parameter.dim() == 1 else value.normal_(0, 0.02, generator=noise)
        weights[key] = value
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def stock_of(name: str, ours: Transformer, device: str):
    """transformers' model on our weights, without a copy."""
    from transformers import AutoConfig, AutoModel

    raw = dict(MODELS[name])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.is_causal = False  # on the config object: the only spelling that takes effect
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    model.load_state_dict(dict(unfused(ours)), assign=True)
    model.rotary_emb = type(model.rotary_emb)(config).to(device)
    return model.eval()


def _ours(model: Transformer, force: str | None) -> Prepare:
    def prepare(inputs):
        order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
        packs: list[list[int]] = [[]]
        for i in order:
            if packs[-1] and sum(len(inputs[j]) for j in packs[-1]) + len(inputs[i]) > TOKENS:
                packs.append([])
            packs[-1].append(i)
        rows = list(itertools.chain.from_iterable(packs))
        batches = [PackedBatch.build([inputs[i].numpy() for i in pack]) for pack in packs]
        batches = [_moved(batch, model.embed.weight.device) for batch in batches]

        @torch.inference_mode()
        def run() -> Tensor:
            with ops.use(force):
                pooled = [ops.pool(model(batch), batch.spans, "mean") for batch in batches]
            back = torch.empty_like(torch.cat(pooled))
            back[torch.tensor(rows, device=back.device)] = torch.cat(pooled)
            return back

        return run

    return prepare


def _moved(batch: PackedBatch, device: torch.device) -> PackedBatch:
    parts = (batch.ids, batch.positions, batch.cu_seqlens, batch.spans)
    return PackedBatch(*(x.to(device) for x in parts), batch.max_seqlen, batch.lengths)


def _stock(model, by_length: bool, reference, distance: dict[str, float]) -> Prepare:
    def prepare(inputs):
        order = list(range(len(inputs)))
        if by_length:
            order.sort(key=lambda i: -len(inputs[i]))
        batches = [order[at : at + HF_BATCH] for at in range(0, len(order), HF_BATCH)]
        device = next(model.parameters()).device
        padded = [_pad([inputs[i] for i in batch], device) for batch in batches]

        @torch.inference_mode()
        def run() -> Tensor:
            pooled = []
            for ids, mask in padded:
                states = model(input_ids=ids, attention_mask=mask, use_cache=False)
                hidden, kept = states.last_hidden_state, mask.unsqueeze(-1)
                pooled.append((hidden * kept).sum(1, dtype=torch.float32) / kept.sum(1))
            back = torch.empty_like(torch.cat(pooled))
            back[torch.tensor(order, device=back.device)] = torch.cat(pooled)
            return back

        cosine = torch.cosine_similarity(run().double(), reference(inputs)().double())
        distance["1-cos"] = max(distance.get("1-cos", 0.0), (1 - cosine).max().item())
        return run

    return prepare


def _pad(texts: list[Tensor], device) -> tuple[Tensor, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).long()
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    return ids.to(device), mask.long().to(device)


def cases(device: str) -> Iterator[Case]:
    names = ("tiny",) if device == "cpu" else ("Mistral-7B", "S-LLaMA-1.3B")
    for name in names:
        for kind in ("512", "skewed", "128", "2048"):
            if device != "cpu" or kind != "2048":
                yield _case(name, kind, device)


def _case(name: str, kind: str, device: str) -> Case:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = model_of(name, device, dtype)
    lengths = lengths_of(kind, 2048 if device == "cpu" else TOKENS)
    distance: dict[str, float] = {}

    def make():
        vocabulary = model.config.vocab_size
        return tuple(torch.randint(vocabulary, (n,), dtype=torch.int32) for n in lengths)

    rivals = {"ours triton" if device == "meta" else "ours": _ours(model, _force(device))}
    if device != "meta":
        stock = stock_of(name, model, device)
        for order in ("sorted", "arrival"):
            rivals[f"transformers {order}"] = _stock(
                stock, order == "sorted", _ours(model, None), distance
            )
    return Case(
        "forward", "forward", f"{name} {kind} T={sum(lengths)}", dtype, make, rivals,
        flop=forward_flop(model.config, lengths), notes=distance,
    )  # fmt: skip


def _force(device: str) -> str | None:
    return "triton" if device == "meta" else None


if __name__ == "__main__":
    main("bench_forward", cases)
