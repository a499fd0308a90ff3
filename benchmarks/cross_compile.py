"""What the compiler makes of every Triton kernel, for GPUs that need not be present.

    python -m benchmarks.cross_compile --arch 90 swiglu pool
    python -m benchmarks.cross_compile --json

Every case of bench_<op>.py (and its `variants()`: shapes that are compiled but not measured) runs
through our Triton backend on meta tensors. The launches that a GPU would have seen are recorded,
and each distinct one is compiled to machine code, with its arguments' own types and divisibility.
A bench_<op>.py may name the `ARCHS` that its kernels are for.
Not with TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.compare import Case
from llm2vec_fast.ops.kernels.launch import Launch, recorded

ARCHS = (90, 80, 100)
TRITON = "ours triton"
FOLDER = Path(__file__).parent


def bench_modules(names: list[str]) -> list[str]:
    """Operations whose bench_<op>.py has `cases(device)`; all of them if none are asked for."""
    found = sorted(p.stem.removeprefix("bench_") for p in FOLDER.glob("bench_*.py"))
    unknown = set(names) - set(found)
    if unknown:
        raise SystemExit(f"no bench_<op>.py for {', '.join(sorted(unknown))}; there are {found}")
    return [n for n in names or found if hasattr(_module(n), "cases")]


def _module(name: str):
    return importlib.import_module(f"benchmarks.bench_{name}")


def cases_of(name: str, variants: bool) -> Iterator[Case]:
    module = _module(name)
    yield from module.cases("meta")
    if variants and hasattr(module, "variants"):
        yield from module.variants()


def launches_of(name: str, arch: int, variants: bool) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of everything that a case of this operation launches."""
    for case in cases_of(name, variants):
        if TRITON in case.rivals:
            with recorded(arch) as launches:
                case.rivals[TRITON](case.make())()
            text = f"{case.what} {case.shape} {case.dtype}".replace("torch.", "")
            yield from ((text, launch) for launch in launches)


def compile_for(launch: Launch, arch: int) -> dict:
    """Compiles one launch: registers, spilled bytes, shared memory, matrix instructions."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    options = {"debug": False, "instrumentation_mode": "", **launch.options}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(*launch.args, **options)
    packed = kernel._pack_args(backend, options, bound, specialization, extra)
    settings, signature, constexprs, attrs = packed
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=settings.__dict__)
    return {
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "ptx_matrix": _matrix_instructions(compiled.asm["ptx"]),
        **_resources(compiled.asm["cubin"]),
    }


def key_of(launch: Launch, arch: int) -> tuple:
    """Launches with equal keys compile to the same code."""

    def kind(x):
        if isinstance(x, torch.Tensor):
            return str(x.dtype)
        if isinstance(x, int) and not isinstance(x, bool):
            return (x == 1, x % 16 == 0, x.bit_length() > 31)
        return type(x).__name__ if isinstance(x, float) else x

    return (launch.kernel.fn.__module__, launch.kernel.fn.__name__, arch,
            tuple(map(kind, launch.args)), tuple(sorted(launch.options.items())))  # fmt: skip


def _matrix_instructions(ptx: str) -> str:
    for name in ("tcgen05.mma", "wgmma", "mma.sync"):
        if name in ptx:
            return name
    return ""


def _resources(cubin: bytes) -> dict:
    """Registers a thread and bytes of local memory (spills), told by Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", told)
    assert found, told
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3])}


def survey(name: str, arch: int, variants: bool) -> list[dict]:
    """A row for every distinct launch of one operation on one architecture."""
    rows, seen = [], set()
    for case, launch in launches_of(name, arch, variants):
        key = key_of(launch, arch)
        if key in seen:
            continue
        seen.add(key)
        module = launch.kernel.fn.__module__.rpartition(".")[2]
        row = {"op": name, "module": module, "kernel": launch.kernel.fn.__name__}
        row |= {"arch": arch, "case": case}
        try:
            rows.append(row | compile_for(launch, arch))
        except Exception as error:
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[-600:]})
    return rows


def surveys(names: list[str], archs: list[int], all_variants: bool) -> Iterator[dict]:
    """Rows of all these operations, compiled side by side by as many processes as there are cores.

    Unless `all_variants`, the variants are compiled for the first architecture alone.
    """
    todo = [
        (name, arch, all_variants or arch == archs[0])
        for arch in archs
        for name in bench_modules(names)
        if arch in getattr(_module(name), "ARCHS", archs)
    ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(survey, *zip(*todo, strict=True)):
            yield from rows


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every Triton kernel for absent GPUs")
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--arch", type=int, action="append", help=f"default {ARCHS}")
    parser.add_argument("--variants", action="store_true", help="for every --arch, not the first")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    chosen = parser.parse_args()
    for row in surveys(chosen.ops, chosen.arch or list(ARCHS), chosen.variants):
        if chosen.json:
            print(json.dumps(row), flush=True)
        elif "error" in row:
            print(f"{row['op']} {row['kernel']} sm_{row['arch']} {row['case']}: {row['error']}")
        else:
            print(
                f"{row['kernel']:20} sm_{row['arch']:<4} {row['registers']:4} registers "
                f"{row['stack'] + row['local']:5} B spilled {row['shared']:7} B shared "
                f"{row['warps']:2} warps {row['ptx_matrix']:12} {row['op']} {row['case']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
