"""LLM2Vec: from a model directory and texts to vectors.

text -> tokenize -> pack -> PackedBatch -> Transformer -> hidden (T, D) -> ops.pool -> (B, D)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model import lora, weights
from llm2vec_fast.model.checkpoint import write_json
from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.heap import keep_freed_memory
from llm2vec_fast.model.selfcheck import check_attention_mode
from llm2vec_fast.model.source import Sources, absolute, resolve
from llm2vec_fast.model.transformer import NO_DROPOUT, Dropout, Transformer
from llm2vec_fast.settings import (
    OFFICIAL,
    OFFICIAL_FILE,
    OWN_FILE,
    POOLING,
    adapter_hashes,
    as_names,
    choose_device,
    choose_dtype,
    make_tokenizer,
    refuse_incomplete,
    settle,
)
from llm2vec_fast.text import TextTokenizer, Tokens, pack
from llm2vec_fast.vectors import check_form, finish

# Texts tokenised, sorted by length and held on the device at a time.
WINDOW = 16_384
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16_384}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
)  # fmt: skip


class LLM2Vec(nn.Module):
    """A decoder-only LLM as a text encoder (arXiv 2404.05961). Make one with `from_pretrained`."""

    def __init__(
        self, model: Transformer, tokenizer: TextTokenizer, sources: Sources, settings: dict
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.sources, self.settings = sources, settings

    @classmethod
    def from_pretrained(
        cls,
        base_model_name_or_path: str | Path,
        peft_model_name_or_path: str | Path | Sequence[str | Path] | None = None,
        merge_peft: bool = True,
        enable_bidirectional: bool | None = None,
        *,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | None = None,
        skip_instruction: bool | None = None,
        dtype: str | torch.dtype = "auto",
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | torch.device | dict | None = None,
        compat: str = "fixed",
        template: str | None = "auto",
        attn_implementation: str | None = None,
    ) -> LLM2Vec:
        """Loads a model from local directories or hub names.

        base_model_name_or_path:  a model, or a directory with an adapter that names its base
        peft_model_name_or_path:  a LoRA adapter, or a list: stacked in order. All are merged into
                                  the weights, whatever `merge_peft` says.
        enable_bidirectional:     False keeps the causal mask; default True
        pooling_mode:             mean | weighted_mean | last_token | eos_token | bos_token
        max_length:               tokens of the whole sequence; given without doc_max_length, sets
                                  both
        doc_max_length:           tokens of the text alone
        skip_instruction:         pool the text only, not the instruction before it
        dtype, torch_dtype:       computing type: auto (bf16 on CUDA; on a CPU bf16 only where it
                                  has instructions for it, else fp32) | float32 | bfloat16 | float16
        device, device_map:       default: the GPU if there is one
        compat:                   "fixed", or "official": ids, spans and truncation as llm2vec 0.2.3
        template:                 "auto" (saved, else by the model's name), "none", or
                                  "...{text}..."
        attn_implementation:      accepted for the official signature; the backend is chosen by
                                  llm2vec_fast.ops.backend
        Explicit arguments win over llm2vec_config.json, which wins over the defaults.
        raises: ValueError (ConfigError, WeightsError, AdapterError) naming the file and what to do
        source: the official llm2vec 0.2.3 API
        """
        sources = resolve(str(base_model_name_or_path), as_names(peft_model_name_or_path))
        config = ModelConfig.from_file(sources.config)
        refuse_incomplete(sources)
        settings = settle(
            sources,
            config,
            compat=compat,
            template=template,
            enable_bidirectional=enable_bidirectional,
            pooling_mode=pooling_mode,
            max_length=max_length,
            doc_max_length=doc_max_length,
            skip_instruction=skip_instruction,
        )
        tokenizer = make_tokenizer(sources, settings, config)
        target = choose_device(device, device_map)
        kind = choose_dtype(dtype if torch_dtype is None else torch_dtype, target)
        adapters = [lora.open_adapter(path, config) for path in sources.adapters]
        causal = not settings["enable_bidirectional"]
        if target.type == "cpu":
            keep_freed_memory()
        model = weights.load(sources.base, config, causal, kind, target)
        lora.merge(model, adapters)
        check_attention_mode(model)
        return cls(model, tokenizer, sources, settings)

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed.weight.dtype

    @property
    def dimension(self) -> int:
        """Size of the vectors, before `truncate_dim`."""
        return self.model.config.hidden_size

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in a forward pass where the caller names no other number."""
        return TOKENS_PER_BATCH.get(self.device.type, 2048)

    def describe(self) -> dict:
        """What decides this model's vectors, as JSON: its origin, settings, and bytes."""
        return {
            "base": absolute(self.sources.name),
            "adapters": [absolute(name) for name in self.sources.named_adapters],
            "settings": self.settings,
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.sources.fingerprint(),
        }

    def forward(
        self, batch: PackedBatch, drop: Dropout = NO_DROPOUT, recompute: bool = False
    ) -> Tensor:
        """(B, D) fp32 vectors of a packed batch on the model's device.

        drop, recompute: for training, as of `Transformer.forward`
        """
        mode = POOLING[self.settings["pooling_mode"]]
        return ops.pool(self.model(batch, drop, recompute), batch.spans, mode)

    def encode(
        self,
        sentences: str | Sequence[str] | Sequence[Sequence[str]],
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        *,
        instruction: str | None = None,
        tokens_per_batch: int | None = None,
        normalize: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
    ) -> Tensor | np.ndarray:
        """Vectors of texts, in their order.

        sentences:         one text, a list of texts, or a list of [instruction, text]
        batch_size:        at most so many texts in a batch; never changes a vector
        show_progress_bar: default: on a terminal, for more than one window of texts
        convert_to_numpy:  a numpy array instead of a torch tensor (convert_to_tensor wins, as
                           officially)
        device:            moves the model there first
        instruction:       put before every text and, by skip_instruction, not pooled
        tokens_per_batch:  tokens in a forward pass; never changes a vector beyond rounding
        truncate_dim:      keep the first so many dimensions (Matryoshka), before normalising
        precision:         float32 | float16 | int8 (symmetric per row) | binary (packed sign bits,
                           uint8)
        returns:           (N, D) on the CPU, or (D,) for a single text; [] gives (0, D). An empty
                           text is the zero vector.
        raises:            ValueError naming the row that is not text, or whose vector is not finite
        """
        texts, instructions, single = _rows(sentences, instruction)
        check_form(self.dimension, truncate_dim, precision)
        if device is not None:
            self.to(device)
        if show_progress_bar is None:
            show_progress_bar = sys.stderr.isatty() and len(texts) > WINDOW
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        with tqdm(total=len(texts), unit="text", disable=not show_progress_bar) as bar:
            for start in range(0, len(texts), WINDOW):
                window = slice(start, start + WINDOW)
                tokens = self.tokenizer(texts[window], instructions[window])
                vectors[window] = self.embed_tokens(
                    tokens, tokens_per_batch, batch_size, lambda count, _: bar.update(count)
                )
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(
                f"texts {bad[:5].tolist()} gave vectors that are not finite in {self.dtype}: "
                "load the model with dtype='bfloat16' or 'float32'"
            )
        out = finish(vectors, truncate_dim, normalize, precision)[0]
        out = out[0] if single else out
        return out if convert_to_numpy and not convert_to_tensor else torch.from_numpy(out)

    @torch.inference_mode()
    def embed_tokens(
        self,
        tokens: Sequence[Tokens],
        tokens_per_batch: int | None = None,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """(N, D) fp32 pooled vectors of tokenised texts; zero for those without tokens.

        One upload per batch, one download at the end; the device is never waited for in between.
        progress(texts, tokens) is called after each batch.
        """
        full = np.flatnonzero([len(t) > 0 for t in tokens])
        if progress:
            progress(len(tokens) - len(full), 0)
        out = torch.zeros(len(tokens), self.dimension, device=self.device)
        lengths = [len(tokens[i]) for i in full]
        for batch in pack(lengths, tokens_per_batch or self.tokens_per_batch, batch_size):
            rows = full[batch]
            packed = PackedBatch.build(
                [tokens[i].ids for i in rows],
                [(tokens[i].start, tokens[i].end) for i in rows],
                self.device,
            )
            at = torch.from_numpy(rows).to(self.device, non_blocking=True)
            out.index_copy_(0, at, self(packed))
            if progress:
                progress(len(rows), packed.n_tokens)
        return out.cpu().numpy()

    def save(
        self, path: str | Path, merge_before_save: bool = False, save_config: bool = True
    ) -> None:
        """Writes the model in the official layout.

        merge_before_save: write whole weights, which any program loads. Otherwise a model that has
                           adapters is saved as one adapter (several become one of their summed
                           rank); a model without adapters is always written whole.
        save_config:       also llm2vec_config.json
        raises:            ValueError if the directory holds a model that `save` did not write there
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        as_adapter = bool(self.sources.adapters) and not merge_before_save
        self._make_room(path, as_adapter)
        if as_adapter:
            adapters = [lora.open_adapter(d, self.model.config) for d in self.sources.adapters]
            lora.save(adapters, path, absolute(self.sources.base_name))
        else:
            weights.save(self.model, path)
            write_json(self._export_config(), path / "config.json")
        for name in TOKENIZER_FILES:
            source = self.sources.tokenizer / name
            if source.exists() and source.resolve() != (path / name).resolve():
                (path / name).write_bytes(source.read_bytes())
        if save_config:
            write_json({name: self.settings[name] for name in OFFICIAL}, path / OFFICIAL_FILE)
        own = {name: self.settings[name] for name in ("enable_bidirectional", "template")}
        if self.sources.adapters and not as_adapter:
            own["merged"] = adapter_hashes(self.sources)
        write_json(own, path / OWN_FILE)

    def _make_room(self, path: Path, as_adapter: bool) -> None:
        """Removes what an earlier `save` left in the other form: it would be read together with
        this one. What somebody else put there is refused.
        """
        adapters = [directory.resolve() for directory in self.sources.adapters]
        if path.resolve() in (self.sources.base.resolve(), *adapters):
            if adapters and not (as_adapter and adapters == [path.resolve()]):
                raise ValueError(f"{path} is what this model was loaded from: save it elsewhere")
            return
        other = ("config.json", "model*.safetensors", "model.safetensors.index.json")
        other = other if as_adapter else (lora.CONFIG, lora.WEIGHTS)
        present = [file for pattern in other for file in path.glob(pattern)]
        if present and not (path / OWN_FILE).exists():
            raise ValueError(f"{path} holds another model ({present[0].name}): save it elsewhere")
        for file in present:
            file.unlink()

    def _export_config(self) -> dict:
        """config.json of merged weights: the old one, and what tells others to look both ways."""
        config = dict(self.model.config.source)
        bidirectional = self.settings["enable_bidirectional"]
        kind = self.model.config.family.capitalize()
        config["architectures"] = [f"{kind}{'Bidirectional' * bidirectional}Model"]
        for key in ("dtype", "torch_dtype"):
            config.pop(key, None)
        config["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        if bidirectional:
            config |= {"is_causal": False, "use_bidirectional_attention": True}
            # With the causal mask the sliding window goes too, for every spelling of it.
            config |= {key: None for key in ("sliding_window", "layer_types") if key in config}
            config |= {key: False for key in ("use_sliding_window",) if key in config}
        config.setdefault("_name_or_path", self.sources.base_name)
        return config


def _rows(sentences, instruction: str | None) -> tuple[list[str], list[str], bool]:
    """(texts, instructions, was it one text). Raises ValueError naming the row that is not text."""
    if isinstance(sentences, str):
        return [sentences], [instruction or ""], True
    if not isinstance(sentences, Iterable) or isinstance(sentences, bytes | dict):
        raise ValueError(
            f"sentences must be a text or a list of texts, not {type(sentences).__name__}"
        )
    texts, instructions = [], []
    for row, item in enumerate(sentences):
        if isinstance(item, str):
            pair = (instruction or "", item)
        elif isinstance(item, list | tuple) and len(item) == 2 and instruction is None:
            pair = tuple(item)
        else:
            raise ValueError(f"row {row} is not a text (nor [instruction, text]): {item!r:.80}")
        if not all(isinstance(part, str) for part in pair):
            raise ValueError(f"row {row} is not [instruction, text], both text: {item!r:.80}")
        instructions.append(pair[0])
        texts.append(pair[1])
    return texts, instructions, False
