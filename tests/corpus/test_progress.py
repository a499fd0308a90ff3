"""What a run tells while it goes: JSON lines off a terminal, an estimate from input bytes."""

from __future__ import annotations

import io
import json

import pytest

from llm2vec_fast.corpus import progress as module
from llm2vec_fast.corpus.progress import Progress


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
