"""What a model is loaded with: arguments over saved files over defaults, checked once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.lora import WEIGHTS as ADAPTER_WEIGHTS
from llm2vec_fast.model.sentence_layout import read_layout
from llm2vec_fast.model.small_file import read_json
from llm2vec_fast.model.source import Sources
from llm2vec_fast.ops import available
from llm2vec_fast.text import OfficialTokenizer, Template, TextTokenizer, find_template

OFFICIAL_FILE = "llm2vec_config.json"
OWN_FILE = (
    "llm2vec_fast.json"  # what the official file has no room for: its reader refuses other keys
)
# The settings in it; the last two only of models of sentence-transformers' layout.
OWN = ("enable_bidirectional", "template", "verbatim_instruction", "prompts")
OFFICIAL = {
    "pooling_mode": "mean",
    "max_length": 512,
    "doc_max_length": 400,
    "skip_instruction": True,
}
POOLING = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "last_token": "last",
    "eos_token": "last",
    "bos_token": "first",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def settle(
    sources: Sources,
    config: ModelConfig,
    *,
    compat: str,
    template: str | None,
    enable_bidirectional: bool | None,
    **official,
) -> dict:
    """All settings of an encoder as plain JSON values, in the official names where there is one.

    An argument that is None was not given: the file beside the model counts, where there is none
    the files of sentence-transformers (`sentence_layout`), then the default.
    raises: ValueError naming the setting or file and what is wrong with it
    """
    if compat not in ("fixed", "official"):
        raise ValueError(f"compat must be 'fixed' or 'official', got {compat!r}")
    told, own = _read(sources.settings / OFFICIAL_FILE), _read(sources.settings / OWN_FILE)
    layout = _layout(sources, config) if not told else {}
    settings = {
        name: _first(official[name], told.get(name), layout.get(name), default)
        for name, default in OFFICIAL.items()
    }
    if official["max_length"] and not official["doc_max_length"] and compat == "fixed":
        settings["doc_max_length"] = official["max_length"]
    if not isinstance(settings["pooling_mode"], str) or settings["pooling_mode"] not in POOLING:
        raise ValueError(
            f"pooling_mode {settings['pooling_mode']!r} is unknown; known: {', '.join(POOLING)}"
        )
    for name in ("max_length", "doc_max_length"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if template != "auto":
        chosen = Template.parse(template)
    elif own.get("template") or layout:
        chosen = Template.parse(own.get("template") or layout["template"])
    else:
        chosen = find_template(config.name_or_path, sources.name, sources.base_name)
    bidirectional = _first(
        enable_bidirectional, own.get("enable_bidirectional"), layout.get("bidirectional"), True
    )
    settings |= {
        "enable_bidirectional": bool(bidirectional),
        "template": str(chosen),
        "compat": compat,
    }
    if layout or own.get("verbatim_instruction"):  # not said of other models: manifests tell all
        prompts = layout.get("prompts") or own.get("prompts") or {}
        settings |= {"verbatim_instruction": True, "prompts": prompts}
    return settings


def own_settings(settings: dict) -> dict:
    """Those that are saved in OWN_FILE."""
    return {name: settings[name] for name in OWN if name in settings}


def _layout(sources: Sources, config: ModelConfig) -> dict:
    found = read_layout(sources.settings, config.source)
    return found or read_layout(sources.base, config.source)


def adapter_hashes(sources: Sources) -> list[str]:
    """sha256 of the weights of each adapter, in their order."""
    hashes = []
    for directory in sources.adapters:
        with open(directory / ADAPTER_WEIGHTS, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes


def refuse_incomplete(sources: Sources) -> None:
    """An adapter that was trained on top of others is nothing without them: ValueError if one of
    them is not merged before it. Adapters of other programs do not tell.
    """
    below = [_read(directory / OWN_FILE).get("stacked_on") or [] for directory in sources.adapters]
    if not any(below):
        return
    there = set(_read(sources.base / OWN_FILE).get("merged", []))
    for directory, wanted, own in zip(
        sources.adapters, below, adapter_hashes(sources), strict=True
    ):
        if not there.issuperset(wanted):
            raise ValueError(
                f"adapter {directory} was trained on top of {len(wanted)} other(s) that are not "
                "merged before it: name all, in the order of their training, as "
                "peft_model_name_or_path=[MNTP, SIMCSE]. If the base has them merged already, "
                f"delete stacked_on from {directory / OWN_FILE}"
            )
        there.add(own)


def make_tokenizer(sources: Sources, settings: dict, config: ModelConfig) -> TextTokenizer:
    """The tokenizer of a model under its settings, in the fixed or the official manner."""
    kind = OfficialTokenizer if settings["compat"] == "official" else TextTokenizer
    tokenizer = kind(
        sources.tokenizer,
        template=Template.parse(settings["template"]),
        **{name: settings[name] for name in OFFICIAL},
        verbatim_instruction=settings.get("verbatim_instruction", False),
    )
    if isinstance(tokenizer, OfficialTokenizer):
        tokenizer.end_with(config.family, config.name_or_path or sources.name)
    return tokenizer


def choose_device(device, device_map) -> torch.device:
    """One device: as asked, else the GPU if there is one."""
    if device is None and isinstance(device_map, dict):
        if len(device_map) != 1:
            raise ValueError(
                "device_map over several devices is not supported: a model is on one device"
            )
        device = next(iter(device_map.values()))
    elif device is None and device_map != "auto":
        device = device_map
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch {torch.__version__} sees no GPU"
        )
    return device


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The computing type; auto = bf16 on CUDA and on CPUs with instructions for it, else fp32.

    "fp8" is torch.float8_e4m3fn: that of the projections, everything else computes in bf16
    raises: ValueError on an unknown type, and if the device cannot multiply fp8
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32
    if name in ("fp8", "float8_e4m3fn"):
        reason = available("fp8_linear", str(device), torch.float8_e4m3fn)["scaled_mm"]
        if reason and device.type != "cpu":  # a CPU simulates it
            raise ValueError(f"dtype 'fp8' cannot run on {device}: {reason}; use 'bfloat16'")
        return torch.float8_e4m3fn
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, fp8; got {dtype!r}")
    return DTYPES[name]


def as_names(names: str | Path | Sequence[str | Path] | None) -> list[str]:
    if names is None:
        return []
    return [str(names)] if isinstance(names, str | Path) else [str(name) for name in names]


def _cpu_has_bf16() -> bool:
    # Without AVX-512/AMX bf16 instructions, bf16 on a CPU is about nine times slower than fp32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _first(*values):
    return next(value for value in values if value is not None)


def _read(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        told = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return told
