"""What is here: the machine, the versions, the compilers, and the backend of every operation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llm2vec_fast.ops.backend import PREFERENCE, available
from llm2vec_fast.settings import choose_device, choose_dtype
from llm2vec_fast.version import __version__

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow")
EXTRAS = ("flash-attn", "peft", "sentence-transformers", "ray", "gguf", "accelerate")


def machine() -> dict[str, str]:
    """The machine and versions as they stand beside every measurement."""
    found = {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "llm2vec_fast": __version__,
    }
    return found | {name: _version(name) for name in PACKAGES}


def report(model: str | None = None) -> None:
    """Prints everything; with a model's path or name, also how it would be loaded."""
    console = Console()
    rows = machine() | {name: _version(name) for name in EXTRAS}
    rows |= {name: _tool(name) for name in ("nvcc", "cc")}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        rows["gpu memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        rows["compute capability"] = f"{major}.{minor}"
    device = choose_device(None, None)
    rows["default device"] = str(device)
    rows["default dtype"] = str(choose_dtype("auto", device)).removeprefix("torch.")
    console.print(_table("machine", ("what", "found"), rows.items()))
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        dtype = choose_dtype("auto", torch.device(kind))
        console.print(_backends(kind, dtype))
    if not torch.cuda.is_available():
        console.print("No GPU is visible to torch: every operation runs on the CPU.")
    if model is not None:
        console.print(_table(f"model {model}", ("what", "found"), _model_rows(model)))


def check_kernels(device: str = "cuda") -> bool:
    """Runs every backend of every operation against its fp64 reference and prints what came out.

    Half a minute on a GPU. On "cpu" Triton's interpreter does it with tiny inputs in fp32, where
    TRITON_INTERPRET=1 is set before the program starts.
    returns: True if nothing that ran was wrong and something ran
    """
    from llm2vec_fast.ops._check import findings

    if device == "cuda" and not torch.cuda.is_available():
        Console().print("doctor --gpu: torch sees no CUDA GPU here; nothing was checked.")
        return False
    small = device == "cpu"
    dtypes = [torch.float32] if small else [torch.bfloat16, torch.float16, torch.float32]
    table = Table(title=f"operations on {device} against fp64", title_justify="left")
    for column in ("operation", "backend", "dtype", "relative error", "bound", ""):
        table.add_column(column)
    ran, refused = [], {}
    for found in findings(torch.device(device), dtypes, small):
        if found.error is None:
            refused[f"{found.op} {found.backend}"] = found.reason
            continue
        ran.append(found)
        verdict = "right" if found.ok else f"WRONG {found.reason or ''}"
        error = f"{found.error:.1e}"
        table.add_row(*found[:3], error, f"{found.bound:.0e}", escape(verdict))
    Console().print(
        table, *(f"{name} did not run: {why}" for name, why in refused.items()), sep="\n"
    )
    return bool(ran) and all(found.ok for found in ran)


def _backends(device: str, dtype: torch.dtype) -> Table:
    name = str(dtype).removeprefix("torch.")
    title = f"operations on {device} in {name} (head dimension 64)"
    table = Table(title=title, title_justify="left")
    for column in ("operation", "runs on", "refused before it"):
        table.add_column(column)
    for op in PREFERENCE:
        reasons = available(op, device, dtype)
        chosen = next((name for name, reason in reasons.items() if reason is None), "nothing")
        refused = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
        table.add_row(op, chosen, escape("\n".join(refused)))
    return table


def _model_rows(name: str):
    from llm2vec_fast.model.config import ModelConfig
    from llm2vec_fast.model.source import resolve
    from llm2vec_fast.settings import make_tokenizer, settle

    sources = resolve(name, [])
    config = ModelConfig.from_file(sources.config)
    settings = settle(
        sources, config, compat="fixed", template="auto", enable_bidirectional=None,
        pooling_mode=None, max_length=None, doc_max_length=None, skip_instruction=None,
    )  # fmt: skip
    tokenizer = make_tokenizer(sources, settings, config)
    yield "family", config.family
    yield "parameters", f"{config.n_parameters / 1e6:.1f} million (body and embedding)"
    yield "layers, hidden, heads", f"{config.n_layers}, {config.hidden_size}, {config.n_heads}"
    yield "weights from", str(sources.base)
    yield "adapters", ", ".join(map(str, sources.adapters)) or "none"
    yield from ((key, str(value)) for key, value in settings.items())
    yield "tokens put around a text", f"{tokenizer.start_ids} ... {tokenizer.end_ids}"


def _table(title: str, columns, rows) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found"
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    lines = [line for line in told.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else "found")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
