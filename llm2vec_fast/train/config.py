"""Training configuration: official flat JSON files, overrides of the command line, one dataclass.

Field names are the official ones: those of transformers.TrainingArguments and of the official
training scripts. Names that are no fields stand in `config_keys.py`, with the reason.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from llm2vec_fast.train.config_checks import KINDS, PROJECTIONS, check
from llm2vec_fast.train.config_keys import ALIASES, IGNORED, REFUSED, TRANSLATED
from llm2vec_fast.train.config_values import parse

# What differs between the trainings: the recipes of the paper and of the official files.
DEFAULTS = {
    "mntp": {
        "max_seq_length": 512,
        "per_device_train_batch_size": 32,
        "learning_rate": 5e-5,
        "warmup_steps": 0,
        "loss_scale": 20.0,
    },
    "simcse": {
        "max_seq_length": 128,
        "per_device_train_batch_size": 128,
        "learning_rate": 3e-5,
        "warmup_steps": 0,
        "loss_scale": 20.0,
    },
    "supervised": {
        "max_seq_length": 512,
        "per_device_train_batch_size": 64,  # 512 over the eight GPUs of the recipe
        "learning_rate": 2e-4,
        "warmup_steps": 300,
        "loss_scale": 50.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training, settled. Values are checked when it is built (ValueError); `load` makes one.

    Fields without a default here have one by kind in DEFAULTS.
    """

    kind: str  # mntp | simcse | supervised

    # model
    model_name_or_path: str
    peft_model_name_or_path: tuple[str, ...] = ()  # merged in this order before the fresh LoRA
    output_dir: str
    bidirectional: bool = True
    torch_dtype: str = "auto"  # the computing type of the base; LoRA weights are float32
    device: str | None = None
    pooling_mode: str = "mean"
    template: str = "auto"
    compat: str = "fixed"

    # data: train_file, or dataset_name (of `datasets`), or Wiki1M / E5 with dataset_file_path
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_file_path: str | None = None
    train_file: tuple[str, ...] = ()
    text_column: str = "text"
    max_seq_length: int  # tokens of a chunk (mntp) or of a text at most
    max_train_samples: int | None = None
    seed: int = 42

    # mntp
    mask_token_type: str = "blank"
    data_collator_type: str = "default"
    mlm_probability: float = 0.2
    line_by_line: bool = False
    validation_file: tuple[str, ...] = ()
    validation_split_percentage: int | None = None  # of the training texts
    max_eval_samples: int | None = None

    # LoRA
    lora_r: int = 16
    lora_alpha: int | None = None  # None becomes 2 * lora_r
    lora_dropout: float = 0.05
    lora_target_modules: tuple[str, ...] = PROJECTIONS
    full_finetuning: bool = False

    # contrastive: simcse and supervised
    simcse_dropout: float = 0.3  # of the attention probabilities
    loss_scale: float
    symmetric: bool = False
    gather_negatives: bool = True  # documents of all ranks are negatives
    mask_duplicates: bool = False  # equal texts are no negatives of each other
    homogeneous_batches: bool = True  # a batch holds one task
    negatives_per_query: int | None = None  # None: as many as the data has
    query_instruction: str | None = None  # None: what the data says
    doc_instruction: str | None = None

    # steps and batches
    per_device_train_batch_size: int
    gradient_accumulation_steps: int = 1
    tokens_per_batch: int | None = None  # tokens in one forward and backward pass; None: by memory
    num_train_epochs: float = 3.0
    max_steps: int = -1  # above 0: the length of the schedule, instead of the epochs
    stop_after_n_steps: int | None = None  # ends the run earlier; the schedule stays
    gradient_checkpointing: bool = False
    fsdp: bool = False  # shard the base over the ranks

    # optimiser and schedule
    learning_rate: float
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    lr_scheduler_type: str = "linear"
    warmup_steps: int
    warmup_ratio: float = 0.0  # of all steps; counts where warmup_steps is 0

    # log, checkpoints, evaluation
    logging_steps: int = 10
    disable_tqdm: bool = False  # JSON lines on a terminal too
    save_strategy: str = "steps"
    save_steps: int = 200
    save_total_limit: int | None = 2  # None keeps all
    overwrite_output_dir: bool = False  # checkpoints of another run may be deleted
    # false: begin anew; a text: from that one; else from the newest, if this very run made it
    resume_from_checkpoint: bool | str | None = None
    eval_steps: int | None = None  # None: at the end only
    eval_file: str | None = None  # pairs of sentences with a score (STS)

    def __post_init__(self):
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.lora_r)
        check(self)

    @property
    def files(self) -> tuple[str, ...]:
        """The local training data; empty where it comes from `datasets` by name."""
        return self.train_file or ((self.dataset_file_path,) if self.dataset_file_path else ())


TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Config).items()}
TYPES |= {name: (tuple,) for name, types in TYPES.items() if Ellipsis in types}  # tuple[str, ...]
COMMON = {field.name: field.default for field in fields(Config) if field.default is not MISSING}
_MNTP, _TEXTS = ("mntp",), ("mntp", "simcse")
_PAIRS, _TASKS = ("simcse", "supervised"), ("supervised",)
ONLY = {  # fields that some trainings do not use: said, not silently dropped
    **dict.fromkeys(("mask_token_type", "data_collator_type", "mlm_probability"), _MNTP),
    **dict.fromkeys(("line_by_line", "validation_file"), _MNTP),
    **dict.fromkeys(("validation_split_percentage", "max_eval_samples"), _MNTP),
    **dict.fromkeys(("dataset_config_name", "text_column"), _TEXTS),
    **dict.fromkeys(("simcse_dropout", "compat"), ("simcse",)),
    **dict.fromkeys(("loss_scale", "symmetric", "gather_negatives", "mask_duplicates"), _PAIRS),
    "loss_class": _PAIRS,
    **dict.fromkeys(("homogeneous_batches", "negatives_per_query"), _TASKS),
    **dict.fromkeys(("query_instruction", "doc_instruction"), _TASKS),
}
_HELD_OUT = dict.fromkeys(KINDS, "eval_file") | {
    "mntp": "validation_file, validation_split_percentage or eval_file"
}
# An override also takes away what it stands instead of.
REPLACES = {
    "train_file": ("dataset_name", "dataset_config_name", "dataset_file_path"),
    "dataset_name": ("train_file", "dataset_config_name", "dataset_file_path"),
    "dataset_file_path": ("train_file",),
    "warmup_ratio": ("warmup_steps",),
    "warmup_steps": ("warmup_ratio",),
    "validation_file": ("validation_split_percentage",),
    "validation_split_percentage": ("validation_file",),
}


def load(
    kind: str, path: str | Path | None, overrides: Sequence[str] | Mapping = ()
) -> tuple[Config, list[str]]:
    """The configuration of a training, and a line for each key that is ignored.

    path:      an official flat JSON file, or None
    overrides: words of a command line (`--field value`, `--field=value`) or a mapping; they win
    raises:    ValueError naming the key, where it stands and what to do
    """
    if kind not in KINDS:
        raise ValueError(f"training {kind!r} is unknown; known: {', '.join(KINDS)}")
    values, lines = {}, []
    if path is not None:
        values, lines = _settle(kind, str(path), _read_file(Path(path)))
    if isinstance(overrides, Mapping):
        later, more = _settle(kind, "the overrides", overrides)
    else:
        later, more = _settle(kind, "the command line", _read_words(overrides))
    for name in (name for name, value in later.items() if value):
        for other in REPLACES.get(name, ()):
            values.pop(other, None)
    values |= later
    if values.get("warmup_ratio") and "warmup_steps" not in values:
        values["warmup_steps"] = 0  # the recipe's own warm-up gives way to one that is asked for
    settled = COMMON | DEFAULTS[kind] | values
    for name in ("model_name_or_path", "output_dir"):
        if not settled.get(name):
            raise ValueError(f"{name} is missing: put it into the file or give --{name}")
    config = Config(kind=kind, **settled)
    held_out = config.validation_file or config.validation_split_percentage or config.eval_file
    if config.eval_steps and not held_out:
        more.append(f"eval_steps: ignored (there is nothing to evaluate: give {_HELD_OUT[kind]})")
    return config, lines + more


def as_json(config: Config) -> dict:
    """All that the training uses, as JSON values; `load` makes an equal Config of it."""
    values = {k: v for k, v in asdict(config).items() if config.kind in ONLY.get(k, KINDS)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


# Reading


def _read_file(path: Path) -> dict:
    def once(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} stands in it twice")
        return dict(pairs)

    try:
        told = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError as error:
        raise ValueError(f"there is no configuration file {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a JSON configuration: {error}") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} must hold a JSON object of keys and values")
    return told


def _read_words(words: Sequence[str]) -> dict:
    """`--field value`, `--field=value`; `--field` alone means true, as for the official scripts."""
    told, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"{word!r} on the command line: expected --field value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            alone = not rest or rest[0].startswith("--")
            if alone and bool not in TYPES.get(name, (bool,)):
                raise ValueError(f"--{name} on the command line needs a value")
            value = "true" if alone else rest.pop(0)
        if value == "null":
            told[name] = None
        elif TYPES.get(name) == (tuple,) and not value.startswith("["):
            told[name] = [part for part in value.split(",") if part]
        else:
            told[name] = value
    return told


def _settle(kind: str, where: str, told: Mapping) -> tuple[dict, list[str]]:
    """One source of keys as values of fields, and lines about keys that are ignored."""
    _refuse_unknown(where, told)
    told, lines = _translate(kind, where, told)
    values, lines = {}, list(lines)
    for name, value in told.items():
        if kind not in ONLY.get(name, KINDS):
            lines.append(f"{name}: ignored (it belongs to {' and '.join(ONLY[name])})")
        elif name in IGNORED:
            lines.append(f"{name}: ignored ({IGNORED[name]})")
        elif name in REFUSED:
            allowed, why = REFUSED[name]
            if value is not None and not _is_one_of(value, allowed):
                raise ValueError(f"{name} {value!r} in {where} is not supported: {why}")
            lines.append(f"{name}: ignored ({why})")
        elif value is None and NoneType not in TYPES[name]:
            values[name] = (COMMON | DEFAULTS[kind]).get(name)
        else:
            values[name] = parse(where, name, value, TYPES[name])
    return values, lines


def _refuse_unknown(where: str, told: Mapping) -> None:
    known = sorted({*TYPES, *ALIASES, *TRANSLATED, *IGNORED, *REFUSED})
    unknown = []
    for name in (name for name in told if name not in known):
        near = _nearest(str(name), known, 0.9) or _nearest(str(name), TYPES, 0.5)
        unknown.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if unknown:
        raise ValueError(f"unknown key in {where}: {', '.join(unknown)}")


def _nearest(name: str, names: Iterable[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)


def _is_one_of(value: object, allowed: Iterable) -> bool:
    # A command line has text only.
    return any(value == one or str(value).lower() == str(one).lower() for one in allowed)


def _translate(kind: str, where: str, told: Mapping) -> tuple[dict, list[str]]:
    """Other names and other ways to say the same, as fields."""
    out, named = {}, {}
    for name, value in told.items():
        field = ALIASES.get(name, name)
        if field in out:
            raise ValueError(
                f"{named[field]} and {name} in {where} are one setting: keep one of them"
            )
        out[field], named[field] = value, name
    if out.pop("kind", kind) != kind:
        raise ValueError(f"{where} is for the training {told['kind']!r}, not {kind!r}")
    _translate_evaluation(where, out)
    if isinstance(out.get("fsdp"), str) and {*out["fsdp"].split()} <= {"full_shard", "auto_wrap"}:
        out["fsdp"] = bool(out["fsdp"])  # TrainingArguments has text here, "" for no
    if out.get("warmup_steps") is not None:
        steps = parse(where, "warmup_steps", out["warmup_steps"], (float,))
        if 0 < steps < 1 and not out.get("warmup_ratio"):  # so since transformers 5
            out["warmup_ratio"] = out.pop("warmup_steps")
    return out, _translate_flags(where, out)


def _translate_flags(where: str, out: dict) -> list[str]:
    """bf16, fp16 and use_cpu into what they stand for, where that is not said itself."""
    lines = []
    flags = {"bf16": "bfloat16", "fp16": "float16", "use_cpu": "cpu"}
    told = {
        name: parse(where, name, out.pop(name), (bool, NoneType)) for name in flags if name in out
    }
    if told.get("bf16") and told.get("fp16"):
        raise ValueError(f"bf16 and fp16 in {where} exclude each other: keep one of them")
    for name in (name for name, wanted in told.items() if wanted):
        field = "device" if name == "use_cpu" else "torch_dtype"
        if out.get(field) is None:
            out[field] = flags[name]
        elif out[field] != flags[name]:
            lines.append(f"{name}: ignored ({field} {out[field]!r} is given)")
    return lines


def _translate_evaluation(where: str, out: dict) -> None:
    """eval_strategy into eval_steps; steps without a number means as often as the log."""
    strategy = out.pop("eval_strategy", None)
    if strategy not in (None, "no", "steps"):
        raise ValueError(f"eval_strategy {strategy!r} in {where}: use 'steps' with eval_steps")
    if strategy == "no":
        out["eval_steps"] = None
    elif strategy == "steps" and out.get("eval_steps") is None:
        out["eval_steps"] = out.get("logging_steps") or COMMON["logging_steps"]
