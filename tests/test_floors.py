"""The house: imports only go down, and rooms of one floor do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llm2vec_fast

ROOT = Path(llm2vec_fast.__file__).parent
# A room is a module or a package; its floor. What is not named here may not exist.
FLOORS = {
    "version": 0,
    "vectors": 0,
    "adapters": 0,
    "ops": 0,
    "batch": 1,
    "model": 2,
    "text": 3,
    "settings": 4,
    "saving": 5,
    "encoder": 6,
    "corpus": 7,
    "train": 8,
    "evaluate": 8,
    "integrations": 8,
    "show": 9,
    "doctor": 9,
    "bench": 9,
    "demo": 10,
    "cli_eval": 11,
    "cli": 12,
}


def room_of(path: Path) -> str:
    part = path.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports, anywhere in it, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            if node.module == "llm2vec_fast":
                names = [f"llm2vec_fast.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "llm2vec_fast" and len(parts) > 1 and parts[1] != "LLM2Vec":
                rooms.add(parts[1] if parts[1] != "__version__" else "version")
    return rooms


FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or not p.name.startswith("__"))


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_only_go_down(path: Path):
    here = room_of(path)
    for there in imported_rooms(path) - {here}:
        assert there in FLOORS, f"{path} imports the unknown room {there}"
        assert FLOORS[there] < FLOORS[here], (
            f"{path.name} on floor {FLOORS[here]} imports {there} on floor {FLOORS[there]}"
        )


def test_the_check_sees_a_forbidden_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from llm2vec_fast.encoder import LLM2Vec\n    return LLM2Vec\n")
    assert imported_rooms(bad) == {"encoder"}
    assert FLOORS["encoder"] > FLOORS["model"]
