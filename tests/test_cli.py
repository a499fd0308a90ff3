"""The command line as a person types it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llm2vec_fast", *arguments]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    options = {"env": ENV, "capture_output": True, "text": True} | options
    return subprocess.run(command(*arguments), **options)


def start(*arguments: str, env=ENV, **options) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command(*arguments), env=env, **options)


def wait_for_shards(out, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("part-*.parquet"))) < count and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def directory(tiny_model, add_tokenizer, tmp_path_factory):
    return add_tokenizer(tiny_model(tmp_path_factory.mktemp("cli"), "llama"))


def test_embed_then_search(directory, tmp_path):
    source, out = tmp_path / "t.txt", tmp_path / "out"
    source.write_text("a list of numbers\nthe keys of a dict\n")
    embed = ("embed", str(source), "--model", str(directory), "--output", str(out), "--causal")
    done = run(*embed, "--profile")
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout and "2 ok" in done.stdout
    told = json.loads((out / "summary-00000.json").read_text())["profile"]["limit"]
    assert told in " ".join(done.stderr.split()) and "a free slot" in done.stderr
    again = run(*embed)
    assert "2 reused" in again.stdout and "a free slot" not in again.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"]["settings"]["enable_bidirectional"] is False
    found = run("search", str(out), "a list of numbers", "--k", "1", "--json")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert answer["hits"][0]["id"].endswith("t.txt:0") and answer["hits"][0]["score"] > 0.99
    assert "t.txt:0" in run("search", str(out), "a list of numbers").stdout


def test_errors_are_one_line_without_a_traceback(directory, tmp_path):
    done = run("embed", "absent.txt", "--model", str(directory), "--output", str(tmp_path / "o"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "absent.txt" in done.stderr
    assert "Traceback" not in done.stderr
    unknown = run("embed", "x.txt", "--modle", "y")
    assert unknown.returncode == 2 and "--modle" in unknown.stderr
    assert run("nonsense").returncode == 2


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(f"{'list of keys ' * 10}number {n}\n" for n in range(1200)))
    return path


def embed_of(corpus, directory, out, *more: str) -> tuple[str, ...]:
    return (
        "embed", str(corpus), "--model", str(directory), "--output", str(out),
        "--rows-per-shard", "30", "--tokens-per-batch", "64", *more,
    )  # fmt: skip


def test_signals_end_it_cleanly_and_the_same_command_resumes(directory, corpus, tmp_path):
    out = tmp_path / "out"
    corpus.write_text(corpus.read_text() * 5)  # long enough to be still at work when it is told
    embed, already = embed_of(corpus, directory, out), 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(*embed)
        wait_for_shards(out, already + 3, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == code, errors
        assert "the same command resumes" in errors and "Traceback" not in errors
        assert not list(out.glob("*.partial"))
        already = len(list(out.glob("part-*.parquet")))
        assert already < 200
    done = run(*embed, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["reused"] == already * 30 and summary["documents"] == 6000 - already * 30


def test_an_interrupt_while_waiting_for_standard_input(directory, tmp_path):
    """The reading thread hangs in a pipe that stays open."""
    out = tmp_path / "out"
    process = start(*embed_of("-", directory, out), stdin=subprocess.PIPE)
    process.stdin.write("a list\n" * 95)
    process.stdin.flush()
    wait_for_shards(out, 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143, process.stderr.read()
    done = run(*embed_of("-", directory, out), input="a list\n" * 95)
    assert done.returncode == 0, done.stderr
    assert "90 reused" in done.stdout and "same bytes" in done.stdout


def test_a_full_disk_ends_it_cleanly(directory, corpus, tmp_path):
    """A limit on the size of files fails writing as a full disk does, also for root."""
    import resource

    out = tmp_path / "out"
    embed = embed_of(corpus, directory, out, "--rows-per-shard", "1000")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = run(*embed, preexec_fn=limit)
    assert done.returncode == 1 and "\nerror: " in f"\n{done.stderr}", done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("part-*"))
    assert run(*embed).returncode == 0


def test_the_options_of_a_corpus(directory, tmp_path):
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    (docs / "a.md").write_text("a list\nof numbers")
    embed = embed_of(docs, directory, out, "--whole-files", "--output-format", "npy")
    assert run(*embed).returncode == 0
    assert (out / "part-00000-000000.npy").exists()
    more = tmp_path / "b.md"
    more.write_text("the keys of a dict")
    both = (*embed[:1], str(more), *embed[1:])
    refused = run(*both)
    assert refused.returncode == 1 and "--append" in refused.stderr
    data = bytearray((out / "part-00000-000000.npy").read_bytes())
    data[-1] ^= 1
    (out / "part-00000-000000.npy").write_bytes(data)
    done = run(*both, "--append", "--verify")
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout and "1 damaged" in done.stdout
    found = run("search", str(out), "a list of numbers", "the keys of a dict", "--json", "--k", "1")
    ids = [json.loads(line)["hits"][0]["id"] for line in found.stdout.splitlines()]
    assert ids == [str(docs / "a.md"), str(more)]
    refused = run(*both, "--unique-ids")
    assert refused.returncode == 1 and "id_column" in refused.stderr


def test_ranks_share_an_output(directory, corpus, tmp_path):
    out, alone = tmp_path / "out", tmp_path / "alone"
    ranks = [
        start(
            *embed_of(corpus, directory, out),
            env=ENV | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "rank 0 of 2" in outputs[0][0] and outputs[1][0] == ""
    told = [json.loads((out / f"summary-{rank:05d}.json").read_text()) for rank in range(2)]
    assert [summary["documents"] for summary in told] == [600, 600]
    assert run(*embed_of(corpus, directory, alone)).returncode == 0
    for path in sorted(alone.glob("part-*.parquet")):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert len(list(out.glob("part-*.parquet"))) == 40


def test_a_second_writer_is_refused(directory, corpus, tmp_path):
    first = start(*embed_of(corpus, directory, tmp_path))
    wait_for_shards(tmp_path, 1, first)
    first.send_signal(signal.SIGSTOP)
    try:
        second = run(*embed_of(corpus, directory, tmp_path))
        assert second.returncode == 1
        assert f"is being written by pid {first.pid}" in second.stderr
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()


def test_doctor_tells_machine_versions_and_backends(directory):
    done = run("doctor", "--model", str(directory))
    assert done.returncode == 0, done.stderr
    wanted = ("torch", "triton", "nvcc", "attention", "varlen", "needs a CUDA device", "template")
    for word in wanted:
        assert word in done.stdout


def test_eval_sts_compares_models(directory, tmp_path):
    source, out = tmp_path / "pairs.csv", tmp_path / "out.json"
    source.write_text("a list,a list,5\na list,an error,0\na key,keys,3\n")
    done = run(
        "eval", "sts", str(source), "--output", str(out), "--model", f"{directory},label=first",
        "--model", f"base={directory}, causal=true, standardize=true, label=second",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "first" in done.stdout and "second" in done.stdout and "spearman" in done.stdout
    saved = json.loads(out.read_text())
    assert [row["label"] for row in saved["rows"]] == ["first", "second"]
    assert saved["machine"]["torch"] and saved["data"]["files"][0]["file"] == "pairs.csv"


def test_eval_word(directory, tmp_path):
    source, out = tmp_path / "train.txt", tmp_path / "out.json"
    source.write_text("a DT B-NP\nlist NN I-NP\n. . O\n\n" * 10)
    word = ("eval", "word", "--train", str(source), "--model", str(directory), "--steps", "20")
    done = run(*word, "--task", "chunk", "--test-share", "0.2", "--output", str(out))
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["rows"][0]["figures"]
    assert (figures["sentences"], figures["train_sentences"]) == (2, 8) and "f1" in figures
    done = run(*word, "--task", "pos", "--test", str(source), "--test-sentences", "3")
    assert done.returncode == 0 and "words 9, sentences 3" in done.stdout, done.stderr
    done = run(*word, "--task", "pos")
    assert done.returncode == 1 and "give either --test FILE or --test-share" in done.stderr


def test_eval_retrieval(directory, tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "a list"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a list"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    done = run("eval", "retrieval", str(tmp_path), "--model", str(directory), "--recall-at", "3")
    assert done.returncode == 0, done.stderr
    assert "ndcg@10" in done.stdout and "recall@3" in done.stdout and "100.00" in done.stdout


def test_eval_names_an_unknown_field(directory, tmp_path):
    done = run("eval", "sts", "none.csv", "--model", f"{directory},casual=true")
    assert done.returncode == 1 and "did you mean 'causal'" in done.stderr
    assert "Traceback" not in done.stderr
