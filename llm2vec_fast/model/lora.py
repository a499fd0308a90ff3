"""PEFT LoRA adapters: read in either nesting of keys, merged into the fused weights, written back.

R rank, D in features, O out features
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_fast.model.checkpoint import (
    TensorOnDisk,
    WeightsError,
    read_header,
    read_tensor,
    write_json,
    write_safetensors,
)
from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.transformer import Transformer
from llm2vec_fast.model.weights import Slot, name_map, rows_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Settings that change what the adapter computes and that this engine does not have: refused if set.
UNSUPPORTED = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "megatron_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters",
    "trainable_token_indices", "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip


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
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise AdapterError(f"{path}: only LoRA adapters are supported")
    for key in UNSUPPORTED:
        if config.get(key):
            raise AdapterError(f"{path}: {key} = {config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias = {config['bias']!r} is not supported, only 'none'")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise AdapterError(f"{path}: {key} must be a positive number, got {value!r}")
    return config


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
    found = _by_module(read_header(path), path)
    wanted = {name for name in linears if _is_target(name, config, path)}
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


def _is_target(name: str, config: dict, path: Path) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds last parts."""
    targets = config.get("target_modules")
    layers = config.get("layers_to_transform")
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        if int(name.split(".")[1]) not in layers:
            return False
    if targets == "all-linear":
        return True
    try:
        if isinstance(targets, str):
            return any(re.fullmatch(targets, form) for form in (name, f"model.{name}"))
        return any(name == t or name.endswith("." + t.removeprefix("model.")) for t in targets)
    except (re.error, TypeError, AttributeError) as error:
        raise AdapterError(f"{path.parent / CONFIG}: target_modules {targets!r}: {error}") from None


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
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Update(pair["A"], pair["B"], scale)


def _pattern(patterns: dict | None, name: str, default: float):
    """PEFT's rank_pattern and alpha_pattern: the first expression that ends the name wins."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name) or re.match(rf"(.*\.)?({key})$", f"model.{name}"):
            return value
    return default


@torch.no_grad()
def merge(model: Transformer, adapters: Sequence[Adapter]) -> None:
    """Adds the updates of all adapters to the weights: summed in fp32, rounded once."""
    parameters = dict(model.named_parameters())
    for name, slot in name_map(model.config).items():
        module = name.removesuffix(".weight")
        updates = [a.updates[module] for a in adapters if module in a.updates]
        if not updates:
            continue
        weight_OD = rows_of(parameters[slot.parameter], slot, model.config)
        wide_OD = weight_OD.float()
        for update in updates:
            a_RD, b_OR = (factor.to(wide_OD.device) for factor in update.factors())
            wide_OD = torch.addmm(wide_OD, b_OR, a_RD)
        weight_OD.copy_(wide_OD)


def save(adapters: Sequence[Adapter], directory: Path, base: str) -> None:
    """Writes the adapters as one, in the layout of PEFT and the official library.

    A single adapter keeps its rank and alpha. Several become one whose rank is their sum, with the
    scales folded into B: exactly the sum of their updates, and any PEFT loads it.
    base: what adapter_config.json names as base_model_name_or_path
    """
    modules = {name: None for adapter in adapters for name in adapter.updates}
    tensors, ranks = {}, {}
    for name in modules:
        updates = [a.updates[name] for a in adapters if name in a.updates]
        if len(adapters) == 1:
            a_RD, b_OR = read_tensor(updates[0].a), read_tensor(updates[0].b)
        else:
            pairs = [update.factors() for update in updates]
            a_RD, b_OR = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
        ranks[name] = len(a_RD)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RD
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR
    config = {**adapters[-1].config, "base_model_name_or_path": base, "inference_mode": True}
    if len(adapters) > 1:
        rank = max(ranks.values())
        odd = {name: r for name, r in ranks.items() if r != rank}
        config |= {
            "r": rank,
            "lora_alpha": rank,
            "use_rslora": False,
            "rank_pattern": {re.escape(name): r for name, r in odd.items()},
            "alpha_pattern": {re.escape(name): r for name, r in odd.items()},
            "target_modules": sorted({name.rsplit(".", 1)[1] for name in modules}),
            "layers_to_transform": None,
        }
    write_safetensors(tensors, directory / WEIGHTS)
    write_json(config, directory / CONFIG)
