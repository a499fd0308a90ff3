"""The soak benchmark: its counting by hand, two of its rows and its long run on tiny jobs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed

if sys.platform != "linux":
    pytest.skip("processes are watched through /proc", allow_module_level=True)


@pytest.fixture
def soak(monkeypatch, tiny_tokenizer_dir):
    """The module; nothing is downloaded for it, and its jobs are small."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import bench_scale, soak

    monkeypatch.setattr(bench_scale, "ensure_model", lambda: tiny_tokenizer_dir)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that it starts
    monkeypatch.setattr(soak, "DOCUMENTS", 400)
    monkeypatch.setattr(soak, "PER_SHARD", 20)
    return soak


def test_rows_that_are_lost_doubled_or_changed_are_counted(
    soak, tiny_model, add_tokenizer, tmp_path
):
    source, whole, output = tmp_path / "t.jsonl", tmp_path / "whole", tmp_path / "out"
    soak.write_input(source, 12, 2)
    model = LLM2Vec.from_pretrained(add_tokenizer(tiny_model(tmp_path, "llama")), dtype="float32")
    options = {"id_column": "id", "rows_per_shard": 4, "show_progress": False}
    embed(source, model, whole, **options)
    shutil.copytree(whole, output)
    names = [f"part-00000-00000{n}.parquet" for n in range(3)]
    assert soak.faults.lost_and_doubled(output, 12) == (0, 0)
    assert soak.faults.is_exact(output, whole)
    (output / names[1]).unlink()
    assert soak.faults.lost_and_doubled(output, 12) == (4, 0)
    assert not soak.faults.is_exact(output, whole)
    shutil.copy(output / names[0], output / names[1])
    assert soak.faults.lost_and_doubled(output, 12) == (4, 4)
    assert not soak.faults.is_exact(output, whole)


def test_what_is_not_as_it_may_be_fails(soak, monkeypatch, capsys):
    row = {"fault": "x", "tries": 1, "rows_lost": 1, "rows_doubled": 0, "exact": True}
    monkeypatch.setattr(soak, "everything", lambda *_: iter([row]))
    with pytest.raises(SystemExit, match="lost"):
        soak.main([])
    row |= {"rows_lost": 0}
    soak.main([])
    assert "rows lost" in capsys.readouterr().out


def test_growth_is_between_the_second_and_the_last_third_of_a_life(soak):
    from benchmarks.soak_long import Life

    life = Life()
    life.looks = [(n, 100.0 * n if n < 10 else 1000 + n, 9) for n in range(30)]
    assert life.growth() == (10, 0)
    life.looks = life.looks[:20]
    assert life.growth() is None


@pytest.mark.soak
@pytest.mark.parametrize("row", ["truncated shard", "kill -9 of a worker torchrun"])
def test_a_row_of_the_matrix(soak, capsys, row):
    soak.main(["--tries", "1", "--minutes", "0", "--only", row])
    told = capsys.readouterr().out
    assert "'survived': 1, 'rows_lost': 0, 'rows_doubled': 0, 'exact': True" in told


@pytest.mark.soak
def test_a_short_long_run(soak, tiny_tokenizer_dir, tmp_path):
    from benchmarks.soak_long import NEXT, long_run

    model = soak.tiny_model(tmp_path / "model", tokenizer=tiny_tokenizer_dir)
    row = long_run(tmp_path, model, 60_000, 0.5, 3)
    assert row["exact"] and (row["rows_lost"], row["rows_doubled"]) == (0, 0)
    assert set(row["faults"]) <= set(NEXT) and row["survived"] >= 1
