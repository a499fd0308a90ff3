"""setup.py, and the CUDA library itself: building, what the compiler made of it, loading without a
GPU, refusals.

It is built once, for one architecture, into a temporary folder.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from llm2vec_fast.ops import _cuda, _library
from llm2vec_fast.ops.backend import Call

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@pytest.fixture(scope="session")
def setup_py():
    """setup.py as a module; it sets nothing up when it is not the main program."""
    spec = importlib.util.spec_from_file_location("llm2vec_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def library(setup_py, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM2VEC_FAST_ARCHS", "90a")
        setup_py.build("cuda", folder / "_cuda.so", folder / "work")
    return folder / "_cuda.so"


@functools.cache
def cuobjdump(library: Path, what: str) -> dict[str, str]:
    """{mangled kernel: its part of cuobjdump's report}"""
    program = shutil.which("cuobjdump")
    if program is None:
        spec = importlib.util.find_spec("triton")
        bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
        if bundled is None or not bundled.exists():
            pytest.skip("no cuobjdump, neither on PATH nor in Triton")
        program = bundled
    report = subprocess.run([program, what, library], capture_output=True, text=True, check=True)
    parts = re.split(r"Function\s*:?\s*(_Z\w+):?", report.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@needs_nvcc
def test_every_source_is_compiled(setup_py, library):
    there = {path.name for path in (ROOT / "csrc").iterdir() if path.suffix in (".cu", ".cpp")}
    assert there == {name for names in setup_py.SOURCES.values() for name in names}
    built = {path.name.split("-")[0] for path in (library.parent / "work").glob("*.o")}
    assert built == {Path(name).stem for name in setup_py.SOURCES["cuda"]}


@needs_nvcc
def test_registers_and_spills(library):
    """Nothing spills, no array is indexed at run time, and every block fits a multiprocessor."""
    kernels = cuobjdump(library, "-res-usage")
    assert len(kernels) == 43
    for name, report in kernels.items():
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report)}
        assert used["STACK"] == 0 and used["LOCAL"] == 0, name
        threads = 256 if re.search(r"(swiglu|slice)_kernel", name) else 512
        assert used["REG"] <= (80 if threads == 256 else 128), name
        if "Li8" not in name:  # eight packs a thread: only rows wider than any model's up to now
            assert used["REG"] <= 96, name


@needs_nvcc
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half", "f"])
def test_memory_is_read_and_written_in_16_bytes(library, dtype):
    code = cuobjdump(library, "-sass")
    same = "f" if dtype == "f" else "S2_"
    for kernel, loads, stores in (
        (f"add_rms_norm_kernelI{dtype}{same}E", 12, 8),  # x, residual, weight; r, y
        (f"add_rms_norm_kernelI{dtype}hE", 12, 4),  # r; y has half as many bytes or a quarter
        (f"swiglu_kernelI{dtype}Lb1E", 4, 2),
        (f"swiglu_fp8_kernelI{dtype}Li4E", 8, 0),
        (f"slice_kernelI{dtype}Lb1E", 4, 0),
    ):
        (text,) = [text for name, text in code.items() if kernel in name]
        assert text.count("LDG.E.128") == loads, kernel
        assert text.count("STG.E.128") == stores, kernel
        assert not re.search(r"\b(LDL|STL)\b", text), kernel


PROBE = """
import json, sys, torch
from pathlib import Path
from llm2vec_fast.ops import _cuda
_cuda.LIBRARY = Path(sys.argv[1])
ops = _cuda.load()
assert _cuda.load() is ops
told = {"schemas": {name: str(getattr(ops, name).default._schema) for name in _cuda._FAKES}}

def shapes(device):
    x = torch.empty(4, 48, dtype=torch.bfloat16, device=device)
    w, spans = x[0], torch.empty(3, 2, dtype=torch.int32, device=device)
    outs = {
        "rms_norm": [ops.rms_norm(x, w, 1e-5)],
        "add_rms_norm": ops.add_rms_norm(x, x, w, 1e-5),
        "rms_norm_fp8": ops.rms_norm_fp8(x, w, 1e-5),
        "add_rms_norm_fp8": ops.add_rms_norm_fp8(x, x, w, 1e-5),
        "swiglu": [ops.swiglu(x)],
        "swiglu_fp8": ops.swiglu_fp8(x),
        "pool": ops.pool(x, spans, "mean", True, None, "float32"),
        "pool binary": ops.pool(x, spans, "mean", True, 41, "binary"),
        "pool int8": ops.pool(x, spans, "last", False, 41, "int8"),
    }
    return {k: [[str(t.dtype)[6:], *t.shape] for t in v] for k, v in outs.items()}

told["meta"] = shapes("meta")
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    told["fake"] = shapes("cpu")
x = torch.empty(2, 3, 8, device="meta")
y, r = _cuda.add_rms_norm(x, None, x[0, 0], 1e-5)
told["launcher"] = [list(y.shape), list(r.shape)]
for key, call in {"launcher on cpu": lambda: _cuda.swiglu(torch.zeros(2, 4)),
                  "operator on cpu": lambda: ops.swiglu(torch.zeros(2, 4))}.items():
    try:
        call()
    except Exception as error:
        told[key] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


@pytest.fixture(scope="session")
def probe(library) -> dict:
    """What a fresh process finds: two libraries cannot define the same operators in one."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, library], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_nvcc
def test_it_loads_without_a_gpu_and_knows_its_schemas(probe):
    assert set(probe["schemas"]) == set(_cuda._FAKES)
    assert probe["schemas"]["add_rms_norm_fp8"].endswith("-> (Tensor, Tensor, Tensor)")
    assert "!" not in "".join(probe["schemas"].values())  # functional: nothing is written in place


@needs_nvcc
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_and_dtypes_without_a_gpu(probe, kind):
    rows, scale = ["bfloat16", 4, 48], ["float32", 4, 1]
    assert probe[kind] == {
        "rms_norm": [rows],
        "add_rms_norm": [rows, rows],
        "rms_norm_fp8": [["float8_e4m3fn", 4, 48], scale],
        "add_rms_norm_fp8": [["float8_e4m3fn", 4, 48], scale, rows],
        "swiglu": [["bfloat16", 4, 24]],
        "swiglu_fp8": [["float8_e4m3fn", 4, 24], scale],
        "pool": [["float32", 3, 48], ["float32", 0]],
        "pool binary": [["uint8", 3, 6], ["float32", 0]],
        "pool int8": [["int8", 3, 41], ["float32", 3]],
    }
    assert probe["launcher"] == [[2, 3, 8], [2, 3, 8]]


@needs_nvcc
def test_cpu_tensors_are_refused_clearly(probe):
    assert re.match(r"ValueError: swiglu: .*GPU, not on cpu", probe["launcher on cpu"])
    assert re.match(
        r"NotImplementedError: .*llm2vec_fast_cuda::swiglu.*'CPU'", probe["operator on cpu"]
    )


def test_refusals(monkeypatch, tmp_path):
    fits = Call("swiglu", "cuda", 90, torch.bfloat16)
    monkeypatch.setattr(_cuda, "LIBRARY", tmp_path / "_cuda.so")
    assert "not built" in _cuda.refuses(fits)
    (tmp_path / "_cuda.so").write_text("no library")
    assert "does not load" in _cuda.refuses(fits)
    monkeypatch.setattr(_cuda, "load", lambda: None)
    assert _cuda.refuses(fits) is None
    for told, change in {
        "no kernel for rope_": {"op": "rope_"},
        "needs a CUDA device": {"device": "cpu", "arch": 0},
        "8.0 or newer, this device has 7.5": {"arch": 75},
        "8.9 or newer, this device has 8.6": {"op": "swiglu_fp8", "arch": 86},
        "not torch.float64": {"dtype": torch.float64},
        "inference only": {"needs_grad": True},
        "meta": {"device": "meta"},
    }.items():
        assert told in _cuda.refuses(fits._replace(**change))
    assert _cuda.refuses(fits._replace(device="meta", forced=True)) is None


def test_importing_is_cheap():
    code = "import sys, llm2vec_fast.ops._cuda; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------------ setup.py

FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-code*) echo sm_80 sm_90 sm_100;;
  *--version*) echo release 1.0;;
  *) {compile};;
esac
"""
TOUCH = 'while [ "$1" != -o ]; do shift; done; echo built > "$2"'


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of what is needed for building, with nothing on PATH and no setting."""
    for name in ("CUDA_HOME", "CXX", "LLM2VEC_FAST_CUDA", "LLM2VEC_FAST_CPU", "LLM2VEC_FAST_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "llm2vec_fast").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("__init__.py", "version.py", "py.typed"):
        shutil.copy(ROOT / "llm2vec_fast" / name, tree / "llm2vec_fast")
    (tmp_path / "bin").mkdir()
    return tree


def test_a_library_is_told_what_it_is_looked_at_for(setup_py, checkout, monkeypatch):
    """setup.py and the package find the same digest, of sources alone."""
    monkeypatch.setattr(setup_py, "CSRC", checkout / "csrc")
    before = setup_py.sources_define()
    assert f'"{_library.digest(checkout / "csrc")}"' in before
    (checkout / "csrc/README.md").write_text("other")
    (checkout / "csrc/notes").mkdir()
    assert setup_py.sources_define() == before
    (checkout / "csrc/cpu.h").write_text("other")
    assert f'"{_library.digest(checkout / "csrc")}"' in setup_py.sources_define() != before


def put_nvcc(checkout: Path, compile_: str) -> None:
    nvcc = checkout.parent / "bin/nvcc"
    nvcc.write_text(FAKE_NVCC.replace("{compile}", compile_))
    nvcc.chmod(0o755)


def run_setup(checkout: Path, *arguments: str, tools: str = "", **environment: str):
    path = os.pathsep.join(filter(None, [str(checkout.parent / "bin"), tools]))
    return subprocess.run(
        [sys.executable, "setup.py", *(arguments or ("build_ext", "--inplace"))],
        cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "PATH": path, **environment},
    )  # fmt: skip


@pytest.mark.parametrize("kind, compiler, where", [
    ("CUDA", "nvcc was not found", "put it on PATH or set CUDA_HOME"),
    ("CPU", "no C++ compiler was found", "put c++ on PATH or name one by CXX"),
])  # fmt: skip
def test_a_missing_compiler_is_told(checkout, kind, compiler, where):
    name = f"LLM2VEC_FAST_{kind}"
    done = run_setup(checkout)
    assert done.returncode == 0
    assert f"no {kind} library: {compiler}; {where}" in done.stderr
    done = run_setup(checkout, **{name: "1"})
    assert done.returncode != 0 and compiler in done.stderr
    done = run_setup(checkout, **{name: "0"})
    assert done.returncode == 0 and compiler not in done.stderr
    done = run_setup(checkout, **{name: "yes"})
    assert done.returncode != 0 and f"{name} must be auto, 1 or 0, got 'yes'" in done.stderr


def put_cxx(checkout: Path, compile_: str) -> None:
    cxx = checkout.parent / "bin/c++"
    answer = 'case "$*" in *--version*) echo release 1.0;;'
    cxx.write_text(f"#!/bin/sh\n{answer} *) {compile_};; esac\n")
    cxx.chmod(0o755)


PUT = {"cuda": put_nvcc, "cpu": put_cxx}


@pytest.mark.parametrize("kind", PUT)
def test_a_failing_build_is_a_warning_or_an_error(checkout, kind):
    PUT[kind](checkout, "echo 'swiglu.cu(7): boom' >&2; exit 1")
    stale = checkout / f"llm2vec_fast/_{kind}.so"
    stale.write_text("of older sources")
    done = run_setup(checkout)
    assert done.returncode == 0 and "boom" in done.stderr
    assert f"building the {kind.upper()} library failed, going on without it" in done.stderr
    assert not stale.exists()
    done = run_setup(checkout, **{f"LLM2VEC_FAST_{kind.upper()}": "1"})
    assert done.returncode != 0 and "boom" in done.stderr


def test_a_wheel_holds_the_libraries_and_fits_every_python(checkout):
    for kind, put in PUT.items():
        put(checkout, TOUCH)
        both = {"LLM2VEC_FAST_CUDA": "auto", f"LLM2VEC_FAST_{kind.upper()}": "1"}
        done = run_setup(checkout, "-q", "bdist_wheel", "-d", f"out {kind}", **both)
        assert done.returncode == 0, done.stderr
        (wheel,) = (checkout / f"out {kind}").iterdir()
        assert "-py3-none-linux_" in wheel.name
        with zipfile.ZipFile(wheel) as archive:
            assert archive.read(f"llm2vec_fast/_{kind}.so") == b"built\n"


@pytest.fixture
def commands(setup_py, checkout, monkeypatch):
    """commands(): what a build in the copy compiles and links, without compiling."""
    put_nvcc(checkout, TOUCH)
    monkeypatch.setenv("PATH", f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(setup_py, "CSRC", checkout / "csrc")
    real = setup_py.run

    def build() -> list[str]:
        seen = []
        monkeypatch.setattr(setup_py, "run", lambda cmd: (seen.append(" ".join(cmd)), real(cmd))[1])
        setup_py.build("cuda", checkout / "llm2vec_fast/_cuda.so", checkout / "build")
        return [command for command in seen if " -o " in command]

    return build


def test_only_what_changed_is_compiled_again(checkout, commands, monkeypatch):
    def compiled() -> set[str]:
        return {name for command in commands() for name in re.findall(r"-c (\S+)", command)}

    everything = {"library.cpp", "add_rms_norm.cu", "pool.cu", "swiglu.cu"}
    assert compiled() == everything
    assert commands() == []
    with (checkout / "csrc/pool.cu").open("a") as file:
        file.write("// changed\n")
    # library.cpp is told what all sources are.
    assert compiled() == {"pool.cu", "library.cpp"}
    with (checkout / "csrc/kernels.h").open("a") as file:
        file.write("// changed\n")
    assert compiled() == everything
    monkeypatch.setenv("LLM2VEC_FAST_ARCHS", "80")
    assert compiled() == everything - {"library.cpp"}
    assert len(list((checkout / "build").iterdir())) == 5  # and nothing of earlier builds is kept


def test_architectures(checkout, commands, setup_py, monkeypatch):
    (first, *_) = [command for command in commands() if "-c pool.cu" in command]
    assert re.findall(r"-gencode=\S+", first) == [  # what this nvcc knows of the default
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    monkeypatch.setenv("LLM2VEC_FAST_ARCHS", "90a 80")
    (second, *_) = [command for command in commands() if "-c pool.cu" in command]
    assert second.count("-gencode") == 3 and "code=compute_90 " in second
    monkeypatch.setenv("LLM2VEC_FAST_ARCHS", "80;130")
    with pytest.raises(setup_py.CompileError, match=r"does not know 130; it knows 80, 90, 100"):
        commands()


def test_links_neither_cuda_torch_nor_anything_by_its_path(commands):
    (link,) = [command for command in commands() if "-shared" in command]
    assert "-ltorch_cpu -lc10" in link and "torch_cuda" not in link and "rpath" not in link
