"""LLM2Vec as a module of sentence-transformers 6, whose prompts, evaluators and Trainer then work.

>>> from sentence_transformers import SentenceTransformer
>>> module = LLM2VecModule(LLM2Vec.from_pretrained("path/or/hub-name"))
>>> model = SentenceTransformer(modules=[module], prompts={"query": "Find the answer: "})
>>> model.save_pretrained("directory")
>>> model = load("directory")

Features are packed, in the layout that sentence-transformers has for texts without padding:
`input_ids` (1, T), and `cu_seq_lens_q` (B + 1,), where each of B texts begins and ends.
`pooling_mask` (1, T) has 1 for the tokens that are pooled. A text that is empty has no tokens, and
the zero vector.

A prompt stands before the text as it is, without a space between, as sentence-transformers has it
(with compat="official" as that library joins them); by `skip_instruction` it is not pooled.

No GPU has run this yet, and no training on several ranks.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import import_from_string, load_dir_path
from torch import Tensor

from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.model import adapt, lora
from llm2vec_fast.model.checkpoint import read_tensor, write_json
from llm2vec_fast.model.source import absolute, find
from llm2vec_fast.model.transformer import Dropout
from llm2vec_fast.saving import TOKENIZER_FILES
from llm2vec_fast.settings import OFFICIAL, OFFICIAL_FILE, OWN_FILE, own_settings
from llm2vec_fast.text import TextTokenizer, Tokens

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
# Of config_sentence_transformers.json: arguments of SentenceTransformer.
KEPT = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")


class LLM2VecModule(InputModule):
    """Texts to pooled vectors, as the first module of a SentenceTransformer.

    encoder:           the model; it is not copied
    attention_dropout: in training, of the attention weights (SimCSE needs it, 0.3 in the paper)
    recompute:         in training, layers are computed again in the backward pass;
                       `gradient_checkpointing=True` of the Trainer's arguments sets it

    Computes in the encoder's own dtype, whatever autocast asks for.
    """

    def __init__(self, encoder: LLM2Vec, attention_dropout: float = 0.0, recompute: bool = False):
        super().__init__()
        self.encoder, self.attention_dropout, self.recompute = encoder, attention_dropout, recompute
        self.has_lora = False  # of its own, in training
        # A training is of all weights, unless `add_lora`; weights in fp8 are for inference alone.
        encoder.model.requires_grad_(encoder.model.fp8_keep is None)

    @property
    def tokenizer(self):
        """The tokenizer as the library `tokenizers` has it."""
        return self.encoder.tokenizer.raw

    @property
    def max_seq_length(self) -> int:
        """Tokens of a sequence at most; setting it sets the limit of the text alone, too."""
        return self.encoder.tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        limits = {"max_length": value, "doc_max_length": value}
        self.encoder.settings |= limits
        vars(self.encoder.tokenizer).update(limits)

    def get_embedding_dimension(self) -> int:
        return self.encoder.dimension

    def preprocess(
        self,
        inputs: Sequence[str],
        prompt: str | None = None,
        *,
        task: str | None = None,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Features of texts.

        prompt:     put before each text
        task:       "query" or "document", as the Trainer tells; makes no difference here
        max_length: tokens of a sequence at most, instead of the model's
        raises:     ValueError naming the row that is not a text
        """
        for row, text in enumerate(inputs):
            if not isinstance(text, str):
                raise ValueError(f"row {row} is not a text: {text!r:.80}")
        tokens = self._tokenizer(max_length)(inputs, [prompt or ""] * len(inputs))
        pooled = [np.zeros(len(t), dtype=bool) for t in tokens]
        for mask, t in zip(pooled, tokens, strict=True):
            mask[t.start : t.end] = True
        bounds = np.cumsum([0, *map(len, tokens)])
        return {
            "input_ids": torch.from_numpy(np.concatenate([t.ids for t in tokens])[None]).long(),
            "pooling_mask": torch.from_numpy(np.concatenate(pooled)[None]),
            "cu_seq_lens_q": torch.from_numpy(bounds),
        }

    def _tokenizer(self, max_length: int | None) -> TextTokenizer:
        tokenizer = copy.copy(self.encoder.tokenizer)  # what the caller's encoder does stays
        tokenizer.verbatim_instruction = True
        if max_length is not None:
            tokenizer.max_length = tokenizer.doc_max_length = max_length
        return tokenizer

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds `sentence_embedding`, (B, D) fp32. In inference the texts are sorted and cut into
        batches of `encoder.tokens_per_batch` tokens, so that any batch_size fits.
        """
        tokens = _tokens(features)
        device = self.encoder.device
        if self.training or torch.is_grad_enabled():
            vectors_BD = self._with_gradient(tokens)
        else:
            vectors_BD = torch.from_numpy(self.encoder.embed_tokens(tokens)()).to(device)
        features["sentence_embedding"] = vectors_BD
        return features

    def _with_gradient(self, tokens: list[Tokens]) -> Tensor:
        full = [row for row, t in enumerate(tokens) if len(t)]
        device = self.encoder.device
        vectors_BD = torch.zeros(len(tokens), self.encoder.dimension, device=device)
        if not full:
            return vectors_BD
        drop = Dropout()
        if self.training and self.attention_dropout:
            # From torch's generator: losses that compute a batch twice set it back in between.
            seed = int(torch.randint(1 << 62, (), device="cpu"))
            drop = Dropout(attention=self.attention_dropout, seed=seed)
        some = [tokens[row] for row in full]
        spans = [(t.start, t.end) for t in some]
        batch = PackedBatch.build([t.ids for t in some], spans, device)
        with torch.autocast(device.type, enabled=False):
            pooled_BD = self.encoder(batch, drop, self.recompute and self.training)
        return vectors_BD.index_copy(0, torch.tensor(full, device=device), pooled_BD)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None) -> None:
        """Called by the Trainer. Its keyword arguments are those of another implementation."""
        self.recompute = True

    def add_lora(
        self,
        rank: int = 16,
        alpha: float = 32,
        targets: Collection[str] = adapt.TARGETS,
        seed: int = 0,
    ) -> None:
        """Freezes the model and adds fresh adapters: all that a training changes from now on.

        raises: ValueError as of model.adapt.attach, and for a model that has adapters merged
        """
        if self.encoder.sources.adapters:
            raise ValueError(
                "add_lora: what is saved would name a base without the adapters that are merged "
                "here: write it with LLM2Vec.save(DIR, merge_before_save=True) and load DIR"
            )
        adapt.attach(self.encoder.model, rank, alpha, targets, seed)
        self.has_lora = True

    def save(self, output_path: str, *, safe_serialization: bool = True) -> None:
        """Writes whole weights in the official layout (`LLM2Vec.save`), or the adapters of
        `add_lora` alone, as PEFT and LLM2Vec read them: their config names the base.
        """
        if not self.has_lora:
            self.encoder.save(output_path, merge_before_save=True)
            return
        encoder, path = self.encoder, Path(output_path)
        if any(path.glob("model*.safetensors")):
            raise ValueError(f"{path} holds whole weights: save the adapters elsewhere")
        path.mkdir(parents=True, exist_ok=True)
        adapt.save(encoder.model, path, absolute(encoder.sources.base_name))
        for source in (encoder.sources.tokenizer / name for name in TOKENIZER_FILES):
            if source.exists():
                (path / source.name).write_bytes(source.read_bytes())
        write_json({name: encoder.settings[name] for name in OFFICIAL}, path / OFFICIAL_FILE)
        write_json(own_settings(encoder.settings), path / OWN_FILE)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict | None = None,
        **others,
    ) -> LLM2VecModule:
        """A module from what `save` wrote, or any directory or hub name of an LLM2Vec model.

        Adapters are merged, but kept apart in a checkpoint of the Trainer, which goes on there.
        model_kwargs: as of LLM2Vec.from_pretrained (dtype, device, pooling_mode, ...)
        others:       what sentence-transformers hands to all modules, without a use here
        """
        name, where = model_name_or_path, (token, cache_folder, revision, local_files_only)
        if subfolder or any(where):  # else by its name, which a template may go by
            name = load_dir_path(name, subfolder, *where) or name
        model_kwargs = model_kwargs or {}
        if all(Path(name, file).exists() for file in ("trainer_state.json", lora.CONFIG)):
            return cls._with_lora(Path(name), model_kwargs)
        return cls(LLM2Vec.from_pretrained(name, **model_kwargs))

    @classmethod
    def _with_lora(cls, directory: Path, model_kwargs: dict) -> LLM2VecModule:
        """What `save` wrote after `add_lora`, as it was."""
        told = json.loads((directory / OFFICIAL_FILE).read_text(encoding="utf-8"))
        own = json.loads((directory / OWN_FILE).read_text(encoding="utf-8"))
        told |= {name: own[name] for name in ("enable_bidirectional", "template")}
        config = lora.read_config(directory)
        base = config["base_model_name_or_path"]
        encoder = LLM2Vec.from_pretrained(base, **(told | model_kwargs))
        saved = lora.open_adapter(directory, encoder.model.config).updates
        module = cls(encoder)
        module.add_lora(config["r"], config["lora_alpha"], config["target_modules"])
        with torch.no_grad():
            for name, a_RD, b_OR in adapt.factors(encoder.model):
                a_RD.copy_(read_tensor(saved[name].a))
                b_OR.copy_(read_tensor(saved[name].b))
        return module

    def __repr__(self) -> str:
        told = self.encoder.settings
        return f"LLM2VecModule({told['pooling_mode']}, max_seq_length={self.max_seq_length})"


def load(model_name_or_path: str, device: str | None = None, **model_kwargs) -> SentenceTransformer:
    """A SentenceTransformer on this engine: of what `save_pretrained` wrote, or of a model that
    sentence-transformers runs with its own Transformer (E5-Mistral, Qwen3-Embedding), or of any
    other that LLM2Vec.from_pretrained takes.

    SentenceTransformer(directory) itself does the same for the first kind, but since version 6
    only with trust_remote_code=True, because modules.json names a class outside that library.

    device:       default: the GPU if there is one
    model_kwargs: as of LLM2Vec.from_pretrained
    raises:       ValueError if modules.json names a class of somebody else, and as from_pretrained
    """
    found = find(model_name_or_path)
    kwargs = {"device": device} | model_kwargs
    modules_file, settings_file = found / MODULES, found / SETTINGS
    rows = [{"type": OWN_CLASS}]
    if modules_file.exists():
        rows = json.loads(modules_file.read_text(encoding="utf-8"))
    modules = []
    for row in rows:
        name = row["type"].rsplit(".", 1)[-1]
        if row["type"] == OWN_CLASS or name == "Transformer":
            modules.append(LLM2VecModule.load(model_name_or_path, model_kwargs=kwargs))
        elif not row["type"].startswith("sentence_transformers."):
            raise ValueError(
                f"{modules_file} names {row['type']!r}, which this engine does not run"
            )
        elif name != "Pooling":  # which LLM2VecModule has done
            modules.append(import_from_string(row["type"]).load(str(found), subfolder=row["path"]))
    told = {}
    if settings_file.exists():
        told = json.loads(settings_file.read_text(encoding="utf-8"))
    kept = {name: told[name] for name in KEPT if told.get(name) is not None}
    return SentenceTransformer(modules=modules, device=device, **kept)


OWN_CLASS = f"{LLM2VecModule.__module__}.{LLM2VecModule.__name__}"


def _tokens(features: dict[str, Tensor]) -> list[Tokens]:
    """The texts of packed features, on the host."""
    ids = features["input_ids"][0].cpu().numpy().astype(np.int32)
    pooled = features["pooling_mask"][0].cpu().numpy()
    bounds = features["cu_seq_lens_q"].tolist()
    tokens = []
    for start, end in itertools.pairwise(bounds):
        inside = np.flatnonzero(pooled[start:end])
        span = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        tokens.append(Tokens(ids[start:end], *span))
    return tokens
