"""LLM2Vec: from a model directory and texts to vectors.

text -> tokenize -> pack -> PackedBatch -> Transformer -> hidden (T, D) -> ops.pool -> (B, D)
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llm2vec_fast import ops, saving
from llm2vec_fast.batch import Download, PackedBatch
from llm2vec_fast.model import fp8, lora, weights
from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.graphs import Graphs
from llm2vec_fast.model.heap import keep_freed_memory
from llm2vec_fast.model.selfcheck import check_attention_mode
from llm2vec_fast.model.source import Sources, absolute, resolve
from llm2vec_fast.model.transformer import NO_DROPOUT, Dropout, Transformer
from llm2vec_fast.model.work import default_budget
from llm2vec_fast.settings import (
    POOLING,
    as_names,
    choose_device,
    choose_dtype,
    make_tokenizer,
    refuse_incomplete,
    settle,
)
from llm2vec_fast.text import TextTokenizer, Tokens, pack
from llm2vec_fast.vectors import check_form, finish

# Texts tokenised and sorted by length at a time.
WINDOW = 16_384


class LLM2Vec(nn.Module):
    """A decoder-only LLM as a text encoder (arXiv 2404.05961). Make one with `from_pretrained`."""

    def __init__(
        self, model: Transformer, tokenizer: TextTokenizer, sources: Sources, settings: dict
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.sources, self.settings = sources, settings
        self.graphs = Graphs(model)
        self._budgets: dict[tuple, int] = {}

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
                                  has instructions for it, else fp32) | float32 | bfloat16 |
                                  float16 | fp8 (projections in e4m3 but for model.fp8.KEEP, all
                                  else bf16; from compute capability 8.9, slowly simulated on CPUs)
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
        in_fp8 = kind == torch.float8_e4m3fn
        kind = torch.bfloat16 if in_fp8 else kind
        model = weights.load(sources.base, config, causal, kind, target)
        lora.merge(model, adapters)
        check_attention_mode(model)
        if in_fp8:
            fp8.quantize_(model)
        return cls(model, tokenizer, sources, settings)

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: bfloat16 for a model in fp8."""
        return self.model.embed.weight.dtype

    @property
    def dimension(self) -> int:
        """Size of the vectors, before `truncate_dim`."""
        return self.model.config.hidden_size

    @property
    def tokens_per_batch(self) -> int:
        """Tokens in a forward pass where the caller names no other number. On CUDA it goes by the
        memory that is free when it is first asked for, and stays.
        """
        key = self.device, self.dtype
        if key not in self._budgets:
            self._budgets[key] = default_budget(self.model.config, self.dtype, self.device)
        return self._budgets[key]

    def describe(self) -> dict:
        """What decides this model's vectors, as JSON: its origin, settings, and bytes."""
        kept = self.model.fp8_keep
        told = {
            "base": absolute(self.sources.name),
            "adapters": [absolute(name) for name in self.sources.named_adapters],
            "settings": self.settings,
            "dtype": str(self.dtype).removeprefix("torch.") if kept is None else "fp8",
            "fingerprint": self.sources.fingerprint(),
        }
        return told if kept is None else told | {"fp8_keep": list(kept)}

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
        raises:            ValueError naming the row that is not text, whose vector is not finite,
                           or that does not fit into the device's memory even alone
        """
        texts, instructions, single = _rows(sentences, instruction)
        check_form(self.dimension, truncate_dim, precision)
        if device is not None:
            self.to(device)
        if show_progress_bar is None:
            show_progress_bar = sys.stderr.isatty() and len(texts) > WINDOW
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        queued: deque[tuple[slice, Callable[[], np.ndarray]]] = deque()
        with tqdm(total=len(texts), unit="text", disable=not show_progress_bar) as bar:
            for start in range(0, len(texts), WINDOW):
                window = slice(start, start + WINDOW)
                tokens = self.tokenizer(texts[window], instructions[window])
                result = self.embed_tokens(
                    tokens, tokens_per_batch, batch_size, lambda count, _: bar.update(count),
                    lambda row, start=start, tokens=tokens: (  # type: ignore[misc]
                        _too_long(start + row, tokens[row])
                    ),
                )  # fmt: skip
                queued.append((window, result))
                # While the device computes a window, the next one is tokenised.
                while len(queued) > (window.stop < len(texts)):
                    at, result = queued.popleft()
                    vectors[at] = result()
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
        too_long: Callable[[int], None] | None = None,
    ) -> Callable[[], np.ndarray]:
        """Queues the forward pass of tokenised texts, one upload and one download a batch; the
        device is never waited for. A batch that does not fit into its memory is split and tried
        again, and what is left of the call is packed into batches of half as many tokens.

        progress: called with (texts, tokens) of each batch that is queued, the empty texts first
        too_long: called with the row of a text that does not fit even alone; its vector is zero.
                  Default: a ValueError
        returns:  a function, for any thread, that waits and gives (N, D) fp32 pooled vectors; zero
                  for texts without tokens
        """
        full = np.flatnonzero([len(t) > 0 for t in tokens])
        if progress:
            progress(len(tokens) - len(full), 0)
        vectors = Download(len(tokens), self.dimension, self.device)

        def packed(rows: np.ndarray, budget: int) -> deque[np.ndarray]:
            lengths = [len(tokens[row]) for row in rows]
            return deque(rows[batch] for batch in pack(lengths, budget, batch_size))

        batches = packed(full, tokens_per_batch or self.tokens_per_batch)
        while batches:
            rows = batches.popleft()
            some = [tokens[row] for row in rows]
            size = sum(map(len, some))
            pooled_BD = self._pooled_if_it_fits(some)
            if pooled_BD is not None:
                vectors.put(rows, pooled_BD)
            elif len(rows) > 1:
                batches = packed(np.concatenate([rows, *batches]), size // 2)
                continue
            elif too_long:
                too_long(int(rows[0]))
            else:
                _too_long(int(rows[0]), some[0])
            if progress:
                progress(len(rows), size)
        return vectors.result

    def _pooled_if_it_fits(self, some: Sequence[Tokens]) -> Tensor | None:
        """(B, D) vectors of one batch, or None if the memory is not enough."""
        try:
            return self._pooled(some)
        except torch.OutOfMemoryError:
            pass  # the handler keeps the frames, and so what they hold, until it is left
        self.graphs.clear()
        torch.cuda.empty_cache()
        return None

    def _pooled(self, some: Sequence[Tokens]) -> Tensor:
        ids, spans = [t.ids for t in some], [(t.start, t.end) for t in some]
        place = self.device, self.model.config.vocab_size
        bucket = self.graphs.bucket([len(t) for t in some])
        if bucket is None:
            return self(PackedBatch.build(ids, spans, *place))
        mode = POOLING[self.settings["pooling_mode"]]
        return self.graphs.run(bucket.build(ids, spans, *place), mode)[: len(some)]

    def save(
        self, path: str | Path, merge_before_save: bool = False, save_config: bool = True
    ) -> None:
        """Writes the model in the official layout.

        merge_before_save: write whole weights, which any program loads. Otherwise a model that has
                           adapters is saved as one adapter (several become one of their summed
                           rank); a model without adapters is always written whole.
        save_config:       also llm2vec_config.json
        raises:            ValueError if the directory holds a model that `save` did not write
                           there, and for whole weights of a model in fp8
        """
        saving.save(self.model, self.sources, self.settings, path, merge_before_save, save_config)


def _too_long(row: int, tokens: Tokens) -> None:
    raise ValueError(
        f"text {row} has {len(tokens)} tokens, which do not fit into the device's memory even "
        "alone: load the model with a smaller max_length"
    )


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
