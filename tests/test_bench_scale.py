"""The benchmark of growth: fits and arithmetic by hand, measurements on tiny corpora."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("processes are watched through /proc", allow_module_level=True)


@pytest.fixture
def scale(monkeypatch, tiny_tokenizer_dir):
    """The module; nothing is downloaded for it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import bench_scale

    monkeypatch.setattr(bench_scale, "ensure_model", lambda: tiny_tokenizer_dir)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that it starts
    return bench_scale


def test_fits_find_the_line_and_the_exponent(scale):
    x = np.array([1e3, 1e4, 1e5])
    assert scale.line(x, 3 * x + 7) == pytest.approx((3, 7))
    assert scale.exponent(x, 0.02 * x**1.3) == pytest.approx(1.3)
    assert scale.exponent([1000], [2.0]) is None


def test_slopes_are_of_all_points_and_memory_of_the_largest(scale):
    point = {"growth_mb_per_million": None, "resume_s": 0.5, "shards": 10}
    points = [point | {"documents": n, "seconds": s} for n, s in ((10, 1), (100, 10), (1000, 1000))]
    points[-1] |= {"growth_mb_per_million": 0.25, "shards": 100}
    found = scale.slopes(points)
    assert found["exponents_between"] == pytest.approx([1, 2])
    assert found["time_exponent"] == pytest.approx(1.5)
    assert found["growth_mb_per_million"] == 0.25
    assert found["resume_ms_per_shard"] == pytest.approx(5)


def test_a_corpus_in_a_process_of_its_own(scale):
    (row,) = scale.corpora([1000], rows_per_shard=32, words=2)
    (point,) = row["points"]
    assert (point["documents"], point["shards"]) == (1000, 32)
    assert point["tokens"] > 2000
    assert point["entries"] == 34  # with the manifest and the summary
    assert 50 < max(point["resident_mb_by_tenths"]) <= point["peak_mb"] + 0.1
    assert 3 <= point["files_open"] < 100
    assert point["output_bytes"] > 1000 * 64 * 2
    assert min(point[key] for key in ("seconds", "beside_s", "resume_s", "skip_s")) > 0


def test_a_row_grows_by_a_point_a_corpus(scale, monkeypatch):
    """The same command within this process: starting others takes seconds each."""
    from typer.testing import CliRunner

    from llm2vec_fast.cli import app

    def run(command):
        told = json.loads(CliRunner().invoke(app, command[3:]).stdout)
        memory = np.array([[1 + at, 500 + at] for at in np.linspace(0, told["seconds"], 11)])
        return told, {"process_s": told["seconds"] + 1}, memory

    monkeypatch.setattr(scale, "watch", run)
    first, second = (dict(row) for row in scale.corpora([100, 1000], rows_per_shard=32, words=2))
    assert first["time_exponent"] is None and second["time_exponent"] is not None
    small, large = second["points"]
    assert (small["documents"], small["shards"], large["shards"]) == (100, 4, 32)
    assert small["growth_mb_per_million"] is None  # too few shards to tell
    # A megabyte a second.
    assert large["growth_mb_per_million"] == pytest.approx(1e6 * large["seconds"] / 1000)
    assert large["beside_s"] == pytest.approx(1)
    assert large["input_bytes"] > 9 * small["input_bytes"]


def test_watch_tells_why_a_command_failed(scale):
    from benchmarks.watch import watch

    command = [sys.executable, "-c", "import time; time.sleep(0.3); raise SystemExit('no luck')"]
    with pytest.raises(RuntimeError, match="ended with 1: no luck"):
        watch(command)


def test_watch_sees_memory_and_open_files(scale):
    from benchmarks.watch import watch

    held = "x = bytearray(80 << 20); files = [open('/dev/null') for _ in range(40)]"
    told, seen, memory = watch(
        [sys.executable, "-c", f"import time; {held}; time.sleep(1); del x; print('[1]')"]
    )
    assert told == [1] and seen["process_s"] >= 1
    assert 80 < memory[:, 1].max() <= seen["peak_mb"] < 200
    assert 43 <= seen["files_open"] < 60


def test_too_small_a_disk_is_refused_before_anything_is_written(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda path: SimpleNamespace(free=29_999))
    with pytest.raises(SystemExit, match=r"100 documents need .* set TMPDIR"):
        scale.write_input(tmp_path / "texts.jsonl", 100, 2)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    scale.write_input(tmp_path / "texts.jsonl", 100, 2)
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 100


def test_lengths_count_attention_as_forward_flop_does(scale, tmp_path):
    model = scale.LLM2Vec.from_pretrained(scale.tiny_model(tmp_path), device="cpu", dtype="float32")
    found = scale.one_length(model, length=256, tokens=512, rounds=1)
    body = 64 * (4 * 64 + 3 * 128)  # one layer: q, k, v, o and gate, up, down
    assert found["attention_of_flop"] == pytest.approx(4 * 64 * 256 / (4 * 64 * 256 + 2 * body))
    assert 0 < found["attention_of_time"] < 1
    assert found["texts"] == 2 and found["tokens_per_s"] > 0


def test_dimensions_come_to_the_bytes_of_the_vectors(scale, monkeypatch):
    monkeypatch.setattr(scale, "WIDTHS", (48, 128))
    monkeypatch.setattr(scale, "CUTS", (64, 128))
    (row,) = scale.dimensions(SimpleNamespace(documents=1024, rounds=1))
    assert [form["vector_bytes"] for form in row["forms"]] == [256, 512, 128, 256, 64, 128, 8, 16]
    for precision in ("float32", "float16", "int8"):
        assert row[precision]["per_vector_byte"] == pytest.approx(1, abs=0.05)
        assert 0 < row[precision]["beside"] < 100
    assert row["widths"][1]["bytes_per_document"] > row["widths"][0]["bytes_per_document"] + 150


def test_the_estimate_by_hand(scale, monkeypatch):
    monkeypatch.setattr(scale, "mean_tokens", lambda: 250.0)
    corpus = {
        "points": [{"input_bytes": 8e6, "tokens": 2e6, "skip_s": 0.008, "manifest_bytes": 900,
                    "stages": {"tokenise": 2.0}}],
        "resume_ms_per_shard": 0.5,
    }  # fmt: skip
    forms = {"float16": {"per_vector_byte": 1.01, "beside": 26.0}, "write_us_per_byte": 0.002}
    given = {"documents": 10**9, "tokens_per_s": 40_000, "dimension": 4096}
    one, eight = (scale.cost(corpus, forms, gpus=gpus, **given) for gpus in (1, 8))
    assert one["hours"] == pytest.approx(250e9 / 40_000 / 3600)
    assert eight["hours"] == pytest.approx(one["hours"] / 8)
    assert one["disk_tb"] == pytest.approx(8.29992 + 0.0)  # 1.01 * 8192 + 26 bytes each
    assert one["input_tb"] == pytest.approx(1.0)  # 4 bytes a token
    assert one["shards"] == 61_036 and eight["entries_of_directory"] == 61_036 + 9
    assert one["resume_s"] == pytest.approx(30.518)
    share = eight["share_of_time"]
    assert share["tokenising"] == pytest.approx(0.04)  # 1 us a token, 25 us on the GPU
    assert share["writing"] == pytest.approx(16.384 / 6250)  # us a document
    assert share["passing by others' input"] == pytest.approx(1000 / (6_250_000 / 8))
    assert one["share_of_time"]["passing by others' input"] == 0


def test_the_speed_of_a_gpu_by_hand(scale, monkeypatch):
    """Texts of one length: then it is the length's own work by `forward_flop`."""
    monkeypatch.setattr(scale, "SIGMA", 0.0)
    config = scale.ModelConfig.from_dict(scale.MODELS["Mistral-7B"])
    assert scale.mean_tokens() == 120
    expected = 120 * 1e15 / scale.forward_flop(config, [120])
    assert scale.gpu_speed(config, 1e15) == pytest.approx(expected)


def test_an_estimate_without_measurements_names_them(scale, monkeypatch):
    monkeypatch.setattr(scale, "read_rows", lambda: {"documents": {}})
    with pytest.raises(SystemExit, match=r"measure first.*dimensions"):
        next(scale.estimate(None))


def test_a_row_replaces_only_its_own(scale, tmp_path):
    scale.keep_row("documents", {"points": [1]}, tmp_path)
    scale.keep_row("lengths", {"points": [2]}, tmp_path)
    scale.keep_row("documents", {"points": [3]}, tmp_path)
    rows = scale.read_rows(tmp_path)
    assert {name: row["points"] for name, row in rows.items()} == {"documents": [3], "lengths": [2]}
    assert all(row["utc"] and row["machine"]["torch"] for row in rows.values())


def test_powers_end_with_the_most(scale):
    assert scale.powers(3, 10**5) == [1000, 10_000, 100_000]
    assert scale.powers(1, 250) == [10, 100, 250]
