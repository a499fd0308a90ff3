"""LoRA adapters in training: put beside the fused projections, written in PEFT's layout.

R rank, D in features, O out features
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_fast.model.checkpoint import write_json, write_safetensors
from llm2vec_fast.model.lora import CONFIG, TARGETS, WEIGHTS
from llm2vec_fast.model.transformer import Linear, Lora, Transformer
from llm2vec_fast.model.weights import name_map, rows_of


def attach(
    model: Transformer,
    rank: int,
    alpha: float,
    targets: Collection[str] = TARGETS,
    seed: int = 0,
) -> None:
    """Freezes the model and puts fresh fp32 adapters beside the projections that `targets` name.

    A starts uniform within 1 / sqrt(D) and B at zero, as in PEFT, so that nothing changes yet.
    raises: ValueError on unknown targets and ranks below 1, or if the model has adapters already
    source: LoRA, arXiv:2106.09685
    """
    unknown = set(targets) - TARGETS
    if unknown or not targets:
        raise ValueError(
            f"lora_target_modules {sorted(unknown) or 'empty'}: choose among {sorted(TARGETS)}"
        )
    if rank < 1:
        raise ValueError(f"the rank of an adapter must be at least 1, got {rank}")
    if model.fp8_keep is not None:
        raise ValueError("a model in fp8 cannot be trained: load it with dtype='bfloat16'")
    if any(isinstance(m, Linear) and m.lora is not None for m in model.modules()):
        raise ValueError("the model has adapters in training already; load it anew for others")
    model.requires_grad_(False)
    noise = torch.Generator().manual_seed(seed)
    for path, parts in _fused(model, targets).items():
        linear = _linear(model, path)
        weight_OD = linear.weight
        D, R = weight_OD.shape[1], rank * len(parts)
        a_RD = (torch.rand(R, D, generator=noise) * 2 - 1) / D**0.5
        b_OR = torch.zeros(weight_OD.shape[0], R)
        segments = [
            (rows.start, rows.stop, rank * i, rank * (i + 1), alpha / rank)
            for i, (_, rows) in enumerate(parts)
        ]
        linear.lora = Lora(a_RD.to(weight_OD.device), b_OR.to(weight_OD.device), segments)


def factors(model: Transformer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module in Hugging Face's name, A (R, D), B (O, R)) of each adapter: views, not copies."""
    for path, parts in _fused(model, TARGETS).items():
        lora = _linear(model, path).lora
        if lora is None:
            continue
        own = {segment[:2]: slice(*segment[2:4]) for segment in lora.segments}
        for name, rows in parts:
            ranks = own.get((rows.start, rows.stop))
            if ranks is not None:
                yield name, lora.a[ranks], lora.b[rows, ranks]


def save(
    model: Transformer,
    directory: Path,
    base: str,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the adapters in training as PEFT and the official library read them.

    base: what adapter_config.json names as base_model_name_or_path
    """
    tensors = {}
    for name, a_RD, b_OR in factors(model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RD.detach().to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR.detach().to(dtype)
    rank, alpha = shape(model)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name, *_ in factors(model)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    write_safetensors(tensors, directory / WEIGHTS)
    write_json(config, directory / CONFIG)


def shape(model: Transformer) -> tuple[int, float]:
    """(rank, alpha) of the adapters in training, which are the same everywhere."""
    lora = next(m.lora for m in model.modules() if isinstance(m, Linear) and m.lora is not None)
    _, _, r0, r1, scale = lora.segments[0]
    alpha = round(scale * (r1 - r0), 9)  # 29 / 7 * 7 is not 29
    return r1 - r0, int(alpha) if alpha.is_integer() else alpha


def _fused(model: Transformer, targets: Collection[str]) -> dict[str, list[tuple[str, slice]]]:
    """{path of a fused projection: [(Hugging Face's module, its rows of the output)]}."""
    found: dict[str, list[tuple[str, slice]]] = {}
    for name, slot in name_map(model.config).items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rsplit(".", 1)[-1] in targets:
            path = slot.parameter.removesuffix(".weight")
            # Only its shape is asked for: the weight itself may be sharded.
            whole_OD = torch.empty(_linear(model, path).weight.shape, device="meta")
            part = rows_of(whole_OD, slot, model.config)
            first = part.storage_offset() // whole_OD.shape[1]
            found.setdefault(path, []).append((module, slice(first, first + part.shape[0])))
    return found


def _linear(model: Transformer, path: str) -> Linear:
    linear = model.get_submodule(path)
    assert isinstance(linear, Linear)
    return linear
