"""The bulk job on tiny models: right rows, right vectors, resumable, and clear about bad input."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, run
from llm2vec_fast.corpus.plan import ManifestError
from llm2vec_fast.corpus.store import read_footer, read_shard, vectors_of

WORDS = "list dict set object int bytes str the of a new empty sequence returns value key".split()


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("corpus"), "llama"))


@pytest.fixture(scope="module")
def model(directory):
    return LLM2Vec.from_pretrained(directory, dtype="float32")


def lines(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]


def table_of(output):
    paths = sorted(output.glob("part-*.parquet"))
    tables = [read_shard(path) for path in paths]
    return paths, tables


def vectors(output, precision="float32", dimension=48):
    return np.concatenate([vectors_of(t, precision, dimension) for t in table_of(output)[1]])


def column(output, name):
    return [value for t in table_of(output)[1] for value in t.column(name).to_pylist()]


def test_txt_to_shards_and_back(model, tmp_path):
    texts = lines(25)
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(texts) + "\n")
    out = tmp_path / "out"
    summary = embed(source, model, out, precision="float32", rows_per_shard=10)
    paths, tables = table_of(out)
    assert [p.name for p in paths] == [f"part-00000-{n:06d}.parquet" for n in range(3)]
    assert [len(t) for t in tables] == [10, 10, 5]
    assert column(out, "id") == [f"{source}:{n}" for n in range(25)]
    expected = model.encode(texts, convert_to_numpy=True)
    np.testing.assert_allclose(vectors(out), expected, atol=1e-5)
    lengths = [len(t) for t in model.tokenizer(texts, [""] * 25)]
    assert column(out, "n_tokens") == lengths
    assert summary.documents == 25 and summary.tokens == sum(lengths)
    assert summary.statuses == {"ok": 25} and summary.reused == 0
    assert str(tables[0].schema.field("embedding").type) == "fixed_size_list<item: float>[48]" or (
        tables[0].schema.field("embedding").type.list_size == 48
    )


def test_several_inputs_jsonl_ids_and_kept_columns(model, tmp_path):
    texts = lines(5)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.txt"
    records = [
        {"body": text, "key": n, "lang": "en", "tags": ["x", n]} for n, text in enumerate(texts)
    ]
    first.write_text("".join(json.dumps(r) + "\n" for r in records))
    second.write_text(texts[0])  # no newline at the end
    out = tmp_path / "out"
    embed(
        [first, second], model, out, text_column="body", id_column="key", keep=["lang", "tags"],
        precision="float32", instruction="find keys", normalize=True, truncate_dim=16,
    )  # fmt: skip
    assert column(out, "id") == ["0", "1", "2", "3", "4", f"{second}:0"]
    assert column(out, "lang") == ["en"] * 5 + [None]
    assert column(out, "tags")[1] == '["x", 1]'
    expected = model.encode(
        [*texts, texts[0]], instruction="find keys", normalize=True, truncate_dim=16
    )
    np.testing.assert_allclose(vectors(out, dimension=16), expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["float16", "float32", "int8", "binary"])
def test_precisions(model, tmp_path, precision):
    texts = lines(6)
    source = tmp_path / "t.txt"
    source.write_text("\n".join(texts))
    embed(source, model, tmp_path / "out", precision=precision)
    raw = model.encode(texts, convert_to_numpy=True)
    got = vectors(tmp_path / "out", precision)
    if precision == "binary":
        np.testing.assert_array_equal(got > 0, raw > 0)
    elif precision == "int8":
        scale = np.array(column(tmp_path / "out", "scale"))[:, None]
        np.testing.assert_allclose(got * scale, raw, atol=float(scale.max()))
    else:
        np.testing.assert_allclose(got, raw, rtol=2e-3, atol=2e-3)


def test_a_profile_is_kept_and_printed_where_asked_for(model, tmp_path, monkeypatch, capsys):
    source, prepare = tmp_path / "t.txt", run.prepare

    def slowly(*given):
        time.sleep(0.1)
        return prepare(*given)

    source.write_text("\n".join(lines(30)))
    model.encode(["the first pass takes longer"])
    monkeypatch.setattr(run, "prepare", slowly)
    embed(source, model, tmp_path / "quiet", rows_per_shard=5, show_progress=False)
    assert capsys.readouterr().err == ""
    kept = json.loads((tmp_path / "quiet" / "summary-00000.json").read_text())["profile"]
    assert kept["jobs"] == 6 and set(kept["stages"]) == {"read", "tokenise", "forward", "write"}
    assert kept["limit"].startswith("tokenising is busy ")
    assert kept["stages"]["forward"]["waiting"]["input"] > 0.3
    summary = embed(
        source, model, tmp_path / "out", rows_per_shard=5, show_progress=False, profile=True
    )
    told = capsys.readouterr().err
    assert "6 jobs in" in told and " ".join(told.split()).endswith(summary.profile.limit)


def test_a_gpus_time_is_measured_by_its_own_clock(model, tmp_path, monkeypatch):
    """With marks that stand for a GPU's events: each job takes it 50 ms, waited for by the writer
    before it stores.
    """
    happened = []

    class Mark:
        def synchronize(self):
            happened.append("waited")
            time.sleep(0.05)

        def elapsed_time(self, end):
            assert end is not self and happened[-1] == "waited"
            return 50.0

    store = run.store
    monkeypatch.setattr(run, "_mark", lambda device: Mark())
    monkeypatch.setattr(run, "store", lambda *given: happened.append("stored") or store(*given))
    source = tmp_path / "t.txt"
    source.write_text("\n".join(lines(30)))
    summary = embed(source, model, tmp_path / "out", rows_per_shard=5, show_progress=False)
    stages = summary.profile.stages
    assert stages["gpu"].seconds == pytest.approx(0.3) == summary.stages["gpu"]
    assert stages["write"].waiting["the GPU"] * summary.seconds > 0.29
    assert stages["write"].seconds < summary.seconds - 0.29
    assert happened == ["waited", "stored"] * 6


def test_statuses_of_rows_that_are_not_plain_text(model, tmp_path):
    good = lines(3)
    rows = [
        json.dumps({"text": good[0]}).encode(),
        b'{"text": null}',
        b"{not json",
        b'["a list"]',
        b'{"other": "field"}',
        b'{"text": "broken \xff"}',
        b"",
        json.dumps({"text": " \t"}).encode(),
        json.dumps({"text": "a lone \ud800 surrogate"}).encode(),
        json.dumps({"text": "dict " * 900}).encode(),
        json.dumps({"text": "nul \x00 rtl \u202e joiner \u200d"}).encode(),
        json.dumps({"text": good[1]}).encode(),
    ]
    source = tmp_path / "mixed.jsonl"
    source.write_bytes(b"\n".join(rows) + b"\n")
    with pytest.raises(ValueError, match=r"row 1 of .*mixed\.jsonl: .*not text.*--on-error skip"):
        embed(source, model, tmp_path / "raised")
    out = tmp_path / "out"
    summary = embed(source, model, out, precision="float32", on_error="skip")
    statuses = column(out, "status")
    assert statuses == [
        "ok", "error", "error", "error", "error", "error", "empty", "empty", "ok", "truncated",
        "ok", "ok",
    ]  # fmt: skip
    notes = column(out, "note")
    for row, told in ((1, "None"), (2, "JSON"), (3, "list"), (4, "'text'"), (5, "UTF-8")):
        assert told in notes[row]
    embeddings = column(out, "embedding")
    assert [e is None for e in embeddings] == [s == "error" for s in statuses]
    assert not any(embeddings[6]) and not any(embeddings[7])
    # neighbours are untouched
    expected = model.encode([good[0], good[1]], convert_to_numpy=True)
    np.testing.assert_allclose(np.array([embeddings[0], embeddings[11]]), expected, atol=1e-5)
    assert np.isfinite(vectors(out)).all()
    assert summary.statuses == {"ok": 4, "error": 5, "empty": 2, "truncated": 1}


def test_a_vector_that_is_not_finite_is_never_written_as_ok(directory, tmp_path):
    import torch

    model = LLM2Vec.from_pretrained(directory, dtype="float32")
    bad = int(model.tokenizer.ids_of("key")[0])
    with torch.no_grad():
        model.model.embed.weight[bad] = float("nan")
    source = tmp_path / "t.txt"
    source.write_text("a list\nkey\nthe set\n")
    with pytest.raises(ValueError, match=r"row 1 .*not finite"):
        embed(source, model, tmp_path / "raised")
    embed(source, model, tmp_path / "out", on_error="skip")
    assert column(tmp_path / "out", "status") == ["ok", "error", "ok"]
    assert column(tmp_path / "out", "embedding")[1] is None


def test_resume_redoes_only_what_has_no_valid_shard(model, tmp_path, monkeypatch):
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("\n".join(lines(40)))
    embed(source, model, out, rows_per_shard=10, precision="float32")
    paths, _ = table_of(out)
    before = {path.name: path.read_bytes() for path in paths}
    paths[1].unlink()
    paths[2].write_bytes(before[paths[2].name][:-20])  # cut short
    left = out / f"part-00000-000001.parquet.{platform.node()}-999999999.partial"
    left.write_bytes(b"what a killed writer left")
    stamps = {p.name: p.stat().st_mtime_ns for p in (paths[0], paths[3])}
    summary = embed(source, model, out, rows_per_shard=10, precision="float32")
    assert (summary.documents, summary.reused) == (20, 20)
    assert {p.name: p.stat().st_mtime_ns for p in (paths[0], paths[3])} == stamps
    assert {path.name: path.read_bytes() for path in paths} == before  # bitwise the same
    assert not list(out.glob("*.partial"))
    again = embed(source, model, out, rows_per_shard=10, precision="float32")
    assert (again.documents, again.reused) == (0, 40)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precision": "int8"}, "vectors.precision"),
        ({"normalize": True}, "vectors.normalize"),
        ({"instruction": "other"}, "vectors.instruction"),
        ({"rows_per_shard": 7}, "rows_per_shard"),
        ({"tokens_per_batch": 77}, "tokens_per_batch"),
        ({"keep": ["x"]}, "columns.keep"),
    ],
)
def test_resuming_as_another_job_is_refused(model, tmp_path, change, told):
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("\n".join(lines(5)))
    embed(source, model, out)
    with pytest.raises(ManifestError, match=told):
        embed(source, model, out, **change)


def test_resuming_with_another_model_or_input_is_refused(model, directory, tmp_path):
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("\n".join(lines(5)))
    embed(source, model, out)
    other = LLM2Vec.from_pretrained(directory, pooling_mode="last_token", dtype="float32")
    with pytest.raises(ManifestError, match="pooling_mode"):
        embed(source, other, out)
    with pytest.raises(ManifestError, match="dtype"):
        embed(source, LLM2Vec.from_pretrained(directory, dtype="bfloat16"), out)
    source.write_text("\n".join(lines(6)))
    with pytest.raises(ManifestError, match=r"inputs\[0\]\.size"):
        embed(source, model, out)


def test_the_fingerprint_sees_changed_weights(tiny_model, add_tokenizer, tmp_path):
    path = add_tokenizer(tiny_model(tmp_path, "llama"))
    before = LLM2Vec.from_pretrained(path).describe()
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    assert LLM2Vec.from_pretrained(path).describe()["fingerprint"] != before["fingerprint"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: p / "absent.txt", "absent"),
        (lambda p: p, "names no files"),
        (lambda p: (p / "x.csv").write_text("a") and p / "x.csv", r"x\.csv has no column 'text'"),
        (lambda p: (p / "x.doc").write_text("a") and p / "x.doc", "only .txt"),
    ],
)
def test_inputs_that_cannot_be_read(model, tmp_path, make, told):
    with pytest.raises(ValueError, match=told):
        embed(make(tmp_path), model, tmp_path / "out")


def test_an_empty_file_gives_no_shards(model, tmp_path):
    (tmp_path / "t.txt").write_text("")
    assert embed(tmp_path / "t.txt", model, tmp_path / "out").documents == 0
    assert not list((tmp_path / "out").glob("part-*"))


def test_shards_without_a_manifest_are_refused(model, tmp_path):
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("a list")
    embed(source, model, out)
    (out / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"no manifest\.json"):
        embed(source, model, out)


def test_footer_and_file_format(model, tmp_path):
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("\n".join(lines(5)))
    embed(source, model, out)
    path = out / "part-00000-000000.parquet"
    footer = read_footer(path)
    assert (footer.first_row, footer.rows) == (0, 5)
    assert (footer.start_offset, footer.end_offset) == (0, source.stat().st_size)
    assert read_footer(source) is None and read_footer(out / "absent.parquet") is None
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF  # inside a page: the checksum must notice
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        read_shard(path)
    assert pq.read_schema(path).names == ["id", "embedding", "n_tokens", "status", "note"]


def test_killed_and_resumed_nothing_is_lost_or_doubled(directory, tmp_path):
    """SIGKILL in the middle of the command, three times; then the same command once more."""
    texts = lines(400, seed=1)
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("\n".join(texts))

    def command(output) -> list[str]:
        return [
            sys.executable, "-m", "llm2vec_fast", "embed", str(source), "--model", str(directory),
            "--output", str(output), "--rows-per-shard", "20", "--tokens-per-batch", "64",
            "--precision", "float32",
        ]  # fmt: skip

    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for shards in (1, 5, 9):
        process = subprocess.Popen(command(out), env=env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240  # a second where nothing else runs
        while len(list(out.glob("part-*.parquet"))) < shards and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(out), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert column(out, "id") == [f"{source}:{n}" for n in range(400)]
    fresh = tmp_path / "fresh"
    subprocess.run(command(fresh), env=env, check=True)
    np.testing.assert_array_equal(vectors(out), vectors(fresh))
