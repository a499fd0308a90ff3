"""Outputs behind a URL: the shards of a local run, found, resumed, verified and searched there."""

from __future__ import annotations

import sys

import fsspec
import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search, verify
from llm2vec_fast.corpus.atomic import StoreError
from llm2vec_fast.corpus.place import is_remote, place_of
from llm2vec_fast.corpus.plan import ManifestError, read_manifest

pytest.importorskip("upath")
TEXTS = [f"{'list of values ' * (n % 7)}number {n}" for n in range(45)]
URL = "memory://bucket/vectors"


@pytest.fixture(scope="module")
def model(tiny_model, add_tokenizer, tmp_path_factory):
    directory = add_tokenizer(tiny_model(tmp_path_factory.mktemp("place"), "llama"))
    return LLM2Vec.from_pretrained(directory, dtype="float32")


@pytest.fixture
def store():
    """The names and bytes behind `URL`; empty before."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield lambda: {
        name.rpartition("/")[2]: memory.cat_file(name) for name in memory.find("/bucket/vectors")
    }
    memory.store.clear()


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture
def run(model):
    """run(inputs, output, **options) -> Summary, ten rows a shard"""

    def call(inputs, output, **options):
        options = {"rows_per_shard": 10, "precision": "float32", "show_progress": False} | options
        return embed(inputs, model, output, **options)

    return call


def shards(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if name.startswith("part-")}


@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_a_job_behind_a_url(run, model, lines, store, tmp_path, output_format):
    local = run(lines, tmp_path / "local", output_format=output_format)
    summary = run(lines, URL, output_format=output_format)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "local").glob("part-*")}
    assert shards(store()) == expected
    assert set(store()) - set(expected) == {"manifest.json", "summary-00000.json"}
    assert (summary.documents, summary.bytes) == (45, local.bytes)
    assert verify(URL) == []
    query = ["list of values number 8"]
    assert search(URL, query, k=3, model=model) == search(
        tmp_path / "local", query, k=3, model=model
    )
    place = place_of(URL)
    (place / "part-00000-000001.parquet").unlink()
    torn = place / "part-00000-000003.parquet"
    torn.write_bytes(torn.read_bytes()[:-9])
    assert {path.name for path, _ in verify(URL)} == {
        "part-00000-000001.parquet", torn.name
    }  # fmt: skip
    again = run(lines, URL, output_format=output_format)
    assert (again.documents, again.reused) == (20, 25)
    assert shards(store()) == expected


def test_another_job_and_new_inputs(run, lines, store, tmp_path):
    run(lines, URL)
    before = store()
    with pytest.raises(ManifestError, match="normalize: False there, True now"):
        run(lines, URL, normalize=True)
    assert store() == before
    more = tmp_path / "u.txt"
    more.write_text("\n".join(TEXTS[:5]))
    assert run([lines, more], URL, append=True).documents == 5
    assert len(read_manifest(place_of(URL))["inputs"]) == 2
    assert shards(before).items() < shards(store()).items()


def test_a_put_that_fails(run, lines, store, monkeypatch):
    """Nothing of the shard is there, and the same command goes on."""
    memory = type(fsspec.filesystem("memory"))
    put = memory.pipe_file

    def fails(self, path, *given, **options):
        if path.endswith("part-00000-000002.parquet"):
            raise OSError("no more room")
        return put(self, path, *given, **options)

    monkeypatch.setattr(memory, "pipe_file", fails)
    with pytest.raises(StoreError, match=r"memory://.*000002.*no more room.*same command goes on"):
        run(lines, URL)
    assert "part-00000-000002.parquet" not in store()
    monkeypatch.undo()
    summary = run(lines, URL)
    assert summary.documents + summary.reused == 45 and summary.reused >= 20


def test_a_file_url_is_a_directory(run, lines, tmp_path):
    run(lines, f"file://{tmp_path}/out")
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 5
    assert not is_remote(place_of(f"file://{tmp_path}/out"))


def test_what_is_refused(run, lines, store, monkeypatch):
    with pytest.raises(ValueError, match="the output must be a directory, not a URL"):
        run(lines, URL, unique_ids=True, id_column="x")
    with pytest.raises(ValueError, match=r"output nope://x: .*pip install 'llm2vec-fast\[remote\]"):
        run(lines, "nope://x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "upath", None)
        with pytest.raises(ValueError, match=r"pip install 'llm2vec-fast\[remote\]'"):
            run(lines, URL)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="use --ray"):
        run(lines, URL)
    assert store() == {}
