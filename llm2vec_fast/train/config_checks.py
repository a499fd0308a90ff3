"""What values a configuration may hold, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llm2vec_fast.settings import DTYPES, POOLING
from llm2vec_fast.text import Template

if TYPE_CHECKING:
    from llm2vec_fast.train.config import Config

KINDS = ("mntp", "simcse", "supervised")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIKI1M, E5 = "Wiki1M", "E5"  # official names of formats: dataset_file_path says where the data is

CHOICES = {
    "kind": KINDS,
    "torch_dtype": ("auto", *DTYPES),
    "pooling_mode": tuple(POOLING),
    "compat": ("fixed", "official"),
    "mask_token_type": ("blank", "eos", "mask"),
    "data_collator_type": ("default", "all_mask"),
    "lr_scheduler_type": ("linear", "cosine", "constant", "constant_with_warmup"),
    "save_strategy": ("steps", "no"),
}
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda v: v >= 1,
        "per_device_train_batch_size gradient_accumulation_steps tokens_per_batch lora_r "
        "lora_alpha max_train_samples max_eval_samples stop_after_n_steps logging_steps save_steps "
        "save_total_limit eval_steps",
    ),
    ("at least 2", lambda v: v >= 2, "max_seq_length"),
    (
        "at least 0",
        lambda v: v >= 0,
        "warmup_steps weight_decay max_grad_norm negatives_per_query",
    ),
    ("at least 0 and below 2**63", lambda v: 0 <= v < 2**63, "seed"),
    ("-1 or at least 1", lambda v: v == -1 or v >= 1, "max_steps"),
    ("above 0", lambda v: v > 0, "learning_rate adam_epsilon loss_scale num_train_epochs"),
    (
        "at least 0 and below 1",
        lambda v: 0 <= v < 1,
        "lora_dropout simcse_dropout adam_beta1 adam_beta2 warmup_ratio",
    ),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, "mlm_probability"),
    ("between 1 and 99", lambda v: 1 <= v <= 99, "validation_split_percentage"),
)


def check(config: Config) -> None:
    """Raises ValueError naming the field, its value and what it may be."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name} {getattr(config, name)!r} is unknown; known: {', '.join(choices)}"
            )
    for text, holds, names in RANGES:
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {text}, got {value}")
    strange = [name for name in config.lora_target_modules if name not in PROJECTIONS]
    if strange or not config.lora_target_modules:
        raise ValueError(
            f"lora_target_modules {strange} must be one or more of {', '.join(PROJECTIONS)}"
        )
    if config.template != "auto":
        Template.parse(config.template)
    if config.warmup_steps and config.warmup_ratio:
        raise ValueError("warmup_steps and warmup_ratio exclude each other: set one of them to 0")
    if config.validation_file and config.validation_split_percentage:
        raise ValueError(
            "validation_file and validation_split_percentage exclude each other: keep one of them"
        )
    _check_data(config)


def _check_data(config: Config) -> None:
    name, path, kind = config.dataset_name, config.dataset_file_path, config.kind
    if not (config.train_file or name or path):
        raise ValueError("there is no training data: give train_file or dataset_name")
    if config.train_file and (name or path):
        other = f"dataset_name {name!r}" if name else f"dataset_file_path {path!r}"
        raise ValueError(f"train_file and {other} are two sources of data: keep one of them")
    if config.dataset_config_name and not name:
        raise ValueError("dataset_config_name belongs to a dataset_name, and there is none")
    if name in (WIKI1M, E5) and not path:
        raise ValueError(f"dataset_name {name!r} needs dataset_file_path: where that data lies")
    if name and path and name not in (WIKI1M, E5):
        raise ValueError(
            f"dataset_name {name!r} comes from `datasets` and dataset_file_path from disk: keep one"
            f" of them (only {WIKI1M} and {E5} take both)"
        )
    if name == E5 and kind != "supervised":
        raise ValueError(f"dataset_name {E5!r} holds queries and documents: train 'supervised'")
    if name == WIKI1M and kind == "supervised":
        raise ValueError(f"dataset_name {WIKI1M!r} holds single sentences: train 'simcse'")
    if name and name != E5 and kind == "supervised":
        raise ValueError(
            f"dataset_name {name!r}: 'supervised' reads files of query, positive and negative; "
            "give them as train_file"
        )
