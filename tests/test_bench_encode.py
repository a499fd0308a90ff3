"""The benchmark of encoding compares like with like, keeps its time, and loses no row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

RATE = 1e12  # of matrix products, so that shares are known


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import bench_encode, encoders

    monkeypatch.setattr(bench_encode, "matmul_rate", lambda *_: RATE)
    monkeypatch.setitem(encoders.BATCHES, "cpu", (2, 3))
    return bench_encode


@pytest.fixture
def measure(bench):
    """measure(case, ..., seconds=60, model=None) -> (rows, what was saved after each step)"""

    def run(*cases, seconds=60.0, model=None):
        chosen = SimpleNamespace(
            device="cpu", tokens=600, texts=5, model=model, rounds=1, minutes=1.0
        )
        saved: list[list[dict]] = []
        rows = bench.measure(cases, chosen, time.perf_counter() + seconds, saved.append)
        return rows, saved

    return run


def _rival(bench, monkeypatch, name: str, encode) -> None:
    from benchmarks.encoders import Ready, Rival

    monkeypatch.setitem(bench.RIVALS, name, Rival(name, lambda work: Ready(encode)))


def test_rivals_compute_the_same_vectors_from_the_same_ids(bench, measure):
    rows, saved = measure(bench.Bench("tiny", "log-normal", "float32", bench.PADDED))
    assert [row["rival"] for row in rows] == [bench.RIVALS[key].name for key in bench.PADDED]
    for row in rows:
        assert row["distance_to_ours"] < 1e-6 and row["distance_to_truth"] < 1e-6
        assert row["rounds"] == len(row["all_seconds"]) == 1 and row["share_of_datasheet"] is None
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(row["tokens"])
        assert row["share_of_matmul"] == pytest.approx(row["tflop_per_s"] * 1e12 / RATE)
        assert row["ours_is_faster"] == pytest.approx(row["seconds"] / rows[0]["seconds"])
    ours, best, unpadded, by_length, arrival = rows
    assert ours["ours_is_faster"] == 1 and ours["padding_waste"] == unpadded["padding_waste"] == 0
    assert best["way"] in ("best batch 2", "best batch 3")
    assert by_length["padding_waste"] == arrival["padding_waste"] > 0.3  # all in one batch
    assert [len(rows) for rows in saved[:5]] == [1, 2, 3, 4, 5]


def test_text_in_and_shards_out(bench, measure, monkeypatch, tmp_path, tiny_model, add_tokenizer):
    from benchmarks import official, shapes

    texts = ["to be or not", "a", "of the one and this", "word " * 600, "the in it is", "by at"]
    monkeypatch.setattr(shapes, "real_texts", lambda count: texts)
    model = add_tokenizer(tiny_model(tmp_path, "llama"))
    rivals = ("ours text", "best text", "ours", "ours shards", "official")

    def no_environment(requests):
        raise official.OfficialError("no official llm2vec here")

    monkeypatch.setattr(official, "run_many", no_environment)
    rows, _ = measure(bench.Bench(bench.REAL, "docstrings", "float32", rivals), model=model)
    *done, failed = rows
    assert [row["enters"] for row in rows] == ["text", "text", "ids", "text", "text"]
    assert failed["error"] == "OfficialError: no official llm2vec here" and "seconds" not in failed
    for row in done:
        assert row["texts"] == 5 and row["distance_to_truth"] < 1e-6  # stored as float16
        if row["enters"] == "text":
            assert row["distance_to_ours"] < 1e-6


def test_fp8_is_a_row_beside_bf16(bench, measure, monkeypatch):
    # Of two layers, the first and the last, none is left to go down to fp8.
    monkeypatch.setitem(bench.MODELS, "deep", bench.MODELS["tiny"] | {"num_hidden_layers": 4})
    rows, _ = measure(bench.Bench("deep", "fixed 64", "bfloat16", (*bench.FP8, "compiled")))
    ours, fp8, compiled = rows
    assert [row["dtype"] for row in rows] == ["bfloat16", "fp8", "bfloat16"]
    assert 0 < fp8["distance_to_ours"] < 0.05 and 0 < ours["distance_to_truth"] < 1e-3
    assert "GPU only" in compiled["error"]


def test_a_failing_rival_gives_its_reason_and_disturbs_nobody(bench, measure, monkeypatch):
    def breaks(work):
        raise RuntimeError("out of\n  luck")

    _rival(bench, monkeypatch, "broken", breaks)
    rows, _ = measure(
        bench.Bench("tiny", "fixed 20", "float32", ("ours", "broken", "arrival")),
        bench.Bench("no such model", "fixed 20", "float32", ("ours",)),
        model="no such directory",
    )
    assert rows[1]["error"] == "RuntimeError: out of luck" and "seconds" not in rows[1]
    assert rows[0]["seconds"] > 0 and rows[2]["seconds"] > 0
    assert "no such directory" in rows[3]["error"]


def test_the_budget_is_kept_and_what_was_measured_too(bench, measure, monkeypatch):
    """One that hangs is cut off, though it swallows exceptions; cases after that are named."""

    def hangs(work):
        while True:
            try:
                time.sleep(60)
            except Exception:
                continue

    measure(bench.Bench("tiny", "fixed 20", "float32", ("ours",)))  # imports are not the budget's
    _rival(bench, monkeypatch, "hanging", hangs)
    case = bench.Bench("tiny", "fixed 20", "float32", ("ours", "hanging", "arrival"))
    began = time.perf_counter()
    rows, saved = measure(case, case, seconds=4.0)
    assert time.perf_counter() - began < 12
    assert rows[0]["seconds"] > 0 and saved[0][0]["seconds"] > 0
    assert rows[1]["error"] == rows[2]["error"] == "not measured: the time was up"


def test_padding_waste(bench):
    from benchmarks.encoders import padding_waste

    assert padding_waste([4, 2, 3, 1], 2, False) == pytest.approx(1 - 10 / 14)
    assert padding_waste([4, 2, 3, 1], 2, True) == pytest.approx(1 - 10 / 12)
    assert padding_waste([4, 2, 3], 2, True) == pytest.approx(1 - 9 / 10)
    assert padding_waste([7, 7, 7], 2, False) == 0


def test_the_best_batch_is_the_fastest_that_fits(bench):
    import torch

    from benchmarks.encoders import fastest

    def seconds(size: int) -> float:
        if size == 32:
            raise torch.OutOfMemoryError
        return {4: 3.0, 8: 1.0, 16: 2.0}[size]

    assert fastest(seconds, (4, 8, 16, 32)) == 8
    with pytest.raises(RuntimeError, match="smallest batch, 32"):
        fastest(seconds, (32, 64))


def test_sets_of_lengths(bench):
    from benchmarks.shapes import lengths_of

    assert lengths_of("fixed 512", 1600) == [512] * 3
    normal, skewed = lengths_of("normal", 1_000_000), lengths_of("log-normal", 1_000_000)
    assert 16 <= min(normal) and max(normal) <= 512 and np.mean(normal) == pytest.approx(256, 0.02)
    assert np.median(skewed) == pytest.approx(120, 0.05)
    assert np.quantile(skewed, 0.99) == pytest.approx(2000, 0.15)
    assert skewed == lengths_of("log-normal", 1_000_000)


def test_shares_of_the_datasheet_are_told_for_known_cards_alone(bench):
    from benchmarks.measure import datasheet_rate

    assert datasheet_rate("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert datasheet_rate("NVIDIA H200", "fp8") == 2 * 989e12
    assert datasheet_rate("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    for gpu, dtype in [("NVIDIA A100-SXM4-80GB", "fp8"), ("NVIDIA H100 PCIe", "bfloat16"),
                       ("NVIDIA H200 NVL", "fp8"), ("none", "float32")]:  # fmt: skip
        assert datasheet_rate(gpu, dtype) is None


def test_a_cut_write_keeps_the_rows_before(bench, monkeypatch, tmp_path):
    from benchmarks import measure

    path = measure.write_rows("x", [{"a": 1}], tmp_path)
    monkeypatch.setattr(measure.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        measure.write_rows("x", [{"a": 2}], tmp_path)
    assert json.loads(path.read_text())["rows"] == [{"a": 1}]


def test_the_run_of_everything_begins_with_encoding_and_trains_on_gpus_alone(bench):
    from benchmarks import run

    on_cpu, on_gpu = run.names([], "cpu"), run.names([], "cuda")
    assert on_cpu[0] == on_gpu[0] == "encode" and on_gpu[-1] == "train" and "train" not in on_cpu
    assert len(set(on_gpu)) == len(on_gpu) > 10
    with pytest.raises(SystemExit, match="nonsense"):
        run.names(["nonsense"], "cpu")
