"""What a run tells while it goes: JSON lines off a terminal, an estimate from input bytes; and in
the end: which stage was the limit.
"""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from llm2vec_fast.corpus import progress as module
from llm2vec_fast.corpus.pipeline import ALIVE, Pipeline
from llm2vec_fast.corpus.progress import STAGES, Profile, Progress


@pytest.fixture
def clock(monkeypatch):
    """now[0] is the time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_json_line_every_ten_seconds(clock, capsys):
    with Progress(total=1000) as progress:
        progress.pass_by(200)  # a shard that was there already: says nothing about speed
        clock[0] += 4
        progress.update(10, 400)
        assert capsys.readouterr().err == ""
        progress.pass_by(100)
        progress.finished(100, 400)
        clock[0] += 6
        progress.update(10, 100)
    line = json.loads(capsys.readouterr().err)
    assert line == {
        "documents": 20,
        "tokens": 500,
        "tokens_per_s": 50,
        "documents_per_s": 2.0,
        "input_share": 0.3,
        "eta_s": 54,  # 700 bytes * 4 tokens, less 100 computed and not stored, at 50 a second
    }


def test_no_estimate_where_the_size_is_unknown(clock):
    with Progress(total=None, shown=False) as progress:
        progress.update(1, 10)
        progress.finished(5, 10)
        clock[0] += 1
        assert progress.tokens_left() is None
        assert "eta_s" not in progress.line(clock[0])


def test_a_rank_expects_its_share(clock):
    with Progress(total=1000, shown=False, share=0.25) as progress:
        progress.update(1, 100)
        progress.pass_by(200)
        progress.finished(50, 100)
        assert progress.tokens_left() == 400  # 800 bytes, a quarter of them, two tokens a byte


def test_batches_that_failed_are_taken_back(clock, capsys):
    with Progress(total=None, shown=False) as progress:
        progress.update(3, 30)
        progress.update(-3, -30)
        assert (progress.documents, progress.tokens) == (0, 0)
    assert capsys.readouterr().err == ""


def test_a_bar_by_tokens_on_a_terminal(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(module.sys, "stderr", screen)
    with Progress(total=1000) as progress:
        progress.update(10, 400)
        progress.pass_by(500)
        progress.finished(500, 400)
        clock[0] += 2
        progress.update(5, 100)
        assert progress.bar.n == 500 and progress.bar.total == 800
        assert progress.bar.postfix == "8 docs/s"
        progress.say("a line")
    assert "a line\n" in screen.getvalue() and "embed" in screen.getvalue()


def profile_of(jobs=20, seconds=10.0, **busy) -> Profile:
    """Of a run whose stages worked for so many seconds."""
    line = Pipeline()
    line.jobs = jobs
    for stage, spent in busy.items():
        line.clock.add(stage, spent)
    return Profile.of(line, seconds)


@pytest.mark.parametrize("slow", ["read", "tokenise", "forward", "write"])
def test_a_slow_stage_is_named_as_the_limit(slow, monkeypatch):
    monkeypatch.setattr(module, "LIMIT", 0.6)  # a busy machine takes its part
    line = Pipeline()

    def work(stage, item=None):
        time.sleep(0.02 if stage == slow else 0.0005)
        return item

    def items():
        for n in range(20):
            work("read")
            with line.clock.measure("tokenise"):
                work("tokenise")
            yield n

    began = time.perf_counter()
    line.run(items(), lambda n: work("forward", n), lambda n: work("write", n))
    profile = Profile.of(line, time.perf_counter() - began)
    assert profile.limit.startswith(f"{STAGES[slow]} is busy ") and "is the limit" in profile.limit
    assert 0.6 < profile.stages[slow].share < 1
    stages = profile.stages
    reader = stages["read"].share + stages["tokenise"].share
    assert reader + sum(stages["read"].waiting.values()) < 1.01
    for name in ("forward", "write"):
        assert 0.6 < stages[name].share + sum(stages[name].waiting.values()) < 1.01
    assert all(depth["max"] <= ALIVE for depth in profile.queues.values())
    assert 0.0 < profile.first_job < profile.seconds and profile.jobs == 20


def test_reading_and_tokenising_are_one_thread():
    """Neither is the busiest stage, and together they are the limit."""
    told = profile_of(read=4.5, tokenise=5, forward=6, write=1).limit
    assert told == (
        "tokenising is busy 50% of the time, 95% with reading in the same thread: it is the limit"
    )


def test_beside_a_gpu_the_hosts_part_of_the_forward_pass_tells_nothing():
    told = profile_of(read=1, tokenise=2, forward=9.9, gpu=4, write=9.6).limit
    assert told == "writing is busy 96% of the time: it is the limit"
    told = profile_of(read=1, tokenise=2, forward=1, gpu=9.7, write=3).limit
    assert told == "the forward pass on the GPU is busy 97% of the time: it is the limit"


def test_without_a_limit_that_is_told():
    told = profile_of(read=1, tokenise=2, forward=6, write=1).limit
    assert told == "the forward pass is busy 60% of the time: no stage is the limit"
    told = profile_of(jobs=2, read=1, tokenise=2, forward=6, write=1).limit
    assert told.endswith("no stage is the limit; so few jobs (2) hardly overlap")
    assert profile_of(jobs=0, read=1).limit == "nothing was left to do"


def test_a_profile_as_table_and_as_json():
    line = Pipeline()
    line.jobs, line.first_after = 4, 0.25
    for stage, seconds, waits_for in (
        ("read", 1, ""), ("read", 5, "a free slot"), ("tokenise", 2, ""), ("forward", 8, ""),
        ("write", 2, ""), ("write", 5, "input"), ("write", 1, "the GPU"),
    ):  # fmt: skip
        line.clock.add(stage, seconds, waits_for)
    for item in range(3):
        line.ready.put(item)
    profile, screen = Profile.of(line, 10.0), io.StringIO()
    Console(file=screen, width=150).print(profile)
    lines = [" ".join(line.replace("│", " ").split()) for line in screen.getvalue().splitlines()]
    assert "4 jobs in 10.0 s, the first one ready after 0.25 s" in lines
    assert "tokenise 20% 2.0 0.500 a free slot 50%" in lines
    assert "write 20% 2.0 0.500 input 50%, the GPU 10%" in lines
    assert "jobs in the queues: ready 2.0, at most 3; made 0.0, at most 0" in lines
    assert lines[-1] == profile.limit
    told = json.loads(json.dumps(profile.as_dict()))
    assert told["stages"]["write"] == {
        "seconds": 2, "share": 0.2, "waiting": {"input": 0.5, "the GPU": 0.1}
    }  # fmt: skip
    assert told["queues"]["ready"] == {"mean": 2.0, "max": 3} and told["limit"] == profile.limit
