"""Training as a person types it: the three trainings with official files, and what goes wrong.

Every process takes six seconds to import torch and transformers, so there are four.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

from llm2vec_fast import LLM2Vec
from llm2vec_fast.cli import app
from llm2vec_fast.train import load

ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
TEXTS = [f"{'a list of values, ' * (n % 5)}number {n} of a dictionary" for n in range(60)]
ASKED = ["the keys of a dict", "a list", "one two three numbers of many"]
# As the official repository has them, but for paths and sizes.
MNTP = {
    "model_name_or_path": None, "dataset_name": "wikitext",
    "dataset_config_name": "wikitext-103-raw-v1", "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 32, "gradient_accumulation_steps": 1, "do_train": True,
    "do_eval": True, "max_seq_length": 32, "mask_token_type": "blank",
    "data_collator_type": "default", "mlm_probability": 0.2, "overwrite_output_dir": True,
    "output_dir": None, "evaluation_strategy": "steps", "eval_steps": 100, "save_steps": 200,
    "stop_after_n_steps": 4, "lora_r": 16, "gradient_checkpointing": True,
    "torch_dtype": "float32", "attn_implementation": "flash_attention_2",
}  # fmt: skip
SIMCSE = {
    "model_name_or_path": None, "peft_model_name_or_path": None, "simcse_dropout": 0.3,
    "bidirectional": True, "pooling_mode": "mean", "dataset_name": "Wiki1M",
    "dataset_file_path": None, "remove_unused_columns": False, "learning_rate": 3e-3,
    "loss_scale": 20, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "do_train": True, "disable_tqdm": False, "max_seq_length": 32, "overwrite_output_dir": True,
    "output_dir": None, "logging_steps": 1, "save_steps": 200, "save_only_model": True,
    "stop_after_n_steps": 4, "lora_r": 16, "gradient_checkpointing": True,
    "torch_dtype": "float32", "attn_implementation": "flash_attention_2", "seed": 42,
}  # fmt: skip
SUPERVISED = {
    "model_name_or_path": None, "peft_model_name_or_path": None, "bidirectional": True,
    "pooling_mode": "mean", "dataset_name": "E5", "dataset_file_path": None,
    "remove_unused_columns": False, "learning_rate": 2e-3, "num_train_epochs": 3,
    "warmup_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1, "do_train": True, "disable_tqdm": False,
    "max_seq_length": 64, "overwrite_output_dir": True, "output_dir": None,
    "logging_steps": 1, "save_steps": 200, "save_only_model": True,
    "stop_after_n_steps": 4, "lora_r": 16, "gradient_checkpointing": True,
    "torch_dtype": "float32", "attn_implementation": "flash_attention_2", "seed": 42,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny_model, add_tokenizer, tmp_path_factory):
    """A directory with a model, texts, E5 data and the three configuration files."""
    place = tmp_path_factory.mktemp("cli_train")
    add_tokenizer(tiny_model(place, "llama", causal_lm=True)).rename(place / "base")
    (place / "t.txt").write_text("\n".join(TEXTS))
    (place / "e5").mkdir()
    rows = [{"query": TEXTS[n], "positive": f"p {n}", "negative": f"n {n}"} for n in range(20)]
    (place / "e5" / "nq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    below = {"peft_model_name_or_path": str(place / "mntp")}
    files = {
        "mntp": MNTP,
        "simcse": SIMCSE | below | {"dataset_file_path": str(place / "t.txt")},
        "supervised": SUPERVISED | below | {"dataset_file_path": str(place / "e5")},
    }
    for kind, told in files.items():
        told = told | {"model_name_or_path": str(place / "base"), "output_dir": str(place / kind)}
        (place / f"{kind}.json").write_text(json.dumps(told))
    return place


def side_by_side(*commands: list[str]) -> list[subprocess.CompletedProcess]:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "llm2vec_fast", "train", *words],
            env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for words in commands
    ]  # fmt: skip
    ends = [process.communicate(timeout=120) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *end)
        for process, end in zip(started, ends, strict=True)
    ]


@pytest.fixture(scope="module")
def finished(place):
    """{name: the finished process}: MNTP and one that blows up, then the two that stand on MNTP."""
    names = {kind: str(place / f"{kind}.json") for kind in ("mntp", "simcse", "supervised")}
    words = ["--train_file", str(place / "t.txt"), "--logging_steps=2", "--learning_rate", "3e-3"]
    blown = ["--output_dir", str(place / "blown"), "--learning_rate", "1e30", "--save_steps", "1"]
    blown += ["--max_grad_norm", "0", "--peft_model_name_or_path", "null"]
    first = side_by_side(["mntp", names["mntp"], *words], ["simcse", names["simcse"], *blown])
    assert first[0].returncode == 0, first[0].stderr
    rest = side_by_side(*([kind, names[kind]] for kind in ("simcse", "supervised")))
    return dict(zip(("mntp", "blown", "simcse", "supervised"), [*first, *rest], strict=True))


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("kind", ["mntp", "simcse", "supervised"])
def test_an_official_file_trains(finished, place, kind):
    done, out = finished[kind], place / kind
    assert done.returncode == 0, done.stderr
    (summary,) = lines_of(done.stdout)
    assert (summary["output"], summary["steps"]) == (str(out), 4)
    log = lines_of((out / "training_log.jsonl").read_text())
    assert [line["step"] for line in log] == ([2, 4] if kind == "mntp" else [1, 2, 3, 4])
    assert lines_of(done.stderr) == log, "no terminal: the log as JSON lines"
    assert "it/s" not in done.stderr and "Traceback" not in done.stderr
    assert summary["loss"] == log[-1]["loss"] and summary["tokens"] == log[-1]["tokens"]
    assert all(line["matmul_share"] > 0 for line in log)
    ignored = {line.split(":")[0] for line in done.stderr.splitlines() if ": ignored (" in line}
    assert {"do_train", "attn_implementation"} <= ignored
    assert "learning_rate" not in ignored and "lora_r" not in ignored


@pytest.mark.parametrize("kind", ["mntp", "simcse", "supervised"])
def test_the_resolved_configuration_loads_again(finished, place, kind):
    config, ignored = load(kind, place / kind / "train_config.json")
    assert [line.split(":")[0] for line in ignored] == ["eval_steps"] * (kind == "mntp")
    assert config.stop_after_n_steps == 4 and config.model_name_or_path == str(place / "base")
    if kind == "mntp":  # the words of the command line won
        assert (config.train_file, config.dataset_name) == ((str(place / "t.txt"),), None)
        assert (config.logging_steps, config.learning_rate) == (2, 3e-3)
    if kind == "supervised":
        assert (config.loss_scale, config.warmup_steps) == (50.0, 2)


@pytest.mark.parametrize("kind", ["mntp", "simcse", "supervised"])
def test_the_adapter_changes_vectors(finished, place, kind):
    stack = [] if kind == "mntp" else [place / "mntp"]
    vectors = [
        LLM2Vec.from_pretrained(place / "base", adapters, dtype="float32").encode(ASKED)
        for adapters in (stack, [*stack, place / kind])
    ]
    assert torch.isfinite(vectors[1]).all()
    assert (1 - F.cosine_similarity(*vectors)).min() > 1e-5
    assert (place / kind / "checkpoint-4" / "optimizer.safetensors").exists()


def test_errors_are_one_line_and_exit_code_1(finished, place):
    """A loss that is not finite."""
    done = finished["blown"]
    assert done.returncode == 1 and done.stdout == ""
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.splitlines()[-1] == error and "Traceback" not in done.stderr
    assert "the loss is nan" in error or "norm nan" in error or "norm inf" in error
    kept = sorted((place / "blown").glob("checkpoint-*"))
    assert str(kept[-1]) in error
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors = load_file(kept[-1] / file)
        assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "mntp", "FILE", "--lora_rank", "4"], "'lora_rank' (did you mean 'lora_r'?)"),
        (["train", "mntp", "FILE", "--max_seq_len=4"], "did you mean 'max_seq_length'?"),
        (["train", "mntp", "FILE", "--lora_r", "four"], "lora_r 'four'"),
        (["train", "mntp", "FILE", "--lora_r"], "--lora_r on the command line needs a value"),
        (["train", "mntp", "FILE", "stray"], "'stray' on the command line"),
        (["train", "clm", "FILE"], "training 'clm' is unknown; known: mntp, simcse, supervised"),
        (["train", "mntp", "none.json"], "there is no configuration file none.json"),
        (["train", "mntp"], "model_name_or_path is missing"),
        (["train", "mntp", "--model_name_or_path", "m"], "output_dir is missing"),
        (["train", "simcse", "FILE", "--symmetric", "2"], "symmetric '2'"),
    ],
)
def test_what_cannot_be_run(place, words, told):
    """ValueErrors, which `main` tells in one line."""
    words = [str(place / "mntp.json") if word == "FILE" else word for word in words]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ValueError) and told in str(done.exception)


@pytest.mark.parametrize("kind", ["mntp", "simcse", "supervised"])
def test_all_fields_as_a_file_to_fill_in(kind, tmp_path):
    told = CliRunner().invoke(app, ["train", kind, "--fields"])
    assert told.exit_code == 0
    fields = json.loads(told.stdout)
    assert ("mlm_probability" in fields) == (kind == "mntp") and fields["lora_r"] == 16
    path = tmp_path / "config.json"
    path.write_text(told.stdout)
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        load(kind, path)
    filled = {"model_name_or_path": "m", "output_dir": "o", "train_file": "t.jsonl"}
    config, lines = load(kind, path, filled)
    assert lines == [] and config == load(kind, None, filled)[0]


def test_a_bad_eval_file_is_told_before_the_model_is_loaded(place):
    words = ["--eval_file", str(place / "none.csv"), "--model_name_or_path", "/no/model"]
    done = CliRunner().invoke(app, ["train", "mntp", str(place / "mntp.json"), *words])
    assert isinstance(done.exception, FileNotFoundError) and "none.csv" in str(done.exception)


def test_how_to_load_what_was_trained_is_said(finished, place):
    told = (
        f"LLM2Vec.from_pretrained('{place / 'base'}', ['{place / 'mntp'}', '{place / 'simcse'}'])"
    )
    assert told in finished["simcse"].stderr


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_one_rank_tells_what_is_ignored(place, rank, count):
    words = ["train", "mntp", str(place / "mntp.json"), "--model_name_or_path", "/no/model"]
    done = CliRunner().invoke(app, words, env={"RANK": rank})
    assert "/no/model" in str(done.exception)
    assert done.stderr.count("attn_implementation: ignored") == count
