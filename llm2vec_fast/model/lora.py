"""PEFT LoRA adapters: read in either nesting of keys, merged into the fused weights, written back.

R rank, D in features, O out features
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_fast.model.checkpoint import (
    DTYPES,
    TensorOnDisk,
    WeightsError,
    inside,
    read_header,
    read_into,
    read_tensor,
    write_json,
    write_safetensors,
)
from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.small_file import read_json
from llm2vec_fast.model.transformer import Transformer
from llm2vec_fast.model.weights import Slot, name_map, rows_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Settings that change what the adapter computes and that this engine does not have: refused if set.
UNSUPPORTED = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "megatron_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters",
    "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip
# These subtract the first adapter from the base weights, so that W + B A is not what was trained.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")


MATCHER = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for expression in expressions:
    for name in names:
        re.fullmatch(expression, name)
"""
MATCHING_SECONDS = 10  # a thousand names take milliseconds


class AdapterError(WeightsError):
    """An adapter that is missing, malformed, or does not fit its base model."""


@dataclass(frozen=True)
class Update:
    """One module's low-rank update: the weight gains scale * B @ A."""

    a: TensorOnDisk  # (R, D)
    b: TensorOnDisk  # (O, R)
    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, D) and scale * B (O, R), fp32 on the CPU."""
        return read_tensor(self.a), read_tensor(self.b).mul_(self.scale)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, checked against the model: {module name without `model.`: Update}."""

    directory: Path
    config: dict
    updates: dict[str, Update]


def read_config(directory: Path) -> dict:
    """adapter_config.json of a directory. Raises AdapterError naming the file."""
    path = directory / CONFIG
    try:
        config = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise AdapterError(f"{path}: only LoRA adapters are supported")
    for key in UNSUPPORTED:
        if config.get(key):
            raise AdapterError(f"{path}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias = {config['bias']!r} is not supported, only 'none'")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterError(
            f"{path}: init_lora_weights = {init!r} changes the base weights; convert the adapter "
            "with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    for key, is_right, meaning in (
        ("r", _positive, "a positive number"),
        ("lora_alpha", _positive, "a positive number"),
        ("target_modules", _names, "a regular expression or a list of names"),
        ("exclude_modules", lambda x: not x or _names(x), "a regular expression or names"),
        ("layers_to_transform", _layers, "a layer's number or a list of them"),
        ("rank_pattern", _pattern_map, "a map from regular expressions to positive numbers"),
        ("alpha_pattern", _pattern_map, "a map from regular expressions to positive numbers"),
    ):
        if not is_right(config.get(key)):
            raise AdapterError(f"{path}: {key} must be {meaning}, got {config.get(key)!r:.80}")
    return config


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _names(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return _expression(value)


def _layers(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return value is None or all(type(layer) is int for layer in values)


def _pattern_map(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(_expression(_ending(key)) and _positive(v) for key, v in value.items())
    )


def _expression(value: object) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return isinstance(value, str)


def open_adapter(directory: Path, model: ModelConfig) -> Adapter:
    """Reads and checks an adapter's names, shapes and ranks; its tensors stay on disk.

    raises: AdapterError on wrong nesting, missing or unexpected keys, or sizes of another model
    """
    config = read_config(directory)
    path = directory / WEIGHTS
    if not path.exists():
        hint = "; adapter_model.bin is a pickle and is never read" * (
            (directory / "adapter_model.bin").exists()
        )
        raise AdapterError(f"{path} is missing{hint}")
    linears = {
        name.removesuffix(".weight"): slot
        for name, slot in name_map(model).items()
        if name.endswith("_proj.weight")
    }
    _refuse_endless(config, linears, directory / CONFIG)
    found = _by_module(read_header(inside(directory, WEIGHTS)), path)
    wanted = {name for name in linears if _is_target(name, config)}
    for what, names in (("missing", wanted - found.keys()), ("unexpected", found.keys() - wanted)):
        if names:
            raise AdapterError(
                f"{path}: {len(names)} {what} modules, first {min(names)!r}; "
                f"{CONFIG} targets {config.get('target_modules')!r}"
            )
    if not found:
        raise AdapterError(f"{path}: target_modules {config.get('target_modules')!r} match nothing")
    updates = {
        name: _update(name, found[name], linears[name], config, path)
        for name in linears
        if name in found
    }
    return Adapter(directory, config, updates)


def _refuse_endless(config: dict, names: Iterable[str], path: Path) -> None:
    """Matches the file's expressions in a process of its own first: Python's know no limit of time,
    and one like `(a+)+b` takes years. Expressions that repeat nothing are let through.
    """
    whole = [config.get(key) for key in ("target_modules", "exclude_modules")]
    keys = [key for kind in ("rank_pattern", "alpha_pattern") for key in config.get(kind) or {}]
    repeats = [e for e in (*whole, *keys) if isinstance(e, str) and re.search(r"[*+{]", e)]
    if not repeats:
        return
    told = json.dumps([[*repeats, *map(_ending, keys)], [f"model.{name}" for name in names]])
    command = [sys.executable, "-I", "-S", "-c", MATCHER]
    try:
        subprocess.run(
            command, input=told.encode(), timeout=MATCHING_SECONDS, check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise AdapterError(f"{path}: matching {repeats!r:.200} with names does not end") from error


def _by_module(tensors: dict[str, TensorOnDisk], path: Path) -> dict[str, dict[str, TensorOnDisk]]:
    found: dict[str, dict[str, TensorOnDisk]] = {}
    for name, tensor in tensors.items():
        # base_model.model.layers from a bare model, base_model.model.model.layers from a CausalLM
        hit = re.fullmatch(
            r"base_model\.model\.(?:model\.)?(layers\..+)\.lora_([AB])\.weight", name
        )
        if not hit:
            raise AdapterError(f"{path}: {name!r} is not the name of a LoRA weight of these models")
        module = found.setdefault(hit[1], {})
        if hit[2] in module:
            raise AdapterError(f"{path}: {hit[1]!r} is there in both nestings")
        module[hit[2]] = tensor
    for name, pair in found.items():
        if len(pair) != 2:
            raise AdapterError(f"{path}: {name!r} has only one of lora_A and lora_B")
    return found


def _is_target(name: str, config: dict) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds last parts;
    a module that the list names in full counts in every layer.
    """
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if config.get("exclude_modules") and _matches(name, config["exclude_modules"]):
        return False
    if targets == "all-linear":
        return True
    if isinstance(targets, list) and not {name, f"model.{name}"}.isdisjoint(targets):
        return True
    layers = [layers] if isinstance(layers, int) else layers
    return _matches(name, targets) and (not layers or int(name.split(".")[1]) in layers)


def _matches(name: str, wanted: str | list[str]) -> bool:
    """Bare models call a module `layers...`, those with a head `model.layers...`."""
    forms = (name, f"model.{name}")
    if isinstance(wanted, str):
        return any(re.fullmatch(wanted, form) for form in forms)
    return any(form == w or form.endswith(f".{w}") for form in forms for w in wanted)


def _update(
    name: str, pair: dict[str, TensorOnDisk], slot: Slot, config: dict, path: Path
) -> Update:
    rank = _pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    out_features, in_features = slot.shape
    wanted = {"A": (rank, in_features), "B": (out_features, rank)}
    for letter, shape in wanted.items():
        if pair[letter].shape != shape:
            raise AdapterError(
                f"{path}: lora_{letter} of {name!r} has shape {pair[letter].shape}, "
                f"the model and {CONFIG} ask for {shape}"
            )
        if pair[letter].dtype not in DTYPES:
            raise AdapterError(
                f"{path}: lora_{letter} of {name!r} is {pair[letter].dtype}; "
                f"{', '.join(DTYPES)} are read"
            )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Update(pair["A"], pair["B"], scale)


def _pattern(patterns: dict | None, name: str, default: float):
    """PEFT's rank_pattern and alpha_pattern: the first expression that ends the name wins."""
    for key, value in (patterns or {}).items():
        if re.match(_ending(key), name) or re.match(_ending(key), f"model.{name}"):
            return value
    return default


def _ending(key: str) -> str:
    return rf"(.*\.)?({key})$"


@torch.no_grad()
def merge(model: Transformer, adapters: Sequence[Adapter]) -> None:
    """Adds the updates of all adapters to the weights: summed in fp32, rounded once."""
    if not adapters:
        return
    device, parameters = model.embed.weight.device, dict(model.named_parameters())
    sources = [x for a in adapters for update in a.updates.values() for x in (update.a, update.b)]
    factors = {source: torch.empty(source.shape, device=device) for source in sources}  # fp32
    read_into([(factor, source) for source, factor in factors.items()])
    for name, slot in name_map(model.config).items():
        module = name.removesuffix(".weight")
        updates = [a.updates[module] for a in adapters if module in a.updates]
        if not updates:
            continue
        weight_OD = rows_of(parameters[slot.parameter], slot, model.config)
        wide_OD = weight_OD.float()
        for update in updates:
            wide_OD = torch.addmm(wide_OD, factors[update.b] * update.scale, factors[update.a])
        weight_OD.copy_(wide_OD)


def save(adapters: Sequence[Adapter], directory: Path, base: str) -> None:
    """Writes the adapters as one, in the layout of PEFT and the official library.

    A single adapter keeps its ranks and alphas. Several become one whose rank is their sum, with
    the scales folded into B: exactly the sum of their updates, and any PEFT loads it.
    base: what adapter_config.json names as base_model_name_or_path
    """
    modules = {name: None for adapter in adapters for name in adapter.updates}
    single = adapters[0].config if len(adapters) == 1 else None
    tensors, ranks, alphas = {}, {}, {}
    for name in modules:
        updates = [a.updates[name] for a in adapters if name in a.updates]
        if single:
            a_RD, b_OR = read_tensor(updates[0].a), read_tensor(updates[0].b)
        else:
            pairs = [update.factors() for update in updates]
            a_RD, b_OR = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        rank = alpha = len(a_RD)
        if single:
            alpha = _pattern(single.get("alpha_pattern"), name, single["lora_alpha"])
        ranks[name], alphas[name] = rank, alpha
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RD
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR
    config = {**adapters[-1].config, "base_model_name_or_path": base, "inference_mode": True}
    # The keys are those of a bare model: whatever spoke of a model with a head is said anew.
    config |= {
        "r": max(ranks.values()),
        "lora_alpha": max(alphas.values()),
        "use_rslora": bool(single and single.get("use_rslora")),
        "rank_pattern": _exceptions(ranks),
        "alpha_pattern": _exceptions(alphas),
        "target_modules": _targets(adapters, modules),
    }
    config |= dict.fromkeys(
        ("task_type", "auto_mapping", "exclude_modules", "layers_to_transform", "layers_pattern")
    )
    write_safetensors(tensors, directory / WEIGHTS)
    write_json(config, directory / CONFIG)


def _exceptions(values: dict[str, float]) -> dict[str, float]:
    """rank_pattern or alpha_pattern of the modules whose value is not the largest."""
    usual = max(values.values())
    return {re.escape(name): value for name, value in values.items() if value != usual}


def _targets(adapters: Sequence[Adapter], modules: Iterable[str]) -> list[str]:
    """Last parts of names where every adapter has all modules of that name, else whole names."""
    for config in (adapter.config for adapter in adapters):
        targets = config["target_modules"]
        if config.get("layers_to_transform") not in (None, []) or config.get("exclude_modules"):
            return list(modules)
        if targets != "all-linear" and not (isinstance(targets, list) and set(targets) <= TARGETS):
            return list(modules)
    return sorted({name.rsplit(".", 1)[1] for name in modules})
