"""What benchmarks run on: public shapes with random weights, sets of lengths, real text.

Nothing is downloaded but SmolLM2 (`demo.ensure_model`). Every draw has a fixed seed.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.measure import forward_flop
from llm2vec_fast import LLM2Vec
from llm2vec_fast.bench import stock_model
from llm2vec_fast.demo import docstrings
from llm2vec_fast.model import ModelConfig
from llm2vec_fast.model.transformer import Transformer

_LLAMA = {
    "model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
MODELS = {
    "Mistral-7B": {
        "model_type": "mistral", "vocab_size": 32_000, "hidden_size": 4096,
        "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "sliding_window": None,
    },
    "S-LLaMA-1.3B": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "LLaMA-2-7B": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "Llama-3-8B": _LLAMA | {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "rope_theta": 500_000.0,
    },
    "tiny": _LLAMA | {
        "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
MAX_TOKENS = 512  # of real text; longer ones are left out: truncation is not what is timed
# Log-normal lengths of median 120 whose 99th percentile (2.326 standard deviations) is 2,000.
MEDIAN, P99 = 120, 2000
SIGMA = math.log(P99 / MEDIAN) / 2.326


def lengths_of(kind: str, tokens: int) -> list[int]:
    """Lengths of texts that sum to about `tokens`.

    kind: "fixed N" | "normal" (mean 256, deviation 64, within 16..512) | "log-normal" (median 120,
          99th percentile 2,000, within 4..4,096)
    """
    if kind.startswith("fixed "):
        length = int(kind.removeprefix("fixed "))
        return [length] * max(1, tokens // length)
    noise, lengths = random.Random(0), []
    draw = {
        "normal": lambda: min(512, max(16, round(noise.gauss(256, 64)))),
        "log-normal": lambda: min(4096, max(4, round(MEDIAN * math.exp(noise.gauss(0, SIGMA))))),
    }[kind]
    while sum(lengths) < tokens:
        lengths.append(draw())
    return lengths


def random_ids(lengths: list[int], vocabulary: int) -> list[np.ndarray]:
    """(n,) int32 token ids of each text."""
    noise = np.random.default_rng(0)
    return [noise.integers(3, vocabulary, n, dtype=np.int32) for n in lengths]


def real_texts(count: int) -> list[str]:
    """Docstrings of Python's standard library, of very different lengths, in a fixed order."""
    texts = [text for _, text in docstrings()]
    random.Random(0).shuffle(texts)
    return texts[:count]


@functools.lru_cache(maxsize=1)  # a 7B and a 1.3B need not be there together
def model_of(name: str, device: str, dtype: torch.dtype) -> Transformer:
    """A model of that shape with random weights, made on the device; bidirectional."""
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


def copy_of(model: Transformer, dtype: torch.dtype | None = None) -> Transformer:
    """The same model once more: on the same memory, or in another dtype."""
    with torch.device("meta"):
        copy = Transformer(model.config, model.causal)
    weights = {key: value.to(dtype or value.dtype) for key, value in model.named_parameters()}
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False).eval()


@dataclass
class Workload:
    """What a case embeds, and our model. `texts` and `path` are None where ids are random."""

    ours: LLM2Vec
    ids: list[np.ndarray]
    texts: list[str] | None = None
    path: Path | None = None
    stock_batch: int | None = None  # the best of stock transformers, once it has been searched for

    @classmethod
    def random(cls, model: str, lengths: str, dtype: str, device: str, tokens: int) -> Workload:
        """A shape of MODELS with random weights, on about `tokens` random ids."""
        body = model_of(model, device, getattr(torch, dtype))
        ours = LLM2Vec(body, None, SimpleNamespace(name=model), {"pooling_mode": "mean"})
        return cls(ours, random_ids(lengths_of(lengths, tokens), body.config.vocab_size))

    @classmethod
    def real(
        cls, path: Path, lengths: str, dtype: str, device: str, texts: int, tokens: int
    ) -> Workload:
        """A model directory, on so many docstrings or, for another set of lengths, random ids."""
        ours = LLM2Vec.from_pretrained(
            path, device=device, dtype=dtype, compat="official", max_length=MAX_TOKENS,
            doc_max_length=MAX_TOKENS, skip_instruction=False,  # pools a BOS too, as the others do
        )  # fmt: skip
        if lengths != "docstrings":
            ids = random_ids(lengths_of(lengths, tokens), ours.model.config.vocab_size)
            return cls(ours, ids)
        found = real_texts(2 * texts)
        found = [text for text in found if len(ours.tokenizer.ids_of(text)) <= MAX_TOKENS][:texts]
        ids = [tokens.ids for tokens in ours.tokenizer(found, [""] * len(found))]
        return cls(ours, ids, found, path)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    @property
    def device(self) -> torch.device:
        return self.ours.device

    @property
    def flop(self) -> float:
        return forward_flop(self.ours.model.config, self.lengths)

    def head(self, count: int) -> Workload:
        """The first `count` texts."""
        texts = self.texts and self.texts[:count]
        return Workload(self.ours, self.ids[:count], texts, self.path)

    def probe(self) -> Workload:
        """A part that is large enough to tell batch sizes apart."""
        return self.head(max(32, len(self) // 4))

    @functools.cached_property
    def stock(self):
        return stock_model(self.ours.model)

    @functools.cached_property
    def tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)
