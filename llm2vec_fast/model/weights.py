"""Hugging Face's weight names and ours: one map, read both ways, to load and to save."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm2vec_fast.model.checkpoint import (
    DTYPES,
    TensorOnDisk,
    WeightsError,
    open_checkpoint,
    read_into,
    save_checkpoint,
)
from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.transformer import Transformer
from llm2vec_fast.ops.swiglu import unpack_gate_up

# Present in many checkpoints and of no use to an encoder.
IGNORED = ("lm_head.", "score.")
IGNORED_ENDS = ("rotary_emb.inv_freq", "attention.masked_bias", "attention.bias")


@dataclass(frozen=True)
class Slot:
    """Where a Hugging Face tensor lies in ours: a block of rows of a parameter."""

    parameter: str
    part: str  # "" whole; "q" "k" "v" rows of qkv; "gate" "up" of gate_up
    shape: tuple[int, ...]


def name_map(config: ModelConfig) -> dict[str, Slot]:
    """{Hugging Face name without `model.`: Slot}, in the order of the model."""
    D, width, H = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.n_heads * H, config.n_kv_heads * H
    slots = {"embed_tokens.weight": Slot("embed.weight", "", (config.vocab_size, D))}

    def linear(theirs: str, ours: str, part: str, rows: int, columns: int, bias: bool) -> None:
        slots[f"{theirs}.weight"] = Slot(f"{ours}.weight", part, (rows, columns))
        if bias:
            slots[f"{theirs}.bias"] = Slot(f"{ours}.bias", part, (rows,))

    for i in range(config.n_layers):
        hf, us = f"layers.{i}", f"layers.{i}"
        slots[f"{hf}.input_layernorm.weight"] = Slot(f"{us}.attn_norm.weight", "", (D,))
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            linear(f"{hf}.self_attn.{part}_proj", f"{us}.attn.qkv", part, rows, D, config.qkv_bias)
        if config.qk_norm:
            slots[f"{hf}.self_attn.q_norm.weight"] = Slot(f"{us}.attn.q_norm.weight", "", (H,))
            slots[f"{hf}.self_attn.k_norm.weight"] = Slot(f"{us}.attn.k_norm.weight", "", (H,))
        linear(f"{hf}.self_attn.o_proj", f"{us}.attn.o", "", D, q, config.o_bias)
        slots[f"{hf}.post_attention_layernorm.weight"] = Slot(f"{us}.mlp_norm.weight", "", (D,))
        for part in ("gate", "up"):
            linear(f"{hf}.mlp.{part}_proj", f"{us}.mlp.gate_up", part, width, D, config.mlp_bias)
        linear(f"{hf}.mlp.down_proj", f"{us}.mlp.down", "", D, width, config.mlp_bias)
    slots["norm.weight"] = Slot("norm.weight", "", (D,))
    return slots


def rows_of(parameter: Tensor, slot: Slot, config: ModelConfig) -> Tensor:
    """The view of a parameter that holds one Hugging Face tensor."""
    if slot.part in ("q", "k", "v"):
        q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        return parameter.split([q, kv, kv])["qkv".index(slot.part)]
    if slot.part in ("gate", "up"):
        return unpack_gate_up(parameter, dim=0)[slot.part == "up"]
    return parameter


def match(found: dict[str, TensorOnDisk], slots: dict[str, Slot], where: object):
    """Pairs every slot with its tensor on disk; WeightsError on whatever does not fit."""
    bare: dict[str, TensorOnDisk] = {}
    for name, tensor in found.items():
        name = name.removeprefix("model.")
        if name.startswith(IGNORED) or name.endswith(IGNORED_ENDS):
            continue
        if name in bare:
            raise WeightsError(f"{where}: {name!r} is there with and without the prefix `model.`")
        bare[name] = tensor
    missing, unexpected = slots.keys() - bare.keys(), bare.keys() - slots.keys()
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            some = ", ".join(sorted(names)[:4])
            raise WeightsError(
                f"{where}: {len(names)} {what} weights ({some}{', ...' * (len(names) > 4)}); "
                "does config.json describe these files?"
            )
    for name, slot in slots.items():
        if bare[name].shape != slot.shape:
            raise WeightsError(
                f"{bare[name].path}: {name!r} has shape {bare[name].shape}, "
                f"config.json asks for {slot.shape}"
            )
        if bare[name].dtype not in DTYPES:
            raise WeightsError(
                f"{bare[name].path}: {name!r} is {bare[name].dtype}; {', '.join(DTYPES)} are read"
            )
    return [(slot, bare[name]) for name, slot in slots.items()]


def load(
    directory: Path, config: ModelConfig, causal: bool, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """A Transformer with the weights of a directory, in `dtype` on `device`.

    All names and shapes are checked against the headers before anything is allocated.
    raises: WeightsError
    """
    pairs = match(open_checkpoint(directory), name_map(config), directory)
    with torch.device("meta"):
        model = Transformer(config, causal)
    empty = {
        n: torch.empty(p.shape, dtype=dtype, device=device) for n, p in model.named_parameters()
    }
    model.load_state_dict(empty, assign=True)
    model.requires_grad_(False).eval()
    parameters = dict(model.named_parameters())
    read_into([(rows_of(parameters[s.parameter], s, config), source) for s, source in pairs])
    return model


def head_of(directory: Path, model: Transformer) -> Callable[[], Tensor]:
    """A function that gives the language-model head (V, D): the embedding as it then is where they
    are tied, else what the files have, in the dtype of `model`'s weights and frozen.

    raises: WeightsError if the model has a head of its own and the directory does not hold it
    """
    if model.config.tied_embeddings:
        return lambda: model.embed.weight
    found = open_checkpoint(directory).get("lm_head.weight")
    if found is None:
        raise WeightsError(
            f"{directory} has no lm_head.weight, and config.json does not tie the head to the "
            "embedding: masked next token prediction needs the checkpoint of a causal LM"
        )
    if found.shape != tuple(model.embed.weight.shape):
        raise WeightsError(
            f"{found.path}: 'lm_head.weight' has shape {found.shape}, "
            f"config.json asks for {tuple(model.embed.weight.shape)}"
        )
    like = model.embed.weight  # not empty_like: the embedding may be sharded
    head_VD = torch.empty(found.shape, dtype=like.dtype, device=like.device)
    read_into([(head_VD, found)])
    return lambda: head_VD


def unfused(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight, as a bare model without a head names them."""
    parameters = dict(model.named_parameters())
    for name, slot in name_map(model.config).items():
        yield name, rows_of(parameters[slot.parameter], slot, model.config)


def save(model: Transformer, directory: Path) -> None:
    """Writes the weights in Hugging Face's names, as `AutoModel` loads them."""
    save_checkpoint(unfused(model), directory)
