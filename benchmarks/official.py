"""The official llm2vec 0.2.3 in an environment of its own, driven from ours.

    python -m benchmarks.official setup [--env DIR] [--torch-index URL]
    python -m benchmarks.official golden [--smollm2 DIR]

It needs transformers 4.44, which cannot live beside ours, so that it runs as a separate program
(`_official_worker.py`) and answers through files. `run` and `run_many` say what can be asked.
The environment variable LLM2VEC_FAST_OFFICIAL_ENV names another directory for the environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("_official_worker.py")
ENV_VARIABLE = "LLM2VEC_FAST_OFFICIAL_ENV"
TORCH = "torch==2.13.0"
PACKAGES = (
    "llm2vec==0.2.3", "transformers==4.44.2", "peft==0.12.0", "accelerate==0.34.2", "numpy<2",
    "sentencepiece", "protobuf",
)  # fmt: skip
# What an adapter_config.json may hold for peft 0.12; it refuses any other key.
PEFT_KEYS = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_dora", "use_rslora",
)  # fmt: skip
NEW_TOKENIZER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerBase")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


class OfficialError(RuntimeError):
    """The official environment is missing, or what ran in it failed."""


def env_dir() -> Path:
    """Where the environment is, or will be."""
    return Path(os.environ.get(ENV_VARIABLE) or ROOT / ".venv-official")


def is_ready() -> bool:
    """Whether the environment can be used."""
    return _python(env_dir()).exists() and (
        _stamp(env_dir()).exists() or bool(os.environ.get(ENV_VARIABLE))
    )


def python_of_env() -> Path:
    """The environment's interpreter. Raises OfficialError saying how to make the environment."""
    if not is_ready():
        raise OfficialError(
            f"no official llm2vec in {env_dir()}: run `python -m benchmarks.official setup`, or "
            f"let {ENV_VARIABLE} name an environment that has it"
        )
    return _python(env_dir())


def setup(directory: Path, torch_index: str | None = None) -> None:
    """Makes the environment with pip; a second call with the same pins does nothing."""
    stamp, wanted = _stamp(directory), "\n".join((TORCH, *PACKAGES))
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if sys.version_info >= (3, 13):
        raise OfficialError("tokenizers 0.19 has wheels up to Python 3.12: use an older Python")
    if not _python(directory).exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(_python(directory)), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    # torch first and alone, so that what follows fetches no other build of it.
    index = ["--index-url", torch_index] if torch_index else []
    subprocess.run([*pip, *index, TORCH], check=True)
    subprocess.run([*pip, TORCH, *PACKAGES], check=True)
    stamp.write_text(wanted)


def run(request: dict) -> dict:
    """One request of the official library, in its own process. See `run_many`."""
    return run_many([request])[0]


def run_many(requests: Sequence[dict]) -> list[dict]:
    """Several requests in one process of the official environment, which takes seconds to start.

    A request has "action" and "model" (a directory; converted by `prepare_for_official`), and may
    have pooling_mode, max_length, doc_max_length, skip_instruction and "threads" (of torch).
    rows are texts or [instruction, text] for `encode`, always the latter for `tokenize`.

    tokenize: rows, family (llama | mistral | qwen2), name (the model's, for templates)
              -> ids (without pads) and spans [start, end), each None where the library crashes.
              One text per call; no weights are read.
    shorten:  texts -> texts, cut to doc_max_length as the library does
    encode:   rows, batch_size (32), dtype ("float32"), device, enable_bidirectional (True),
              adapters (directories, merged in order), warmup_rows (one batch), repeats (1)
              -> vectors (N, D) fp32 numpy, seconds (median of repeats), all_seconds, load_seconds
    raises:   OfficialError with the worker's last words
    """
    python = python_of_env()
    requests = [dict(request) for request in requests]
    for request in requests:
        request["model"] = str(prepare_for_official(request["model"]))
        request["adapters"] = [str(prepare_for_official(a)) for a in request.get("adapters", ())]
    with tempfile.TemporaryDirectory(prefix="llm2vec-official-") as name:
        directory = Path(name)
        (directory / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
        # -I: neither our PYTHONPATH nor this folder's modules may get into that interpreter.
        done = subprocess.run(
            [str(python), "-I", str(WORKER), name],
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OfficialError(f"the official worker failed:\n{done.stderr[-3000:]}")
        replies = json.loads((directory / "replies.json").read_text(encoding="utf-8"))
        for reply in replies:
            if "vectors" in reply:
                reply["vectors"] = np.load(directory / reply["vectors"])["vectors"]
    return replies


def prepare_for_official(model_dir: str | Path) -> Path:
    """A copy of a model or adapter directory that the old libraries can read, made once.

    tokenizers 0.19 reads merges only as "a b" strings; transformers 4.44 knows neither
    `rope_parameters` nor the class names of transformers 5; peft 0.12 refuses keys that it does not
    know. Weights are linked, not copied. The copy is kept in the environment's directory.
    """
    source = Path(model_dir).resolve()
    if not source.is_dir():
        raise OfficialError(f"{source} is not a directory")
    files = sorted(f for f in source.iterdir() if f.is_file())
    state = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    mark = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    target = env_dir() / "converted" / f"{source.name}-{mark}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Built aside and renamed, so that two processes cannot see half a directory.
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    for file in files:
        convert = CONVERSIONS.get(file.name)
        if convert:
            told = convert(json.loads(file.read_text(encoding="utf-8")))
            text = json.dumps(told, ensure_ascii=False)
            (partial / file.name).write_text(text, encoding="utf-8")
        elif any(file.match(pattern) for pattern in WEIGHTS):
            _link(file, partial / file.name)
        else:
            shutil.copyfile(file, partial / file.name)
    try:
        partial.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return target


def old_tokenizer(told: dict) -> dict:
    """tokenizer.json with merges as "a b" strings."""
    merges = told["model"].get("merges", [])
    if any(" " in part for merge in merges if not isinstance(merge, str) for part in merge):
        raise OfficialError("a merge holds a space: tokenizers 0.19 cannot read this tokenizer")
    if merges:
        told["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    return told


def old_tokenizer_config(told: dict) -> dict:
    """tokenizer_config.json with a class that transformers 4.44 has."""
    if told.get("tokenizer_class") in (None, *NEW_TOKENIZER_CLASSES):
        told["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Its plain class otherwise makes token_type_ids, which no LLaMA takes.
    told.setdefault("model_input_names", ["input_ids", "attention_mask"])
    for key in ("backend", "is_local", "local_files_only"):
        told.pop(key, None)
    return told


def old_config(told: dict) -> dict:
    """config.json with rope_theta, rope_scaling and torch_dtype."""
    rope = dict(told.pop("rope_parameters", None) or {})
    if rope:
        told["rope_theta"] = rope.pop("rope_theta", told.get("rope_theta", 10000.0))
        told["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    if "dtype" in told:
        told.setdefault("torch_dtype", told.pop("dtype"))
    return told


def old_adapter_config(told: dict) -> dict:
    """adapter_config.json with only the keys that peft 0.12 knows."""
    return {key: value for key, value in told.items() if key in PEFT_KEYS}


CONVERSIONS = {
    "tokenizer.json": old_tokenizer,
    "tokenizer_config.json": old_tokenizer_config,
    "config.json": old_config,
    "adapter_config.json": old_adapter_config,
}


def _link(file: Path, to: Path) -> None:
    try:
        to.symlink_to(file)
    except OSError:  # Windows without the right to make links
        shutil.copyfile(file, to)


def _python(directory: Path) -> Path:
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _stamp(directory: Path) -> Path:
    return directory / ".llm2vec-official"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    made = actions.add_parser("setup", help="make the environment")
    made.add_argument("--env", type=Path, help="its directory")
    made.add_argument("--torch-index", help="index URL of another torch build")
    golden = actions.add_parser("golden", help="write tests/data/official_golden.json again")
    golden.add_argument("--smollm2", type=Path, help="directory of SmolLM2-135M")
    told = parser.parse_args()
    if told.action == "setup":
        directory = told.env or env_dir()
        setup(directory, told.torch_index)
        print(f"the official llm2vec is in {directory}")
    else:
        from benchmarks import _official_golden

        _official_golden.write(told.smollm2)


if __name__ == "__main__":
    main()
