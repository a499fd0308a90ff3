"""What the pages say exists: links, tests, options of the command line, files of the tree, Python.

Whether a sentence is true, nobody but a reader can tell.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import typer

import llm2vec_fast
from llm2vec_fast.cli import app
from llm2vec_fast.train.config import Config

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
# A link in a line, or a definition of one at a line's start: the target without its title.
LINK = re.compile(r'(?:\]\(|^\[[^]]+\]: )([^)\s"]+)', re.MULTILINE)
TEST = re.compile(r"\b(tests/[\w/]+\.py)::(\w+)")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Of torchrun, pip and others, in commands that are theirs.
FOREIGN = {"--nproc-per-node", "--no-build-isolation"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def command_of(name: str):
    command = typer.main.get_command(app)
    for part in name.split():
        command = command.commands[part]
    return command


def options_of(name: str) -> set[str]:
    """What a command takes, also a training's fields, which it reads itself."""
    found = {"--help"}
    for parameter in command_of(name).params:
        found |= {word for word in parameter.opts + parameter.secondary_opts if word[:2] == "--"}
    if name == "train":
        found |= {f"--{field.name}" for field in dataclasses.fields(Config)}
    return found


@functools.cache
def all_options() -> frozenset[str]:
    names = [name for name in command_of("").commands if name != "eval"]
    names += [f"eval {name}" for name in command_of("eval").commands]
    return frozenset().union(*map(options_of, names))


def benchmark_options() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    return set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', text))


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """(command, options) of every `llm2vec-fast NAME ...` and `-m llm2vec_fast NAME ...`."""
    text, found = re.sub(r"\\\n\s*", "", text), []
    for words in re.findall(r"(?:llm2vec-fast|-m llm2vec_fast) ([a-z][^\n`]*)", text):
        name, *rest = words.partition("#")[0].split()
        if name == "eval" and rest:
            name = f"eval {rest[0]}"
        found.append((name, OPTION.findall(words)))
    return found


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """Functions and classes at the top of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if hasattr(node, "name"))


@pages
def test_named_tests_exist(page):
    for path, name in TEST.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path
        assert name in names_in(ROOT / path), f"{path}::{name}"


@pages
def test_links_resolve(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            plain = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in plain, target


@pages
def test_commands_have_the_options_that_are_named(page):
    for name, options in commands_in(page.read_text(encoding="utf-8")):
        assert set(options) <= options_of(name), name


@pages
def test_options_in_prose_are_somebodys(page):
    named = set(OPTION.findall(page.read_text(encoding="utf-8")))
    assert named <= all_options() | benchmark_options() | FOREIGN


@pages
def test_python_compiles(page):
    for code in PYTHON.findall(page.read_text(encoding="utf-8")):
        compile(code, str(page), "exec")


def test_every_tick_of_ours_has_its_test():
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    proofs = dict(re.findall(r'^\[(\w+)\]: \S+ "tests/\S+::(\w+)"$', text, re.MULTILINE))
    rows = [row.strip("|").split("|") for row in text.splitlines() if row.startswith("| ")]
    ours = [row[-1].strip() for row in rows if len(row) == 7]
    assert len(ours) > 30
    used = set(re.findall(r"\]\[(\w+)\]", text))
    assert used == set(proofs)
    assert not [cell for cell in ours if "✓" in cell.replace("[✓][", "")]


def test_every_file_has_its_place_in_the_tree():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The house")[2]
    package = Path(llm2vec_fast.__file__).parent
    covered = {"ops/kernels", "ops/eager"}  # by the names of their operations
    files = [path.relative_to(package) for path in package.rglob("*.py")]
    missing = {
        str(path)
        for path in files
        if path.name not in ("__init__.py", "version.py")
        and str(path.parent) not in covered
        and not re.search(rf"(?<![\w.]){re.escape(path.name)}", tree)
    }
    assert not missing
