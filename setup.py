"""Packaging lives in pyproject.toml; here the two libraries of csrc/ are built: CUDA kernels with
plain nvcc, the CPU's with a C++ compiler.

LLM2VEC_FAST_CUDA   auto (default): build where nvcc and torch are found, and if that fails say so
                    and go on without; 1: whatever prevents the library is an error; 0: never build
LLM2VEC_FAST_CPU    the same for the CPU's library, which needs torch and c++ (or what CXX names)
LLM2VEC_FAST_ARCHS  GPU architectures, for example "80;90a"; by default those of DEFAULT_ARCHS that
                    this nvcc knows. PTX of the newest serves GPUs that are newer still.

The libraries use only torch's stable ABI and nothing of Python's: one build serves every torch from
2.10 on and every Python.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES = {
    "cuda": ("library.cpp", "add_rms_norm.cu", "pool.cu", "swiglu.cu"),
    "cpu": ("cpu_library.cpp", "cpu_kernels.cpp"),
}
# What cpu_kernels.cpp is compiled for: floats in a vector, queries at a time, instructions.
X86 = {
    "amx": (16, 8, ("-march=x86-64-v4", "-mamx-tile", "-mamx-bf16", "-mavx512bf16")),
    "avx512": (16, 8, ("-march=x86-64-v4",)),
    "avx2": (8, 6, ("-march=x86-64-v3",)),
    "plain": (4, 4, ("-march=x86-64",)),
}
DEFAULT_ARCHS = "80;86;89;90a;100;120"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # 2.10


def wish(kind: str) -> str:
    name = f"LLM2VEC_FAST_{kind.upper()}"
    value = os.environ.get(name, "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name} must be auto, 1 or 0, got {value!r}")
    return value


def find_nvcc() -> str | None:
    """The compiler on PATH, else that of CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def find_cxx() -> list[str] | None:
    """The compiler, with what stands before or behind it in CXX ("ccache g++")."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    return command if shutil.which(command[0]) else None


def sources_define() -> str:
    """Tells a library what it was made of; `ops/_library.py` looks whether that is there now."""
    kinds = (".cpp", ".cu", ".cuh", ".h")
    whole = b"".join(path.read_bytes() for path in sorted(CSRC.iterdir()) if path.suffix in kinds)
    return f'-DLLM2VEC_FAST_SOURCES="{hashlib.sha256(whole).hexdigest()[:16]}"'


def find_torch() -> Path | None:
    """Where torch is installed; torch itself is not imported, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def missing(kind: str) -> str | None:
    """What prevents building on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "the libraries of csrc/ are built on Linux only"
    if kind == "cuda" and find_nvcc() is None:
        return "nvcc was not found; put it on PATH or set CUDA_HOME to a CUDA toolkit"
    if kind == "cpu" and find_cxx() is None:
        return "no C++ compiler was found; put c++ on PATH or name one by CXX"
    if find_torch() is None:
        return "torch is not installed here; install it first, then use --no-build-isolation"
    return None


def archs(nvcc: str) -> list[str]:
    """The architectures to build for, oldest first."""
    listed = run([nvcc, "--list-gpu-code"])
    known = set(re.findall(r"sm_(\d+)", listed))
    asked = os.environ.get("LLM2VEC_FAST_ARCHS")
    wanted = [arch for arch in re.split(r"[;,\s]+", asked or DEFAULT_ARCHS) if arch]
    unknown = [arch for arch in wanted if arch.rstrip("af") not in known]
    if asked and unknown:
        raise CompileError(
            f"LLM2VEC_FAST_ARCHS: {nvcc} does not know {', '.join(unknown)}; "
            f"it knows {', '.join(sorted(known, key=int))}"
        )
    return sorted(set(wanted) - set(unknown), key=lambda arch: int(arch.rstrip("af")))


def gencode(wanted: list[str]) -> list[str]:
    newest = wanted[-1].rstrip("af")  # plain: PTX with a suffix runs on no newer GPU
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=CSRC)
    except OSError as error:
        raise CompileError(f"{command[0]} could not be started: {error}") from error
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def digest(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()[:16]


def cuda_jobs(torch: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The command that links, and for each object the command that compiles it."""
    nvcc = find_nvcc()
    compile_ = [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    device = gencode(archs(nvcc))
    host = [TORCH_TARGET, sources_define(), "-DUSE_CUDA", "-isystem", str(torch / "include")]
    jobs = {
        Path(name).stem: [*compile_, *(host if name.endswith(".cpp") else device), "-c", name]
        for name in SOURCES["cuda"]
    }
    # libtorch_cuda is not among the libraries: with it, CPU builds of torch could not load us.
    hide = ["-ldl", "-Xlinker=--exclude-libs,ALL", "-Xlinker=-s"]
    return [nvcc, "-shared", "-cudart=static", *hide], jobs


def cpu_jobs(torch: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The same for the CPU's library: its kernels once for each instruction set."""
    compile_ = [*find_cxx(), "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi",
                "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]  # fmt: skip
    kinds = X86 if platform.machine() in ("x86_64", "AMD64") else {"plain": (4, 4, ())}
    host = [TORCH_TARGET, sources_define(), "-isystem", str(torch / "include")]
    jobs = {"cpu_library": [*compile_, *host, "-c", "cpu_library.cpp"]}
    for isa, (width, rows, instructions) in kinds.items():
        flags = [f"-DISA={isa}", f"-DWIDTH={width}", f"-DROWS={rows}", *instructions]
        jobs[f"cpu_{isa}"] = [*compile_, *flags, "-c", "cpu_kernels.cpp"]
    return [*find_cxx(), "-shared", "-Wl,--exclude-libs,ALL", "-Wl,-s"], jobs


def build(kind: str, library: Path, work: Path) -> None:
    """Compiles csrc/ and links it to `library`. What is unchanged since the last build is taken
    from `work`: file names there carry a digest of sources, headers, flags and versions.

    kind:   "cuda" or "cpu"
    raises: CompileError with the compiler's own words
    """
    reason = missing(kind)
    if reason is not None:
        raise CompileError(reason)
    torch = find_torch()
    link, commands = {"cuda": cuda_jobs, "cpu": cpu_jobs}[kind](torch)
    headers = [path.read_bytes() for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh")])]
    compiler = link[: link.index("-shared")]
    versions = [run([*compiler, "--version"]), (torch / "version.py").read_text()]
    work.mkdir(parents=True, exist_ok=True)

    jobs, objects = [], []
    for name, command in commands.items():
        source = (CSRC / command[-1]).read_bytes()
        target = work / f"{name}-{digest(source, *headers, *versions, *command)}.o"
        objects.append(target)
        if not target.exists():
            jobs.append((command, target))
    cores = os.cpu_count() or 1
    threads = str(max(1, cores // max(1, len(jobs))))  # of one nvcc, for its architectures
    more = ["--threads", threads] if kind == "cuda" else []
    with ThreadPoolExecutor(cores) as pool:
        finish = [pool.submit(produce, [*job, *more], to) for job, to in jobs]
        for future in finish:
            future.result()

    names = [str(path) for path in objects]
    libraries = ["-L", str(torch / "lib"), "-ltorch_cpu", "-lc10"]
    linked = work / f"_{kind}-{digest(*link, *(path.name for path in objects))}.so"
    if not linked.exists():
        produce([*compiler, *names, *libraries, *link[len(compiler) :]], linked)
    for path in work.iterdir():
        if path not in (*objects, linked):
            path.unlink()
    library.parent.mkdir(parents=True, exist_ok=True)
    put = library.with_name(library.name + ".new")  # a process may have the old one mapped
    shutil.copyfile(linked, put)
    os.replace(put, library)


def produce(command: list[str], target: Path) -> None:
    """Runs a compiler; its target appears complete or not at all."""
    unfinished = target.with_suffix(f".{os.getpid()}{target.suffix}")
    run([*command, "-o", str(unfinished)])
    os.replace(unfinished, target)


class BuildLibraries(build_ext):
    failed: tuple[str, ...] = ()

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version: it uses none

    def build_extension(self, ext):
        library, kind = Path(self.get_ext_fullpath(ext.name)), ext.name.rpartition("_")[2]
        try:
            build(kind, library, ROOT / "build" / kind)
        except CompileError as error:
            self.failed += (ext.name,)
            library.unlink(missing_ok=True)
            if not ext.optional:
                raise
            say(f"building the {kind.upper()} library failed, going on without it:\n{error}")

    def copy_extensions_to_source(self):  # of editable and in-place builds
        super().copy_extensions_to_source()
        for name in self.failed:  # a library of older sources would not fit
            (ROOT / self.get_ext_filename(name)).unlink(missing_ok=True)


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.ext_modules else tag


def say(message: str) -> None:
    print(f"llm2vec_fast: {message}", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    found = []
    for kind, names in SOURCES.items():
        value, reason = wish(kind), missing(kind)
        if value == "0":
            continue
        if value == "auto" and reason is not None:
            say(f"no {kind.upper()} library: {reason}")
            continue
        sources = [f"csrc/{name}" for name in names]
        headers = [f"csrc/{path.name}" for path in sorted(CSRC.glob("*.*h"))]
        name = f"llm2vec_fast._{kind}"
        found.append(Extension(name, sources, depends=headers, optional=value == "auto"))
    return found


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    )
