"""Training configuration: official files, every class of key, overrides, each refusal."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm2vec_fast.train import config as config_module
from llm2vec_fast.train.config import (
    COMMON,
    DEFAULTS,
    ONLY,
    REPLACES,
    TYPES,
    Config,
    as_json,
    load,
)
from llm2vec_fast.train.config_checks import CHOICES, KINDS, PROJECTIONS, RANGES
from llm2vec_fast.train.config_keys import ALIASES, IGNORED, REFUSED, TRANSLATED

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "train").glob("*.json"))
LEAST = {
    "mntp": {"model_name_or_path": "m", "output_dir": "o", "train_file": "a.txt"},
    "simcse": {"model_name_or_path": "m", "output_dir": "o", "train_file": "a.txt"},
    "supervised": {"model_name_or_path": "m", "output_dir": "o", "train_file": "a.jsonl"},
}

# The official files' keys and values (llm2vec, train_configs); {} is what differs by model.
ALL = {
    "gradient_accumulation_steps": 1,
    "do_train": True,
    "overwrite_output_dir": True,
    "save_steps": 200,
    "stop_after_n_steps": 1000,
    "lora_r": 16,
    "gradient_checkpointing": True,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
}
MNTP = ALL | {
    "dataset_name": "wikitext",
    "dataset_config_name": "wikitext-103-raw-v1",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "do_eval": True,
    "max_seq_length": 512,
    "mask_token_type": "blank",
    "data_collator_type": "default",
    "mlm_probability": 0.2,
    "evaluation_strategy": "steps",
    "eval_steps": 100,
}
PAIRS = ALL | {
    "bidirectional": True,
    "pooling_mode": "mean",
    "remove_unused_columns": False,
    "disable_tqdm": False,
    "logging_steps": 50,
    "save_only_model": True,
    "seed": 42,
}
SIMCSE = PAIRS | {
    "simcse_dropout": 0.3,
    "dataset_name": "Wiki1M",
    "dataset_file_path": "cache/wiki1m_for_simcse.txt",
    "learning_rate": 3e-05,
    "loss_scale": 20,
    "per_device_train_batch_size": 128,
    "max_seq_length": 128,
}
SUPERVISED = PAIRS | {
    "dataset_name": "E5",
    "dataset_file_path": "cache/echo-data",
    "learning_rate": 0.0002,
    "num_train_epochs": 3,
    "warmup_steps": 300,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
    "max_seq_length": 512,
}
ALL_MASK = {"data_collator_type": "all_mask", "mlm_probability": 0.8}
LLAMA2, LLAMA3 = "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA31, SHEARED = "meta-llama/Meta-Llama-3.1-8B-Instruct", "princeton-nlp/Sheared-LLaMA-1.3B"
MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"
ADAPTER = {
    LLAMA2: "McGill-NLP/LLM2Vec-Llama-2-7b-chat-hf-mntp",
    LLAMA3: "McGill-NLP/LLM2Vec-Meta-Llama-3-8B-Instruct-mntp",
    LLAMA31: "output/mntp/Meta-Llama-3.1-8B-Instruct/checkpoint-1000",
    MISTRAL: "McGill-NLP/LLM2Vec-Mistral-7B-Instruct-v2-mntp",
    SHEARED: "McGill-NLP/LLM2Vec-Sheared-LLaMA-mntp",
}
OFFICIAL = [
    *(("mntp", name, MNTP) for name in (LLAMA2, LLAMA3, LLAMA31, SHEARED)),
    ("mntp", MISTRAL, MNTP | ALL_MASK),
    *(("simcse", name, SIMCSE) for name in (LLAMA2, LLAMA3, MISTRAL, SHEARED)),
    *(("supervised", name, SUPERVISED) for name in ADAPTER),
]


def written(tmp_path: Path, told: object) -> Path:
    path = tmp_path / "config.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return path


def settled(kind: str = "mntp", **told) -> Config:
    return load(kind, None, LEAST[kind] | told)[0]


# Official files


@pytest.mark.parametrize(
    "kind, model, told", OFFICIAL, ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_official_file_loads_unchanged(kind, model, told, tmp_path):
    told = told | {"model_name_or_path": model, "output_dir": "output/x"}
    if kind != "mntp":
        told["peft_model_name_or_path"] = ADAPTER[model]
    config, lines = load(kind, written(tmp_path, told))
    assert (config.kind, config.model_name_or_path) == (kind, model)
    used = told.keys() & TYPES.keys()
    for name in used - {"peft_model_name_or_path"}:
        assert getattr(config, name) == told[name], name
    assert config.peft_model_name_or_path == ((ADAPTER[model],) if kind != "mntp" else ())
    assert config.lora_alpha == 32 and config.lora_target_modules == PROJECTIONS
    # What is no field is either translated or has its one line.
    ignored = told.keys() - used - {"evaluation_strategy"}
    ignored |= {"eval_steps"} & told.keys()  # no file says what to evaluate
    assert sorted(line.split(":")[0] for line in lines) == sorted(ignored)
    assert all(len(line.splitlines()) == 1 and "(" in line for line in lines)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_without_a_word(path):
    kind = path.stem.rpartition("_")[2]
    config, lines = load(kind, path)
    assert lines == [] and config.kind == kind


def test_examples_of_each_training():
    assert len(EXAMPLES) == 7 and {p.stem.rpartition("_")[2] for p in EXAMPLES} == set(KINDS)


# Classes of keys


def test_every_name_of_training_arguments_is_known():
    from transformers import TrainingArguments

    known = {*TYPES, *ALIASES, *TRANSLATED, *IGNORED, *REFUSED}
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= known


def test_every_name_that_transformers_has_dropped_is_known():
    """Names of TrainingArguments 4.40 that 5.23 no longer has."""
    gone = (
        "_n_gpu adafactor dispatch_batches evaluation_strategy fp16_backend fp16_opt_level "
        "fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap group_by_length "
        "half_precision_backend include_inputs_for_metrics include_tokens_per_second jit_mode_eval "
        "logging_dir mp_parameters no_cuda overwrite_output_dir past_index per_gpu_eval_batch_size "
        "per_gpu_train_batch_size push_to_hub_model_id push_to_hub_organization push_to_hub_token "
        "ray_scope save_safetensors split_batches torchdynamo tpu_metrics_debug tpu_num_cores "
        "use_ipex use_legacy_prediction_loop use_mps_device warmup_ratio"
    ).split()
    assert {*gone} <= {*TYPES, *ALIASES, *TRANSLATED, *IGNORED, *REFUSED}


def test_every_name_of_the_official_scripts_is_known():
    names = (
        "model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer "
        "model_revision token use_auth_token trust_remote_code low_cpu_mem_usage validation_file "
        "overwrite_cache validation_split_percentage preprocessing_num_workers line_by_line "
        "pad_to_max_length max_train_samples max_eval_samples streaming lora_dropout "
        "experiment_id loss_class attn_implementation train_file"
    ).split()
    assert {*names} <= {*TYPES, *IGNORED, *REFUSED}


def test_the_classes_of_keys_are_disjoint():
    classes = (TYPES.keys() - {"kind"}, ALIASES, TRANSLATED, IGNORED, REFUSED)
    names = [name for names in classes for name in names]
    assert len(names) == len(set(names))
    assert {*ALIASES.values()} <= {*TYPES, *TRANSLATED}
    assert {*ONLY} <= {*TYPES, *REFUSED} and {*REPLACES} <= {*TYPES}


@pytest.mark.parametrize("kind", KINDS)
def test_every_ignored_key_prints_one_line_with_its_reason(kind):
    told = dict.fromkeys(IGNORED, "anything") | dict.fromkeys(REFUSED)
    config, lines = load(kind, None, LEAST[kind] | told)
    assert config == settled(kind)
    assert [line.split(":")[0] for line in lines] == list(told)
    for line in lines:
        name = line.split(":")[0]
        reason = IGNORED.get(name) or REFUSED[name][1]
        assert reason in line or (name == "loss_class" and "it belongs to" in line)


def test_a_secret_is_not_printed():
    _, lines = load("mntp", None, LEAST["mntp"] | {"hub_token": "hf_secret", "token": "hf_secret"})
    assert len(lines) == 2 and "hf_secret" not in "".join(lines)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_result_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} 'other' in the overrides is not supported: "):
        settled("simcse", **{name: "other"})


def test_the_harmless_values_of_refused_keys_pass(tmp_path):
    harmless = {name: allowed[0] for name, (allowed, _) in REFUSED.items() if allowed}
    for told in (harmless, {name: str(value) for name, value in harmless.items()}):
        assert len(load("simcse", None, LEAST["simcse"] | told)[1]) == len(harmless)


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("learnin_rate", "learning_rate"),
        ("lora_rank", "lora_r"),
        ("per_device_batch_size", "per_device_train_batch_size"),
        ("attn_implementaton", "attn_implementation"),
        ("Seed", "seed"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_match(wrong, near, tmp_path):
    path = written(tmp_path, LEAST["mntp"] | {wrong: 1})
    with pytest.raises(ValueError, match=f"unknown key in .*config.json: '{wrong}' .*'{near}'"):
        load("mntp", path)


def test_all_unknown_keys_are_named_at_once_and_nonsense_has_no_match():
    with pytest.raises(ValueError, match=r"the command line: 'qqqqq', 'sead' \(did you"):
        load("mntp", None, ["--qqqqq", "1", "--sead", "2"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_of_another_training_is_ignored_with_a_line(kind):
    others = {name for name, kinds in ONLY.items() if kind not in kinds} & TYPES.keys()
    assert others
    config, lines = load(kind, None, LEAST[kind] | dict.fromkeys(others, 1))
    assert config == settled(kind)
    assert {line.split(":")[0] for line in lines} == others


# Defaults and round trip


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_cover_every_field_once(kind):
    required = {"kind", "model_name_or_path", "output_dir"}
    assert not COMMON.keys() & DEFAULTS[kind].keys()
    assert COMMON.keys() | DEFAULTS[kind].keys() | required == TYPES.keys()


def test_defaults_are_the_recipes():
    recipe = {
        kind: (c.max_seq_length, c.per_device_train_batch_size, c.learning_rate, c.warmup_steps)
        for kind in KINDS
        for c in [settled(kind)]
    }
    assert recipe == {
        "mntp": (512, 32, 5e-5, 0),
        "simcse": (128, 128, 3e-5, 0),
        "supervised": (512, 64, 2e-4, 300),
    }
    assert settled("simcse").loss_scale == 20 and settled("supervised").loss_scale == 50


OTHER = {  # for every field a value that is not its default
    "mntp": {
        "peft_model_name_or_path": ["a", "b,c"],
        "bidirectional": False,
        "torch_dtype": "float32",
        "device": "cuda:1",
        "pooling_mode": "eos_token",
        "template": "[INST] {text} [/INST]",
        "dataset_name": "x",
        "dataset_config_name": "y",
        "train_file": None,
        "text_column": "body",
        "max_seq_length": 96,
        "max_train_samples": 7,
        "seed": 1,
        "mask_token_type": "eos",
        "data_collator_type": "all_mask",
        "mlm_probability": 0.8,
        "line_by_line": True,
        "validation_file": ["v.txt"],
        "max_eval_samples": 5,
        "lora_r": 4,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj"],
        "full_finetuning": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "tokens_per_batch": 512,
        "num_train_epochs": 0.5,
        "max_steps": 9,
        "stop_after_n_steps": 3,
        "gradient_checkpointing": True,
        "fsdp": True,
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-06,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "save_steps": 3,
        "save_total_limit": None,
        "overwrite_output_dir": True,
        "resume_from_checkpoint": "o/checkpoint-3",
        "eval_steps": 4,
        "eval_file": "sts.tsv",
    },
    "simcse": {
        "compat": "official",
        "simcse_dropout": 0.1,
        "loss_scale": 30.0,
        "symmetric": True,
        "gather_negatives": False,
        "mask_duplicates": True,
        "warmup_steps": 5,
        "resume_from_checkpoint": False,
        "dataset_file_path": "w.txt",
        "train_file": None,
        "validation_split_percentage": None,
    },
    "supervised": {
        "homogeneous_batches": False,
        "negatives_per_query": 0,
        "query_instruction": "Find",
        "doc_instruction": "",
        "resume_from_checkpoint": True,
        "warmup_steps": 0,
    },
}


def test_every_field_is_used_and_survives_the_round_trip(tmp_path):
    changed = set()
    for kind, told in OTHER.items():
        config = settled(kind, **told)
        plain = settled(kind)
        changed |= {n for n in TYPES if getattr(config, n) != getattr(plain, n)}
        path = written(tmp_path, as_json(config))
        assert load(kind, path) == (config, [])
        assert load(kind, None, as_json(config)) == (config, [])
        assert hash(config) != hash(plain)
    by_name = {"kind", "model_name_or_path", "output_dir", "validation_split_percentage"}
    assert TYPES.keys() - changed == by_name
    assert settled(validation_split_percentage=5).validation_split_percentage == 5


def test_a_resolved_file_of_another_training_is_refused(tmp_path):
    path = written(tmp_path, as_json(settled("simcse")))
    with pytest.raises(ValueError, match=r"config.json is for the training 'simcse', not 'mntp'"):
        load("mntp", path)


def test_the_rank_settles_alpha():
    assert settled(lora_r=8).lora_alpha == 16
    assert settled(lora_r=8, lora_alpha=8).lora_alpha == 8


# The command line


def test_the_command_line_wins(tmp_path):
    path = written(tmp_path, LEAST["mntp"] | {"seed": 1, "learning_rate": "5e-5", "lora_r": 8})
    words = ["--seed", "7", "--learning-rate=1e-3", "--max_steps", "-1", "--line_by_line", "true"]
    config, lines = load("mntp", path, words)
    assert (config.seed, config.learning_rate, config.max_steps, config.line_by_line) == (
        7, 1e-3, -1, True,
    )  # fmt: skip
    assert config.lora_r == 8 and lines == []


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "--seed=3"], "gradient_checkpointing", True),
        (["--bidirectional", "False"], "bidirectional", False),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", True),
        (["--resume_from_checkpoint", "o/x"], "resume_from_checkpoint", "o/x"),
        (["--save_total_limit", "null"], "save_total_limit", None),
        (["--lora_target_modules", "q_proj,v_proj"], "lora_target_modules", ("q_proj", "v_proj")),
        (["--lora_target_modules", '["q_proj"]'], "lora_target_modules", ("q_proj",)),
        (["--lora_target_modules", "null"], "lora_target_modules", PROJECTIONS),
        (["--train_file", "a.txt,b.txt"], "train_file", ("a.txt", "b.txt")),
        (["--train_file=[\"a,b.txt\"]"], "train_file", ("a,b.txt",)),
        (["--template={text}=x"], "template", "{text}=x"),
        (["--template", "none"], "template", "none"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--save_steps", "1e3"], "save_steps", 1000),
        (["--seed", "9007199254740993"], "seed", 9007199254740993),
    ],
)  # fmt: skip
def test_words_become_values(words, name, value, tmp_path):
    told = LEAST["mntp"] | {"save_total_limit": 5, "lora_target_modules": ["o_proj"]}
    config, _ = load("mntp", written(tmp_path, told), words)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    "words, match",
    [
        (["seed", "1"], "'seed' on the command line: expected --field value"),
        (["--seed", "1", "2"], "'2' on the command line: expected --field value"),
        (["--"], "'--' on the command line"),
        (["--seed"], "--seed on the command line needs a value"),
        (["--learning_rate", "--seed=1"], "--learning_rate on the command line needs a value"),
        (["--seed="], "seed '' in the command line: expected a whole number"),
    ],
)
def test_broken_words_are_refused(words, match):
    with pytest.raises(ValueError, match=match):
        load("mntp", None, words)


def test_an_override_takes_the_place_of_what_excludes_it(tmp_path):
    official = MNTP | {"model_name_or_path": "m", "output_dir": "o"}
    config, _ = load("mntp", written(tmp_path, official), ["--train_file", "mine.txt"])
    assert config.files == ("mine.txt",) and config.dataset_name is None
    official = SUPERVISED | {"model_name_or_path": "m", "output_dir": "o"}
    config, _ = load("supervised", written(tmp_path, official), ["--dataset_file_path", "here"])
    assert (config.dataset_name, config.files) == ("E5", ("here",))
    config, _ = load("supervised", written(tmp_path, official), {"warmup_ratio": 0.1})
    assert (config.warmup_steps, config.warmup_ratio) == (0, 0.1)
    mine = LEAST["mntp"] | {"validation_split_percentage": 5, "warmup_ratio": 0.1}
    words = ["--validation_file", "v.txt", "--warmup_steps", "9", "--dataset_name", "x"]
    config, _ = load("mntp", written(tmp_path, mine), words)
    assert (config.validation_file, config.validation_split_percentage) == (("v.txt",), None)
    assert (config.warmup_steps, config.warmup_ratio) == (9, 0)
    assert (config.dataset_name, config.files) == ("x", ())


# Other ways to say the same


@pytest.mark.parametrize(
    "told, name, value",
    [
        ({"bf16": True}, "torch_dtype", "bfloat16"),
        ({"fp16": "true"}, "torch_dtype", "float16"),
        ({"bf16": False, "fp16": None}, "torch_dtype", "auto"),
        ({"bf16": True, "torch_dtype": None}, "torch_dtype", "bfloat16"),
        ({"dtype": "float32"}, "torch_dtype", "float32"),
        ({"use_cpu": True}, "device", "cpu"),
        ({"no_cuda": True}, "device", "cpu"),
        ({"per_gpu_train_batch_size": 3}, "per_device_train_batch_size", 3),
        ({"activation_checkpointing": True}, "gradient_checkpointing", True),
        ({"gradient_checkpointing": None}, "gradient_checkpointing", False),
        ({"fsdp": ""}, "fsdp", False),
        ({"fsdp": "full_shard auto_wrap"}, "fsdp", True),
        ({"fsdp": "false"}, "fsdp", False),
        ({"warmup_steps": 0.06}, "warmup_ratio", 0.06),
        ({"warmup_steps": 6.0, "warmup_ratio": 0.0}, "warmup_steps", 6),
        ({"eval_strategy": "no", "eval_steps": 5}, "eval_steps", None),
        ({"eval_strategy": "steps", "logging_steps": 7}, "eval_steps", 7),
        ({"evaluation_strategy": "steps"}, "eval_steps", 10),
        ({"evaluation_strategy": "steps", "eval_steps": 3}, "eval_steps", 3),
        ({"max_seq_length": None}, "max_seq_length", 512),
        ({"peft_model_name_or_path": Path("a") / "b"}, "peft_model_name_or_path", ("a/b",)),
    ],
)
def test_a_setting_said_otherwise(told, name, value):
    config, lines = load("mntp", None, LEAST["mntp"] | {"eval_file": "sts.tsv"} | told)
    assert getattr(config, name) == value and lines == []


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_of_nothing_is_said(kind):
    _, lines = load(kind, None, LEAST[kind] | {"eval_steps": 5})
    assert (
        len(lines) == 1 and lines[0].startswith("eval_steps: ignored") and "eval_file" in lines[0]
    )
    assert ("validation_file" in lines[0]) == (kind == "mntp")
    assert load(kind, None, LEAST[kind] | {"eval_steps": 5, "eval_file": "x"})[1] == []


def test_the_computing_type_itself_counts_over_bf16(tmp_path):
    told = LEAST["mntp"] | {"torch_dtype": "float32", "bf16": True}
    config, lines = load("mntp", written(tmp_path, told))
    assert config.torch_dtype == "float32"
    assert lines == ["bf16: ignored (torch_dtype 'float32' is given)"]
    config, lines = load("mntp", written(tmp_path, told), ["--fp16"])
    assert config.torch_dtype == "float16"


# Refusals

TYPE_ERRORS = [
    ("seed", "x", "a whole number"),
    ("seed", 1.5, "a whole number"),
    ("seed", True, "a whole number"),
    ("learning_rate", "fast", "a number"),
    ("learning_rate", True, "a number"),
    ("learning_rate", float("nan"), "a number"),
    ("learning_rate", 10**400, "a number"),
    ("learning_rate", [1], "a number"),
    ("bidirectional", 1, "true or false"),
    ("bidirectional", "yes", "true or false"),
    ("fsdp", "offload", "true or false"),
    ("bf16", "maybe", "true or false or null"),
    ("text_column", 5, "a text"),
    ("device", {"a": 1}, "a text or null"),
    ("save_steps", 0.1, "a whole number"),
    ("save_total_limit", "many", "a whole number or null"),
    ("train_file", 5, "a text or a list of texts"),
    ("train_file", [5], "a text or a list of texts"),
    ("train_file", "[broken", "a text or a list of texts"),
    ("resume_from_checkpoint", 5, "true or false or a text or null"),
    ("warmup_steps", "soon", "a number"),
]


@pytest.mark.parametrize("name, value, expected", TYPE_ERRORS)
def test_a_wrong_type_names_key_value_and_what_is_expected(name, value, expected):
    with pytest.raises(ValueError) as error:
        settled(**{name: value})
    assert str(error.value) == f"{name} {value!r} in the overrides: expected {expected}"


OUTSIDE = {
    "at least 1": [0, -1],
    "at least 2": [1],
    "at least 0": [-1],
    "at least 0 and below 2**63": [-1, 2**63],
    "-1 or at least 1": [0, -2],
    "above 0": [0, -1],
    "at least 0 and below 1": [-0.1, 1],
    "above 0 and at most 1": [0, 1.5],
    "between 1 and 99": [0, 100],
}


@pytest.mark.parametrize("text, _, names", RANGES, ids=[text for text, _, _ in RANGES])
def test_a_value_out_of_range_is_refused(text, _, names):
    for name in names.split():
        kind = ONLY.get(name, KINDS)[0]
        for value in OUTSIDE[text]:
            with pytest.raises(ValueError, match=f"^{name} must be {text.replace('*', '.')}, got"):
                settled(kind, **{name: value})


def test_every_number_has_a_range():
    numbers = {name for name, types in TYPES.items() if {int, float} & {*types}}
    assert numbers == {name for _, _, names in RANGES for name in names.split()}


@pytest.mark.parametrize("name", CHOICES.keys() - {"kind"})
def test_an_unknown_choice_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"{name} 'odd' is unknown; known: {CHOICES[name][0]}, "):
        settled(ONLY.get(name, KINDS)[0], **{name: "odd"})


@pytest.mark.parametrize(
    "kind, told, match",
    [
        ("mntp", {"train_file": None}, "no training data: give train_file or dataset_name"),
        ("mntp", {"dataset_name": "x"}, "train_file and dataset_name 'x' are two sources"),
        ("mntp", {"dataset_file_path": "x"}, "train_file and dataset_file_path 'x' are two"),
        ("mntp", {"dataset_config_name": "x"}, "belongs to a dataset_name"),
        ("simcse", {"train_file": [], "dataset_name": "Wiki1M"}, "'Wiki1M' needs dataset_file_p"),
        ("supervised", {"train_file": [], "dataset_name": "E5"}, "'E5' needs dataset_file_path"),
        (
            "mntp",
            {"train_file": [], "dataset_name": "x", "dataset_file_path": "y"},
            "comes from `datasets` and dataset_file_path from disk: keep one",
        ),
        (
            "mntp",
            {"train_file": [], "dataset_name": "E5", "dataset_file_path": "y"},
            "holds queries and documents: train 'supervised'",
        ),
        (
            "supervised",
            {"train_file": [], "dataset_name": "Wiki1M", "dataset_file_path": "y"},
            "holds single sentences: train 'simcse'",
        ),
        ("supervised", {"train_file": [], "dataset_name": "x"}, "give them as train_file"),
        ("mntp", {"model_name_or_path": None}, "model_name_or_path is missing: .*--model_name"),
        ("mntp", {"output_dir": ""}, "output_dir is missing"),
        ("mntp", {"bf16": True, "fp16": True}, "bf16 and fp16 in the overrides exclude"),
        ("mntp", {"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio exclude each other"),
        ("mntp", {"warmup_steps": 0.5, "warmup_ratio": 0.1}, "expected a whole number"),
        (
            "mntp",
            {"validation_file": "v", "validation_split_percentage": 5},
            "validation_split_percentage exclude each other",
        ),
        ("mntp", {"dtype": "auto", "torch_dtype": "auto"}, "^dtype and torch_dtype in the over"),
        ("mntp", {"eval_strategy": "epoch"}, "eval_strategy 'epoch' in the overrides: use 'steps"),
        ("mntp", {"lora_target_modules": ["q_proj", "q"]}, r"lora_target_modules \['q'\] must be"),
        ("mntp", {"lora_target_modules": []}, "must be one or more of q_proj"),
        ("mntp", {"template": "no place"}, "must hold '{text}' exactly once"),
    ],
)
def test_a_contradiction_is_refused(kind, told, match):
    with pytest.raises(ValueError, match=match):
        settled(kind, **told)


@pytest.mark.parametrize(
    "content, match",
    [
        ("", "cannot be read as a JSON configuration"),
        ("[1]", "must hold a JSON object"),
        ('{"seed": 1, "seed": 2}', "seed stands in it twice"),
        ("[" * 100_000, "cannot be read"),
        ('{"seed": ' + "9" * 5000 + "}", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(content, match, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json .*{match}"):
        load("mntp", written(tmp_path, content))


def test_a_missing_file_and_an_unknown_training_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no configuration file .*none\.json"):
        load("mntp", tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"cannot be read as a JSON configuration: .*directory"):
        load("mntp", tmp_path)
    with pytest.raises(ValueError, match="training 'mlm' is unknown; known: mntp, simcse, superv"):
        load("mlm", None)


def test_a_config_built_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="lora_r must be at least 1, got 0"):
        dataclasses.replace(settled(), lora_r=0)


def test_reading_a_configuration_imports_no_transformers():
    code = (
        "import sys, llm2vec_fast.train.config\n"
        "sys.exit(bool({'transformers', 'triton', 'datasets'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def attributes_of(source: Path, *objects: str) -> set[str]:
    """Attributes that a module reads of objects by these names (`config`, `self.config`)."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in objects:
            found.add(node.attr)
    return found


def test_every_field_is_read_somewhere():
    """A field that nothing reads is a setting that silently does nothing."""
    package = Path(config_module.__file__).parent
    modules = [path for path in package.glob("*.py") if not path.name.startswith("config")]
    read = set()
    for module in [*modules, package.parent / "cli.py"]:
        read |= attributes_of(module, "config", "settled", "self.config")
    assert "files" in read
    read |= attributes_of(package / "config.py", "self")  # those that the property `files` reads
    assert {field.name for field in dataclasses.fields(Config)} - read == set()
