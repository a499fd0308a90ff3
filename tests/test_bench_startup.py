"""The benchmark of start-up compares like with like, and its stages are the whole."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import _startup_worker

    return _startup_worker


@pytest.fixture
def bench(worker):
    from benchmarks import bench_startup

    return bench_startup


@pytest.fixture
def spec(tmp_path, tiny_model, add_tokenizer) -> dict:
    directory = add_tokenizer(tiny_model(tmp_path, "llama"))
    return {
        "name": "tiny", "model": str(directory), "adapters": [], "device": "cpu",
        "dtype": "float32", "calls": 3, "began": time.time(),
    }  # fmt: skip


def test_both_rivals_start_to_the_same_vector(spec, worker, bench):
    mine = worker.work(spec | {"rival": worker.OURS})
    theirs = worker.work(spec | {"rival": worker.STOCK})
    assert bench.distance(mine["vector"], theirs["vector"]) < 1e-6
    for found in (mine, theirs):
        stages = found["stages"]
        assert {"imports", "config", "tokenizer", "weights", "first vector"} < stages.keys()
        assert all(seconds >= 0 for seconds in stages.values())
        assert sum(stages.values()) == pytest.approx(found["seconds"])
    assert {"merge", "check"} < mine["stages"].keys()


def test_random_weights_load_in_both(spec, worker, bench, tmp_path, monkeypatch):
    words = " ".join(worker.WORDS)
    monkeypatch.setattr(bench, "real_texts", lambda count: [words, "def words(): return 8"])
    args = ("small", bench.MODELS["tiny"], tmp_path, "cpu", "float32")
    spec["model"] = str(bench.random_model(*args))
    mine, theirs = (worker.work(spec | {"rival": rival}) for rival in (worker.OURS, worker.STOCK))
    assert bench.distance(mine["vector"], theirs["vector"]) < 1e-6
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="small takes"):
        bench.random_model(*args)


def test_latency_is_of_queries_of_so_many_tokens(spec, worker, bench):
    found = worker.work(spec | {"rival": "latency"})
    assert list(found) == [str(n) for n in worker.QUERY_TOKENS]
    for told in found.values():
        assert [len(ms) for ms in told["ms"].values()] == [3, 3]
        assert bench.distance(*told["vectors"].values()) < 1e-6


def test_a_text_of_so_many_tokens(worker):
    def letters(text: str) -> int:  # words that are too long are passed over
        return len(text.replace(" ", ""))

    for tokens in (3, 8, 32, 100):
        assert letters(worker.text_of(tokens, letters)) == tokens
    with pytest.raises(ValueError, match="no text of 3 tokens"):
        worker.text_of(3, lambda text: 2 * len(text))


def test_rounds_are_told_apart_and_a_failure_is_a_row(spec, bench, monkeypatch):
    """The first round warms up; what was measured before a failure stays."""
    starts = {bench.OURS: 0, bench.STOCK: 0}

    def ask(spec, rival, minutes, **more):
        if rival == "latency":
            raise RuntimeError("latency: no more memory")
        starts[rival] += 1
        seconds = 99.0 if starts[rival] == 1 else {bench.OURS: 2.0, bench.STOCK: 8.0}[rival]
        return {"seconds": seconds, "stages": {"weights": seconds}, "vector": [1.0, 2.0]}

    monkeypatch.setattr(bench, "ask", ask)
    kept: list[list[dict]] = []
    chosen = SimpleNamespace(rounds=2, calls=3)
    until = time.perf_counter() + 60
    rows = bench.measure(spec, lambda: Path(spec["model"]), chosen, until, kept.append)
    ours, stock, failed = rows
    assert (ours["seconds"], ours["rounds"], stock["ours_is_faster"]) == (2.0, 2, 4.0)
    assert stock["1-cos"] == pytest.approx(0, abs=1e-12)
    assert failed["failed"] == "latency: no more memory"
    assert kept[-1] == rows and len(kept) == 3
    assert all(bench.line(row) for row in rows)


def test_percentiles_of_calls(spec, bench, monkeypatch):
    times = {bench.OURS: [float(n) for n in range(200, 0, -1)], bench.STOCK: [3.0] * 200}
    told = {"8": {"ms": times, "vectors": {bench.OURS: [1.0], bench.STOCK: [2.0]}}}
    monkeypatch.setattr(bench, "ask", lambda *args, **more: told)
    ours, stock = bench.latency_rows(spec, 200, time.perf_counter() + 60)
    assert (ours["ms"], ours["p20"], ours["p80"], ours["p99"]) == (100.5, 41.0, 161.0, 199.0)
    assert (stock["p99"], stock["tokens"], stock["calls"]) == (3.0, 8, 200)
