"""The bulk job on Ray: the bytes of a local run, also when workers or the driver are killed.

One small cluster for all tests. Every worker is a process that imports torch, some seconds each.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from llm2vec_fast import LLM2Vec
from llm2vec_fast.cli import app
from llm2vec_fast.corpus import embed, verify
from llm2vec_fast.corpus import ray as module
from llm2vec_fast.corpus.ids import DuplicateIdError
from llm2vec_fast.corpus.ray import Cluster, Embedder, Worker

TEXTS = [f"{'list of values ' * (n % 7)}number {n}" for n in range(45)]
ONE = Cluster(num_workers=1)
OPTIONS = {
    "rows_per_shard": 10, "precision": "float32", "tokens_per_batch": 64, "dtype": "float32",
    "show_progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("ray"), "llama"))


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex)  # or Ray puts one into the home directory
    ray.init(
        "local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
        object_store_memory=200 << 20,
    )  # fmt: skip
    yield ray
    ray.shutdown()
    patch.undo()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(directory, tmp_path):
    """run(inputs, output, **options) -> Summary"""

    def call(inputs, output, **options):
        return embed(inputs, directory, tmp_path / output, **OPTIONS | options)

    return call


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def shards(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


def everything(place) -> list[str]:
    """Inputs of all kinds, with ends that are told apart; names relative to `place`."""
    records = [{"key": f"key {n}", "text": text} for n, text in enumerate(TEXTS)]
    as_lines = "\n".join(json.dumps(record) for record in records)
    (place / "a.jsonl").write_text(as_lines)
    (place / "b.csv").write_text("text,key\n" + "".join(f'"{t}\nx",{t}\n' for t in TEXTS[:20]))
    pq.write_table(pa.Table.from_pylist(records), place / "c.parquet")
    with gzip.open(place / "d.jsonl.gz", "wt") as file:
        file.write(as_lines.replace("key ", "other "))
    (place / "e.txt").write_text("\n".join(TEXTS) + "\n\n")
    return ["a.jsonl", "b.csv", "c.parquet", "d.jsonl.gz", "e.txt"]


def test_the_bytes_of_a_local_run(ray, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = everything(tmp_path)
    local = run(inputs, "local", id_column="key", output_format="npy")
    summary = run(
        inputs, "far", id_column="key", output_format="npy", cluster=Cluster(num_workers=2)
    )
    found = shards(tmp_path / "far")
    assert len(found) == 2 * (5 + 2 + 5 + 5 + 5) and found == shards(tmp_path / "local")
    assert verify(tmp_path / "far") == []
    assert not (tmp_path / "far" / ".locks").exists()
    for name in ("documents", "tokens", "statuses", "reused", "bytes"):
        assert getattr(summary, name) == getattr(local, name), name
    told = json.loads((tmp_path / "far" / "summary-00000.json").read_text())
    assert told["documents"] == summary.documents == 4 * 45 + 20 + 1
    gone = tmp_path / "far" / "part-00003-000002.parquet"
    gone.unlink()
    again = run(inputs, "far", id_column="key", output_format="npy", unique_ids=False, cluster=ONE)
    assert (again.documents, again.reused) == (10, 191)
    assert shards(tmp_path / "far") == found


def mortal(log, shard: str, when: str):
    """A worker that dies once at a shard, or each time."""

    class Mortal(Worker):
        def run(self, work, options):
            with open(log, "a+") as file:
                file.seek(0)
                known = file.read().count(work.job.shard)
                file.write(f"{work.job.shard}\n")
            dies = work.job.shard == shard and (when == "always" or not known)
            if dies and when != "stored":
                os.kill(os.getpid(), signal.SIGKILL)
            footer = super().run(work, options)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return footer

    return Mortal


@pytest.mark.parametrize("when", ["given", "stored"])
def test_a_worker_that_dies(ray, run, lines, tmp_path, monkeypatch, when):
    """Before its job, and between the shard and the driver's knowing of it."""
    log, shard = tmp_path / "log", "part-00000-000002.parquet"
    monkeypatch.setattr(module, "Worker", mortal(log, shard, when))
    summary = run(lines, "far", cluster=ONE)
    done = log.read_text().split()
    assert done.count(shard) == 2, "it was not done again"
    run(lines, "local")
    assert shards(tmp_path / "far") == shards(tmp_path / "local")
    assert summary.documents == 45 and not list((tmp_path / "far").glob("*.partial"))


def test_a_job_that_kills_its_worker(ray, run, lines, tmp_path, monkeypatch):
    log, shard = tmp_path / "log", "part-00000-000002.parquet"
    monkeypatch.setattr(module, "Worker", mortal(log, shard, "always"))
    monkeypatch.setattr(module, "RETRIES", 1)
    with pytest.raises(RuntimeError, match=r"worker died doing rows \d+ to \d+ of .*t\.txt"):
        run(lines, "far", cluster=ONE)
    assert log.read_text().split().count(shard) == 2
    monkeypatch.undo()
    assert run(lines, "far").reused >= 10
    run(lines, "local")
    assert shards(tmp_path / "far") == shards(tmp_path / "local")


def test_the_driver_is_killed(ray, run, directory, tmp_path):
    """By the command line: once it may say so, once it may not."""
    source, far = tmp_path / "t.jsonl", tmp_path / "far"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 40))
    command = [
        sys.executable, "-m", "llm2vec_fast", "embed", str(source), "--model", str(directory),
        "--output", str(far), "--rows-per-shard", "5", "--precision", "float32", "--dtype",
        "float32", "--tokens-per-batch", "64", "--ray", "--num-workers", "1",
        "--address", ray.get_runtime_context().gcs_address,
    ]  # fmt: skip
    done = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while len(list(far.glob("part-*.parquet"))) < done + 5:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.send_signal(number)
        assert process.wait(30) == code
        assert ("the same command resumes" in process.stderr.read()) == (code == 143)
        done = len(list(far.glob("part-*.parquet")))
    assert done < 360, "it was over before it was killed"
    resumed = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert summary["documents"] + summary["reused"] == 1800 and summary["reused"] >= 50
    run(source, "local", rows_per_shard=5)
    assert shards(far) == shards(tmp_path / "local")
    assert verify(far) == [] and not list(far.glob("*.partial"))


def test_errors_are_those_of_a_local_run(ray, run, lines, directory, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good", "key": 1}\n{"text": null, "key": 1}\n')
    with pytest.raises(ValueError, match=r"row 1 of .*bad\.jsonl: .*not text.*--on-error skip"):
        run(bad, "bad", cluster=ONE)
    bad.write_text('{"text": "good", "key": 1}\n{"text": "good", "key": 1}\n')
    with pytest.raises(DuplicateIdError, match="has the id '1' of row 0"):
        run(bad, "ids", cluster=ONE, id_column="key", unique_ids=True)
    with pytest.raises(ValueError, match="truncate_dim must be 1 to 48"):
        run(lines, "form", cluster=ONE, truncate_dim=100)
    with pytest.raises(ValueError, match="absent"):
        embed(lines, tmp_path / "absent", tmp_path / "out", cluster=ONE)
    with pytest.raises(ValueError, match="has 0 GPUs, and a worker was to have 1"):
        run(lines, "gpu", cluster=Cluster(num_gpus_per_worker=1))
    with pytest.raises(ValueError, match="use a directory that all machines share"):
        embed(lines, directory, "memory://own", cluster=ONE)  # each process has a memory of its own
    with pytest.raises(ValueError, match="connected to Ray already"):
        run(lines, "other", cluster=Cluster("127.0.0.1:1"))
    assert [path.name for path in tmp_path.glob("*/part-*")] == []


def test_what_is_refused_without_ray(run, lines, directory, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="give its directory or name"):
        embed(lines, LLM2Vec.from_pretrained(directory), tmp_path / "out", cluster=ONE)
    with pytest.raises(ValueError, match="--profile looks at the stages of one process"):
        run(lines, "out", cluster=ONE, profile=True)
    given = ["embed", str(lines), "--model", str(directory), "--output", str(tmp_path / "out")]
    told = CliRunner().invoke(app, [*given, "--num-workers", "2"])
    assert "--num-gpus-per-worker and --num-workers belong to --ray" in str(told.exception)
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        Cluster(num_workers=0)
    with pytest.raises(ValueError, match="num_gpus_per_worker must be 0 or more"):
        Cluster(num_gpus_per_worker=-1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"pip install 'llm2vec-fast\[ray\]'"):
        run(lines, "out", cluster=ONE)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        run(lines, "out", cluster=ONE)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_shared(directory, lines, tmp_path):
    worker = Worker(str(directory), [], {}, tmp_path / "elsewhere", tmp_path / "not here")
    with pytest.raises(ValueError, match="use a directory that all machines share"):
        worker.run(None, None)


def test_the_embedder_in_anybodys_map_batches(ray, directory):
    data = ray.data.from_items([{"text": text, "n": n} for n, text in enumerate(TEXTS)])
    made = data.map_batches(
        Embedder,
        fn_constructor_kwargs={"model": str(directory), "loading": {"dtype": "float32"}},
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=8,
        batch_format="numpy",
    ).take_all()
    expected = LLM2Vec.from_pretrained(directory, dtype="float32").encode(TEXTS)
    assert sorted(row["n"] for row in made) == list(range(45))
    for row in made:
        assert row["text"] == TEXTS[row["n"]]
        np.testing.assert_allclose(row["embedding"], expected[row["n"]], atol=1e-5)


def test_the_embedder_by_itself(directory):
    texts = np.array(TEXTS[:3])
    texts.setflags(write=False)
    plain = Embedder(directory, normalize=True, truncate_dim=16, loading={"dtype": "float32"})
    given = {"text": texts, "n": np.arange(3)}
    found = plain(given)
    assert set(given) == {"text", "n"} and list(found) == ["text", "n", "embedding"]
    np.testing.assert_allclose(np.linalg.norm(found["embedding"], axis=1), 1, atol=1e-6)
    coded = Embedder(
        directory, text_column="n", output_column="v", precision="int8", normalize=True,
        truncate_dim=16, loading={"dtype": "float32"},
    )({"n": texts})  # fmt: skip
    assert coded["v"].dtype == np.int8
    np.testing.assert_allclose(
        coded["v"] * coded["scale"][:, None], found["embedding"], atol=float(coded["scale"].max())
    )
    with pytest.raises(ValueError, match="no column 'text', it has 'other'"):
        plain({"other": texts})
    with pytest.raises(ValueError, match='list: use batch_format="numpy"'):
        plain([1])
    with pytest.raises(ValueError, match="row 1 is not a text"):
        plain({"text": np.array(["a", None], dtype=object)})
    with pytest.raises(ValueError, match="truncate_dim must be 1 to 48"):
        Embedder(directory, truncate_dim=100)
