"""Pictures of rows: drawn for what was measured, small, and of nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
MACHINE = {"cpu": "A CPU", "gpu": "A GPU", "torch": "2.13.0"}
SPEED = {
    "op": "encode", "model": "M 7B", "lengths": "fixed 512", "dtype": "bfloat16",
    "device": "cuda", "tokens": 1000, "share_of_matmul": 0.8,
}  # fmt: skip
OPERATION = {"op": "pool", "what": "forward", "shape": "T=8", "dtype": "float32", "ms": 1.0}


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import plot

    return plot


@pytest.fixture
def rows_of(tmp_path):
    """rows_of(name, rows) -> a file as write_rows makes it"""

    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / f"{name}.json"
        told = {"machine": MACHINE, "utc": "2026-11-22T10:00:00+00:00", "rows": rows}
        path.write_text(json.dumps(told))
        return path

    return write


def test_small_png_files(plot, rows_of, tmp_path):
    speeds = [
        SPEED | {"rival": "llm2vec_fast", "tokens_per_s": 900.0, "all_seconds": [1.0, 1.2]},
        SPEED | {"rival": "stock", "tokens_per_s": 300.0},
    ]
    points = [{"documents": n, "seconds": n / 9, "peak_mb": 600} for n in (10, 100)]
    files = [
        rows_of("encode-cuda", speeds),
        rows_of("pool-cpu", [OPERATION | {"backend": "ours x", "of_copy": 0.9}]),
        rows_of("scale-cpu", [{"what": "documents", "time_exponent": 1.0, "points": points},
                              {"what": "lengths", "points": [{"length": 4, "tokens_per_s": 9}]},
                              {"what": "estimate", "points": [{"gpus": 1}]}]),
    ]  # fmt: skip
    made = plot.draw(files, tmp_path / "plots" / "new")
    assert [path.name for path in made] == [
        "encode-cuda-M-7B.png", "pool-cpu-operations-float32.png", "scale-cpu-documents.png",
        "scale-cpu-lengths.png",
    ]  # fmt: skip
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 60_000


def test_what_was_not_measured_is_not_drawn(plot, rows_of):
    rows = [
        SPEED | {"rival": "llm2vec_fast", "tokens_per_s": 900.0},
        SPEED | {"rival": "llm2vec_fast fp8", "dtype": "fp8", "tokens_per_s": 990.0},
        SPEED | {"rival": "broken", "error": "out of memory"},
        SPEED | {"rival": "old", "lengths": "normal", "tokens_per_s": 1.0, "enters": "text"},
        {"what": "mntp step", "rival": "ours", "model": "M 7B", "tokens_per_s": 5.0},
        {"op": "encode", "note": "not measured, the time was up"},
    ]
    ((name, figure),) = plot.speeds(plot.Measured.read(rows_of("encode-cuda", rows)))
    labels = [[t.get_text() for t in axes.get_yticklabels()] for axes in figure.axes]
    assert name == "M 7B"
    assert labels == [["llm2vec_fast", "llm2vec_fast fp8"], ["old, from text"]]
    assert "A GPU; torch 2.13.0\nencode-cuda.json, 2026-11-22" in figure._supxlabel.get_text()


def test_operations_beside_their_ceilings(plot, rows_of):
    """The fastest of ours and of the others over the shapes, each with its range."""
    rows = [{"ceiling": "this run"}, {"op": "pool", "failed": "exit 1"}]
    rows += [OPERATION | {"backend": "ours slow", "of_copy": 0.3}]
    for share in (0.8, 0.9, 0.95):
        rows.append(OPERATION | {"backend": "ours triton", "of_copy": share})
        rows.append(OPERATION | {"backend": "eager", "of_copy": share / 2})
    rows.append(OPERATION | {"op": "attention", "backend": "flash", "of_matmul": 0.5})
    rows.append({**OPERATION, "backend": "gone", "error": "RuntimeError"} | {"ms": None})
    ((_, figure),) = plot.operations(plot.Measured.read(rows_of("kernels-cuda", rows)))
    copy, matmul = figure.axes
    labels = [t.get_text() for t in copy.get_yticklabels()]
    assert labels == ["pool forward: ours triton", "pool forward: eager"]
    assert [bar.get_width() for bar in copy.patches] == [0.9, 0.45]
    assert [t.get_text() for t in matmul.get_yticklabels()] == ["attention forward: flash"]
    colours = [bar.get_facecolor() for bar in copy.patches]
    assert colours[0] != colours[1]


def test_nothing_to_draw_is_said(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    command = [sys.executable, "-m", "benchmarks.plot", "--rows", str(tmp_path), "--out"]
    out = tmp_path / "plots"
    done = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "nothing to draw" in done.stderr
    assert "broken.json left out" in done.stdout and "list.json left out" in done.stdout
    assert not out.exists()
