"""What a user writes for a model to be evaluated, and the model that it means."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from llm2vec_fast.encoder import LLM2Vec

ALIGNMENTS = ("same_token", "next_token")
SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True)
class ModelSpec:
    """A model as it is loaded and read.

    label:       its name in tables; default: made of the other fields
    base:        directory or hub name
    adapter:     adapters stacked on it, in order
    causal:      True keeps the causal mask; None: as saved
    standardize: `sts` alone: every dimension to mean 0 and standard deviation 1 over the file
    labels:      `word` alone: a token is read from its own state (same_token) or from the state
                 to its left, which MNTP has trained to predict it (next_token)
    pooling_mode, max_length, dtype: as in LLM2Vec.from_pretrained
    """

    base: str
    label: str = ""
    adapter: tuple[str, ...] = ()
    causal: bool | None = None
    pooling_mode: str | None = None
    max_length: int | None = None
    dtype: str = "auto"
    standardize: bool = False
    labels: str = "same_token"

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """A directory or hub name, or `field=value` pairs with commas between them.

        The base may stand first without its name; `adapter` may repeat; paths hold no commas.
        raises: ValueError naming the field and its nearest match, or the value
        """
        if "=" not in text or Path(text).exists():
            return cls._made({"base": text}, text)
        found: dict = {}
        for at, part in enumerate(text.split(",")):
            name, equals, value = part.strip().partition("=")
            if not equals:
                if at:
                    raise ValueError(f"model {text!r}: {part!r} is not of the form field=value")
                name, value = "base", name
            if name not in (known := [field.name for field in fields(cls)]):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise ValueError(
                    f"model {text!r}: there is no field {name!r}; did you mean {near!r}? "
                    f"Known: {', '.join(known)}"
                )
            if name == "adapter":
                found["adapter"] = (*found.get("adapter", ()), value)
            elif name in found:
                raise ValueError(f"model {text!r}: {name} stands twice")
            else:
                found[name] = _value(text, name, value)
        return cls._made(found, text)

    @classmethod
    def _made(cls, found: dict, text: str) -> ModelSpec:
        if not found.get("base") or not all(found.get("adapter", ())):
            raise ValueError(f"model {text!r}: name a directory or hub name (base=...)")
        return cls(**{"label": _label(found)} | found)

    def load(self, device: str | torch.device | None = None) -> LLM2Vec:
        """Raises ValueError as LLM2Vec.from_pretrained."""
        return LLM2Vec.from_pretrained(
            self.base,
            list(self.adapter) or None,
            enable_bidirectional=None if self.causal is None else not self.causal,
            pooling_mode=self.pooling_mode,
            max_length=self.max_length,
            dtype=self.dtype,
            device=device,
        )


def parse_specs(texts: Sequence[str]) -> list[ModelSpec]:
    """Models as a user wrote them. Raises ValueError where two would have one label."""
    specs = [ModelSpec.parse(text) for text in texts]
    if not specs:
        raise ValueError("no model: name one or more with --model")
    labels = [spec.label for spec in specs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"two models have the label {twice!r}: give each its own with label=...")
    return specs


def _value(text: str, name: str, value: str):
    if name in ("causal", "standardize"):
        if value.lower() not in SWITCHES:
            raise ValueError(f"model {text!r}: {name} must be true or false, got {value!r}")
        return SWITCHES[value.lower()]
    if name == "max_length":
        if not value.isascii() or not value.isdigit():
            raise ValueError(f"model {text!r}: {name} must be a whole number, got {value!r}")
        return int(value)
    if name == "labels" and value not in ALIGNMENTS:
        raise ValueError(f"model {text!r}: labels must be {' or '.join(ALIGNMENTS)}: {value!r}")
    return value


def _label(found: dict) -> str:
    names = [found["base"], *found.get("adapter", ())]
    said = [" + ".join(Path(name).name or name for name in names)]
    if "causal" in found:
        said.append("causal" if found["causal"] else "bidirectional")
    said += ["standardized"] * found.get("standardize", False)
    further = ("pooling_mode", "max_length", "dtype", "labels")
    said += [str(found[name]) for name in further if name in found]
    return ", ".join(said)
