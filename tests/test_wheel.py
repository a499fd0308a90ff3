"""What people install: a wheel and an sdist, in an environment that does not see this checkout.

About 15 seconds: two builds, an installation, and three processes that import torch. Nothing is
downloaded: the new environment sees the packages of this one, but not the editable install in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from llm2vec_fast import __version__, adapters

ROOT = Path(__file__).parent.parent
# Without compilers, or with 0, there are no libraries of csrc/, and one wheel serves every machine.
ENV = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
ENV |= {"LLM2VEC_FAST_CUDA": "0", "LLM2VEC_FAST_CPU": "0"}
ENV |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
ENV |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(*command, cwd) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source: Path, out: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", out, source, cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel of the sources, wheel of the sdist). Built from a copy: the checkout's own
    build/ and CUDA library are not touched.
    """
    place = tmp_path_factory.mktemp("wheel")
    copy, ignore = place / "copy", shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
    for name in ("llm2vec_fast", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(place)!r})"
    run(sys.executable, "-c", code, cwd=copy)
    (sdist,) = place.glob("*.tar.gz")
    return sdist, wheel_of(copy, place / "one"), wheel_of(sdist, place / "two")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The folder with the programs of a new environment."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, with_pip=False)
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    python = programs / Path("python.exe" if os.name == "nt" else "python")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps")
    run(*pip, built[2], cwd=place)
    (packages,) = place.rglob("site-packages")
    # A path in a .pth file is added, but the .pth files there, so editable installs, are not read.
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return programs


def names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}


def package_files() -> set[str]:
    files = [path for path in (ROOT / "llm2vec_fast").rglob("*") if path.is_file()]
    left_out = ("__pycache__", ".so", ".pyc")
    found = {path.relative_to(ROOT).as_posix() for path in files}
    return {name for name in found if not any(part in name for part in left_out)}


def test_a_wheel_has_the_package_and_nothing_else(built):
    _, wheel, _ = built
    assert wheel.name == f"llm2vec_fast-{__version__}-py3-none-any.whl"
    found = {name for name in names(wheel) if ".dist-info/" not in name}
    assert found == package_files()
    assert "llm2vec_fast/py.typed" in found and len(adapters.names()) >= 3
    for name in adapters.names():
        assert f"llm2vec_fast/adapters/{name}/adapter_model.safetensors" in found


def test_an_sdist_has_what_a_build_needs_and_builds_the_same_wheel(built):
    sdist, wheel, again = built
    found = names(sdist)
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc/library.cpp"}
    assert found >= needed | package_files()
    assert names(again) == names(wheel)


def test_doctor_runs_where_it_is_installed(installed, tmp_path):
    told = run(installed / "llm2vec-fast", "doctor", cwd=tmp_path)
    assert __version__ in told and "attention" in told


def test_a_tiny_model_encodes_where_it_is_installed(installed, tiny_model, add_tokenizer, tmp_path):
    model = add_tokenizer(tiny_model(tmp_path, "llama"))
    code = (
        "import llm2vec_fast\n"
        f"model = llm2vec_fast.LLM2Vec.from_pretrained({str(model)!r})\n"
        "print(llm2vec_fast.__file__, tuple(model.encode(['a', 'b c']).shape))\n"
        "print(*__import__('llm2vec_fast.adapters').adapters.names())"
    )
    where, shipped = run(installed / "python", "-c", code, cwd=tmp_path).splitlines()
    assert where.startswith(str(installed.parent)) and where.endswith("(2, 48)")
    assert shipped.split() == adapters.names()
