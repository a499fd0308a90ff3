"""Faults of a bulk job, whole: what is stored, refused, and resumed.

Where each of the 29 faults is tested; `soak` is a row of benchmarks/soak.py (`make soak`):

 1 no texts            test_no_texts here; test_vectors::test_no_rows; an empty file:
                       test_run::test_an_empty_file_gives_no_shards
 2 empty texts         test_encoder::test_an_empty_text_is_the_zero_vector_and_disturbs_nobody,
                       test_run::test_statuses_of_rows_that_are_not_plain_text
 3 no text             test_a_bad_row here; test_encoder::test_what_is_not_text_is_named,
                       test_run::test_statuses_of_rows_that_are_not_plain_text
 4 lone surrogates     test_worker::test_what_reading_changed_is_noted, test_read (rows, ids, kept),
                       test_tokenize::test_lone_surrogates_are_replaced
 5 invalid UTF-8       test_a_bad_row here; test_read
 6 odd characters      test_run::test_statuses_of_rows_that_are_not_plain_text,
                       test_tokenize::test_odd_characters_survive
 7 50 MB               test_a_document_of_50_mb here; test_read::test_a_line_of_50_mb,
                       test_tokenize::test_fifty_megabytes_take_bounded_time; without end:
                       test_security::test_a_document_that_unpacks_without_end_is_refused
 8 no spaces           test_documents_above_the_budget here;
                       test_tokenize::test_a_long_text_without_spaces_is_not_emptied
 9 special tokens      test_tokenize::test_special_tokens_in_a_text_are_plain_characters
10 long instruction    test_an_instruction_without_room here;
                       test_tokenize::test_an_instruction_without_room_for_text_is_refused
11 above the budget    test_documents_above_the_budget here; test_pack
12 out of memory       test_worker::test_out_of_memory_halves_the_batches and the two after it
13 not finite          test_checkpoint::test_weights_that_are_not_finite_are_refused_by_name,
                       test_run::test_a_vector_that_is_not_finite_is_never_written_as_ok
14 safetensors         test_checkpoint::test_malformed_files_are_refused_by_name;
                       fuzz/test_model_files::test_weights
15 index of shards     test_checkpoint (names, links); fuzz/test_model_files::test_index_of_shards
16 adapters            test_lora::test_weights_that_do_not_fit; fuzz/test_model_files (two tests)
17 config.json         test_config::test_hostile_configs_are_refused_by_file...; test_security;
                       fuzz/test_model_files::test_config, test_tokenizer, test_other_settings
18 killed              test_kill; soak: one process, torchrun, Ray
19 killed in between   test_kill; test_shards_of_another_place here;
                       test_store::test_npy_alone_is_not_finished
20 damaged shards      test_shards_of_another_place here; test_store, test_verify,
                       test_walk::test_verify_redoes_what_is_damaged,
                       test_run::test_resume_redoes_only_what_has_no_valid_shard;
                       fuzz/test_outputs; soak: truncated shard, flipped bit
21 another job         test_another_model here; test_plan,
                       test_run::test_resuming_as_another_job_is_refused and the two after it
22 full or read-only   test_a_disk_that_fills_up, test_a_directory_that_cannot_be_written here;
                       test_cli::test_a_full_disk_ends_it_cleanly, test_store, test_ids;
                       soak: a small tmpfs
23 two writers         test_cli::test_a_second_writer_is_refused, test_walk, test_lock
24 a worker killed     soak: torchrun, Ray; tests/test_soak
25 signals             test_cli::test_signals_end_it_cleanly_and_the_same_command_resumes,
                       test_pipeline::test_an_interrupt_still_stores_what_is_computed
26 duplicate ids       test_duplicate_ids here; test_walk::test_unique_ids_over_inputs_and_runs,
                       test_ids; killed in between: test_kill
27 memory flat         soak: the long run; benchmarks/bench_scale.py
28 training killed     tests/train/test_kill
29 NaN loss            tests/train/test_loop::test_a_loss_that_is_not_finite
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed, search
from llm2vec_fast.corpus.ids import DuplicateIdError
from llm2vec_fast.corpus.plan import ManifestError
from llm2vec_fast.corpus.store import read_shard

TEXTS = [f"{'list of values ' * (n % 5)}number {n}" for n in range(40)]
GOOD = "a list of numbers", "the keys of a dict"


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("faults"), "llama"))


@pytest.fixture(scope="module")
def model(directory):
    return LLM2Vec.from_pretrained(directory, dtype="float32")


@pytest.fixture
def run(model, tmp_path):
    """run(input, output="out", **options) -> Summary, ten rows a shard"""

    def call(inputs, output="out", *, model=model, **options):
        options = {"rows_per_shard": 10, "precision": "float32", "show_progress": False} | options
        return embed(inputs, model, tmp_path / output, **options)

    return call


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def rows_of(output: Path) -> list[dict]:
    paths = sorted(output.glob("part-*.parquet"))
    return [row for path in paths for row in read_shard(path).to_pylist()]


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


# --- bad rows ---


@pytest.mark.parametrize(
    ("precision", "dtype", "width"),
    [("float32", "float32", 48), ("float16", "float16", 48), ("int8", "int8", 48),
     ("binary", "uint8", 6)],
)  # fmt: skip
def test_no_texts(model, precision, dtype, width):
    got = model.encode([], precision=precision, convert_to_numpy=True)
    assert (got.shape, got.dtype) == ((0, width), dtype)
    cut = model.encode([], precision=precision, truncate_dim=16, normalize=True)
    assert cut.shape == (0, width // 3)


def files(path: Path, bad: bytes) -> None:
    path.mkdir()
    for n, data in enumerate((GOOD[0].encode(), bad, GOOD[1].encode())):
        (path / f"{n}.md").write_bytes(data)


def records(path: Path, bad: str) -> None:
    first, last = (json.dumps({"text": text}) for text in GOOD)
    path.write_text(f"{first}\n{bad}\n{last}\n")


def table(path: Path, kind: pa.DataType, bad) -> None:
    texts = [GOOD[0].encode(), bad, GOOD[1].encode()]
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary()).cast(kind)}), path)


@pytest.mark.parametrize(
    ("name", "write", "told"),
    [
        ("t.txt", lambda p: p.write_bytes(b"%b\n\xff\xfe\n%b" % encoded()), "UTF-8"),
        ("t.csv", lambda p: p.write_bytes(b"text\n%b\nbad \xff\n%b\n" % encoded()), "UTF-8"),
        ("t.jsonl", lambda p: records(p, '{"text": null}'), "None"),
        ("t.jsonl", lambda p: records(p, '{"text": NaN}'), "nan, not text"),
        ("t.jsonl", lambda p: records(p, '{"text": ["a", "b"]}'), "not text"),
        ("t.parquet", lambda p: table(p, pa.string(), None), "None"),
        ("t.parquet", lambda p: table(p, pa.binary(), b"\xff"), "UTF-8"),
        ("docs", lambda p: files(p, b"\xff"), "UTF-8"),
    ],
)
def test_a_bad_row(model, run, tmp_path, name, write, told):
    """Named and refused; or, with errors skipped, a null vector that nothing else notices."""
    path, whole = tmp_path / name, name == "docs"
    write(path)
    with pytest.raises(ValueError, match=f"row 1 of .*{name}.*{told}.*--on-error skip"):
        run(path, "raised", whole_files=whole)
    assert not shards(tmp_path / "raised")
    summary = run(path, whole_files=whole, on_error="skip")
    rows = rows_of(tmp_path / "out")
    assert summary.statuses == {"ok": 2, "error": 1}
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert rows[1]["embedding"] is None and told in rows[1]["note"] and not rows[1]["n_tokens"]
    got = np.array([rows[0]["embedding"], rows[2]["embedding"]])
    expected = model.encode(list(GOOD), convert_to_numpy=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    (hits,) = search(tmp_path / "out", GOOD[0], model=model, k=3)
    assert len(hits) == 2 and run(path, whole_files=whole, on_error="skip").reused == 3


def encoded() -> tuple[bytes, bytes]:
    return GOOD[0].encode(), GOOD[1].encode()


# --- long texts ---


def peak_kb(field: str) -> int:
    told = Path("/proc/self/status").read_text()
    return int(told.split(f"{field}:")[1].split()[0])


def test_a_document_of_50_mb(model, run, tmp_path):
    """Bounded time and memory, and the vector of its beginning."""
    path, reset = tmp_path / "t.txt", Path("/proc/self/clear_refs")
    path.write_text(f"{GOOD[0]}\n{'list of values ' * 3_500_000}\n{GOOD[1]}\n")
    if reset.exists():
        reset.write_text("5")  # the peak of memory is counted anew
        before = peak_kb("VmRSS")
    began = time.perf_counter()
    run(path)
    assert time.perf_counter() - began < 5
    assert not reset.exists() or peak_kb("VmHWM") - before < 400_000
    rows = rows_of(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "truncated", "ok"]
    texts = [GOOD[0], "list of values " * 3_000, GOOD[1]]
    expected = model.encode(texts, convert_to_numpy=True)
    got = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_documents_above_the_budget(model, run, tmp_path, monkeypatch):
    """Each alone in a batch, and no vector is another for it; nor is one without spaces empty."""
    texts = ["a cat", "字" * 3000, "x", "list of values " * 20, "", "QmFzZTY0" * 400]
    expected = model.encode(texts, convert_to_numpy=True)
    path, batches, forward = tmp_path / "t.txt", [], model.model.forward
    path.write_text("\n".join(texts) + "\n")

    def seen(batch, *training):
        batches.append((batch.n_tokens, len(batch.spans)))
        return forward(batch, *training)

    monkeypatch.setattr(model.model, "forward", seen)
    run(path, tokens_per_batch=12)
    assert len(batches) >= 4
    assert all(texts == 1 for tokens, texts in batches if tokens > 12)
    rows = rows_of(tmp_path / "out")
    kinds = ["ok", "truncated", "ok", "ok", "empty", "truncated"]
    assert [row["status"] for row in rows] == kinds
    got = np.array([row["embedding"] for row in rows])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert [bool(vector.any()) for vector in got] == [kind != "empty" for kind in kinds]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_instruction_without_room(model, run, lines, tmp_path, on_error):
    """The same for every row, so no row is to blame: never vectors of nothing."""
    instruction = "find the list of values " * 200
    with pytest.raises(ValueError, match="no room for text within max_length = 512"):
        run(lines, instruction=instruction, on_error=on_error)
    assert not shards(tmp_path / "out")
    with pytest.raises(ValueError, match="no room"):
        model.encode(["a cat"], instruction=instruction)


# --- shards and jobs that do not fit ---


def test_shards_of_another_place(run, lines, tmp_path):
    """Whole by themselves, but not the rows that their names say: only they are done again."""
    out = tmp_path / "out"
    run(lines)
    before = shards(out)
    stamp = (out / "part-00000-000000.parquet").stat().st_mtime_ns
    shutil.copy(out / "part-00000-000000.parquet", out / "part-00000-000002.parquet")
    (out / "part-00000-000003.parquet").write_bytes(b"")
    summary = run(lines)
    assert (summary.documents, summary.reused) == (20, 20)
    assert shards(out) == before
    assert (out / "part-00000-000000.parquet").stat().st_mtime_ns == stamp


def edited(directory: Path, name: str) -> Path:
    """One byte of a file of the model is another."""
    data = bytearray((directory / name).read_bytes())
    if name == "model.safetensors":
        data[-3] ^= 1
    else:
        data += b"\n"
    (directory / name).write_bytes(data)
    return directory


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: edited(d, "model.safetensors"), r"model\.fingerprint"),
        (lambda d: edited(d, "tokenizer.json"), r"model\.fingerprint"),
        ({"template": "[INST] {text} [/INST]"}, r"template: 'none' there, '\[INST\]"),
        ({"max_length": 99}, "max_length: 512 there, 99 now"),
        ({"pooling_mode": "last_token"}, "pooling_mode: 'mean' there, 'last_token' now"),
        ({"enable_bidirectional": False}, "enable_bidirectional: True there, False now"),
        ({"skip_instruction": False}, "skip_instruction: True there, False now"),
        ({"dtype": "bfloat16"}, r"dtype: 'float32' there, 'bfloat16' now"),
    ],
)
def test_another_model(run, lines, directory, tmp_path, change, told):
    copy = shutil.copytree(directory, tmp_path / "model")
    options = {"dtype": "float32"}
    run(lines, model=LLM2Vec.from_pretrained(copy, **options))
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    if callable(change):
        change(copy)
    else:
        options |= change
    other = LLM2Vec.from_pretrained(copy, **options)
    for more in ({}, {"append": True}, {"verify": True}):
        with pytest.raises(ManifestError, match=told):
            run(lines, model=other, **more)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").iterdir()}
    assert after == before


# --- disks ---


@pytest.mark.parametrize("output_format", ["parquet", "npy"])
@pytest.mark.parametrize(("left", "size"), [(0, 100), (0, 2000), (2, 0), (2, 1000), (4, 3)])
def test_a_disk_that_fills_up(room_for, run, lines, tmp_path, left, size, output_format):
    """While writing the manifest, shards, locks, the summary: it is told where, and goes on."""
    out = tmp_path / "out"
    run(lines, "whole", output_format=output_format)
    if left:
        run(lines, output_format=output_format)
        for path in sorted(out.glob("part-*.parquet"))[left:]:
            path.unlink()
    with room_for(size), pytest.raises(OSError, match=str(out)) as told:
        run(lines, output_format=output_format)
    assert told.value.errno == errno.EFBIG
    assert len(list(out.glob("part-*.parquet"))) == left and not list(out.glob("*.partial"))
    summary = run(lines, output_format=output_format)
    assert (summary.documents, summary.reused) == (40 - 10 * left, 10 * left)
    assert shards(out) == shards(tmp_path / "whole")
    assert json.loads((out / "summary-00000.json").read_text())["reused"] == 10 * left


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """read_only(directory): within it nothing can be written there, though root could"""
    monkeypatch.chdir(tmp_path)  # from above, others may not walk down to it
    tmp_path.chmod(0o755)
    root = os.geteuid() == 0

    @contextmanager
    def make(directory: Path):
        mode = directory.stat().st_mode
        directory.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            directory.chmod(mode)

    return make


@pytest.mark.skipif(os.name == "nt", reason="no such permissions")
def test_a_directory_that_cannot_be_written(run, model, lines, tmp_path, read_only, monkeypatch):
    options = {"rows_per_shard": 10, "precision": "float32", "show_progress": False}
    out, told = tmp_path / "out", model.describe()
    monkeypatch.setattr(model, "describe", lambda: told)  # its directory is not for others
    run("t.txt", "whole")
    with read_only(tmp_path), pytest.raises(PermissionError, match="out"):
        embed("t.txt", model, "out", **options)
    out.mkdir()
    with read_only(out), pytest.raises(PermissionError, match=r"manifest\.json"):
        embed("t.txt", model, "out", **options)
    assert not list(out.iterdir())
    run("t.txt")
    for number in (1, 3):
        (out / f"part-00000-{number:06d}.parquet").unlink()
    before = shards(out)
    with read_only(out), pytest.raises(PermissionError, match="out"):
        embed("t.txt", model, "out", **options)
    assert shards(out) == before and not list(out.glob("*.partial"))
    assert run("t.txt").documents == 20
    assert shards(out) == shards(tmp_path / "whole")


def test_duplicate_ids(run, tmp_path):
    """Refused on demand, before the second of them has a shard; without, ids are just payload, and
    without a column they are positions.
    """
    path = tmp_path / "t.jsonl"
    keys = [*range(25), 7, *range(26, 30)]
    path.write_text("".join(json.dumps({"text": "a list", "key": k}) + "\n" for k in keys))
    for _ in range(2):  # again when resumed
        with pytest.raises(DuplicateIdError, match=r"row 25 of .*t\.jsonl has the id '7' of row 7"):
            run(path, id_column="key", unique_ids=True)
        assert "part-00000-000002.parquet" not in shards(tmp_path / "out")
    run(path, id_column="key")
    assert [row["id"] for row in rows_of(tmp_path / "out")] == list(map(str, keys))
    run(path, "positions")
    assert [row["id"] for row in rows_of(tmp_path / "positions")] == [
        f"{path}:{n}" for n in range(30)
    ]
