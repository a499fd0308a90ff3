"""Which jobs a run does: ranks, other writers, unique ids, damage, new and all kinds of inputs."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pytest

from llm2vec_fast import LLM2Vec
from llm2vec_fast.corpus import embed
from llm2vec_fast.corpus.ids import DuplicateIdError
from llm2vec_fast.corpus.lock import LockError, Locks
from llm2vec_fast.corpus.store import read_shard, vectors_of
from llm2vec_fast.corpus.walk import Rank

TEXTS = [f"{'list of values ' * (n % 7)}number {n}" for n in range(50)]


@pytest.fixture(scope="module")
def model(tiny_model, add_tokenizer, tmp_path_factory):
    directory = add_tokenizer(tiny_model(tmp_path_factory.mktemp("walk"), "llama"))
    return LLM2Vec.from_pretrained(directory, dtype="float32")


@pytest.fixture
def run(model, tmp_path):
    """run(inputs, output="out", **options) -> Summary, ten rows a shard"""

    def call(inputs, output="out", **options):
        options = {"rows_per_shard": 10, "precision": "float32", "show_progress": False} | options
        return embed(inputs, model, tmp_path / output, **options)

    return call


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def shards(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("part-*"))}


def content(output) -> dict[str, bytes]:
    """Vectors by id."""
    found = {}
    for path in sorted(output.glob("part-*.parquet")):
        table = read_shard(path)
        ids = table.column("id").to_pylist()
        found |= dict(zip(ids, map(bytes, vectors_of(table, "float32", 48)), strict=True))
    return found


def test_ranks_do_the_same_as_one_process(run, lines, tmp_path, monkeypatch):
    second = tmp_path / "u.txt"
    second.write_text("\n".join(TEXTS[:20]))  # exactly two jobs: the third is found empty
    third = tmp_path / "v.txt"
    third.write_text("\n".join(TEXTS[:15]))
    inputs = [lines, second, third]
    run(inputs, "alone")
    done = []
    for rank in (1, 0, 2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        summary = run(inputs, "shared")
        done.append(summary.documents)
        told = json.loads((tmp_path / "shared" / f"summary-{rank:05d}.json").read_text())
        assert (told["rank"], told["world"], told["documents"]) == (rank, 3, summary.documents)
    assert sum(done) == 85 and min(done) >= 10
    assert shards(tmp_path / "shared") == shards(tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")  # another number of processes resumes as well
    monkeypatch.setenv("RANK", "1")
    assert run(inputs, "shared").documents == 0


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2")])
def test_nonsense_ranks(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match="RANK"):
        Rank.from_environment()


def test_another_writer_is_an_error_and_finished_shards_are_no_matter(run, lines, tmp_path):
    run(lines)
    (tmp_path / "out" / "part-00000-000002.parquet").unlink()
    with Locks(tmp_path / "out") as other:
        other.take("part-00000-000000.parquet")  # finished: nobody asks for its lock
        assert run(lines).documents == 10
        (tmp_path / "out" / "part-00000-000002.parquet").unlink()
        other.take("part-00000-000002.parquet")
        with pytest.raises(LockError, match="part-00000-000002"):
            run(lines)
    assert run(lines).documents == 10  # nothing of the failed run blocks


def test_a_shard_finished_by_another_while_waiting_is_not_done_again(
    run, lines, tmp_path, monkeypatch
):
    run(lines, "other")
    take = Locks.take

    def finish_first(self, name):
        data = (tmp_path / "other" / name).read_bytes()
        (self.directory.parent / name).write_bytes(data)
        take(self, name)

    run(lines, "out")
    for path in (tmp_path / "out").glob("part-*"):
        path.unlink()
    monkeypatch.setattr(Locks, "take", finish_first)
    # Past the last shard there is nothing to finish.
    (tmp_path / "other" / "part-00000-000005.parquet").write_bytes(b"")
    summary = run(lines, "out")
    assert (summary.documents, summary.reused) == (0, 50)


def test_unique_ids_over_inputs_and_runs(run, tmp_path):
    def records(name, keys):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": "a list", "key": k}) + "\n" for k in keys))
        return path

    first, clash = records("a.jsonl", range(25)), records("c.jsonl", [77, 78, 7])
    with pytest.raises(ValueError, match="id_column"):
        run(first, unique_ids=True)
    run(first, id_column="key")  # without; the ids are found in the shards later
    summary = run(first, id_column="key", unique_ids=True)
    assert summary.documents == 0
    with pytest.raises(DuplicateIdError, match=r"row 2 of .*c\.jsonl.*'7'.*row 7 of .*a\.jsonl"):
        run([first, clash], id_column="key", unique_ids=True, append=True)
    assert len(shards(tmp_path / "out")) == 3
    (tmp_path / "out" / "part-00000-000001.parquet").unlink()
    again = run([first, clash], id_column="key")  # allowed where nobody asks
    assert again.documents == 13
    fresh = run(first, "fresh", id_column="key", unique_ids=True)
    assert fresh.documents == 25
    (tmp_path / "fresh" / "part-00000-000001.parquet").unlink()
    assert run(first, "fresh", id_column="key", unique_ids=True).documents == 10


@pytest.mark.parametrize("output_format", ["parquet", "npy"])
def test_verify_redoes_what_is_damaged(run, lines, tmp_path, output_format):
    run(lines, output_format=output_format)
    before = shards(tmp_path / "out")
    suffix = "npy" if output_format == "npy" else "parquet"
    path = tmp_path / "out" / f"part-00000-000003.{suffix}"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    assert run(lines, output_format=output_format).reused == 50  # footer and size say nothing
    summary = run(lines, output_format=output_format, verify=True)
    assert (summary.documents, summary.reused, summary.damaged) == (10, 40, 1)
    assert "1 damaged" in str(summary)
    assert shards(tmp_path / "out") == before


def test_append(run, lines, tmp_path):
    run(lines)
    before = shards(tmp_path / "out")
    new = tmp_path / "a-new.txt"
    new.write_text("the new one\n")
    with pytest.raises(ValueError, match="--append"):
        run([new, lines])
    summary = run([new, lines], append=True)
    assert (summary.documents, summary.reused) == (1, 50)
    after = shards(tmp_path / "out")
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"part-00001-000000.parquet"}


def test_whole_files(run, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n:02d}.md").write_text(TEXTS[n] + "\nsecond line")
    assert run(folder, whole_files=True).documents == 12
    assert list(content(tmp_path / "out")) == [str(folder / f"{n:02d}.md") for n in range(12)]
    assert run(folder, whole_files=True).reused == 12


def parquet(path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.txt", lambda p: p.write_text("\n".join(TEXTS))),
        ("t.txt.gz", lambda p: p.write_bytes(gzip.compress("\n".join(TEXTS).encode()))),
        ("t.jsonl", lambda p: p.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))),
        ("t.csv", lambda p: p.write_text("n,text\n" + "\n".join(f'1,"{t}"' for t in TEXTS))),
        ("t.parquet", parquet),
    ],
)
@pytest.mark.parametrize("rank", [None, 0])
def test_every_input_resumes_in_the_middle(run, tmp_path, name, write, rank, monkeypatch):
    """Shards missing in between, at the end, and (as a rank) jobs of others in between."""
    path = tmp_path / name
    write(path)
    run(path, "whole")
    whole = content(tmp_path / "whole")
    assert list(whole) == [f"{path}:{n}" for n in range(50)]
    run(path)
    for number in (1, 2, 4):
        (tmp_path / "out" / f"part-00000-{number:06d}.parquet").unlink()
    if rank is not None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run(path).documents == 20
        monkeypatch.setenv("RANK", "1")
    assert run(path).documents == (30 if rank is None else 10)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


class Pipe:
    """Standard input with these bytes."""

    def __init__(self, data: bytes):
        self.buffer = io.BufferedReader(io.BytesIO(data))


def test_standard_input(run, tmp_path, monkeypatch):
    data = "\n".join(TEXTS).encode()
    monkeypatch.setattr("sys.stdin", Pipe(data))
    summary = run("-")
    assert summary.documents == 50 and "same bytes" in str(summary)
    (tmp_path / "out" / "part-00000-000003.parquet").unlink()
    monkeypatch.setattr("sys.stdin", Pipe(data))
    again = run("-")
    assert (again.documents, again.reused) == (10, 40)
    assert list(content(tmp_path / "out")) == [f"-:{n}" for n in range(50)]
    (tmp_path / "out" / "part-00000-000003.parquet").unlink()
    monkeypatch.setattr("sys.stdin", Pipe(b"\n".join(data.split(b"\n")[:25])))
    with pytest.raises(ValueError, match="ends at row 25, but shards were made of 30 rows"):
        run("-")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.stdin", Pipe(data))
    with pytest.raises(ValueError, match="standard input cannot be shared"):
        run("-", "ranks")


@pytest.mark.parametrize(
    ("name", "write", "known"),
    [
        ("t.txt", lambda p: p.write_text("\n".join(TEXTS)), True),
        ("t.parquet", parquet, True),
        ("t.txt.gz", lambda p: p.write_bytes(gzip.compress("\n".join(TEXTS).encode())), False),
    ],
)
def test_the_share_of_input_done(run, tmp_path, monkeypatch, name, write, known):
    """Told to the progress as jobs are stored, in the end all of it."""
    from llm2vec_fast.corpus import run as module

    path, shares = tmp_path / name, []
    write(path)

    class Spy(module.Progress):
        def finished(self, size, tokens):
            super().finished(size, tokens)
            shares.append(self.passed / self.total)

    monkeypatch.setattr(module, "Progress", Spy)
    run(path)
    assert shares == sorted(shares) and len(shares) == 5
    assert (0.1 < shares[0] < 0.3 and 0.5 < shares[3] < 0.9) == known
    assert shares[-1] == pytest.approx(1) or not known


def test_stages_and_rates_are_told(run, lines):
    summary = run(lines)
    assert set(summary.stages) == {"read", "tokenise", "forward", "write", "waiting"}
    assert all(seconds > 0 for seconds in summary.stages.values())
    for word in ("tokens/s", "documents/s", "forward", "MB in", "50 ok"):
        assert word in str(summary)
    assert np.isclose(json.loads(summary.as_json())["seconds"], summary.seconds)
