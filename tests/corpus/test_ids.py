"""Unique ids on disk: duplicates name both rows, and everything can be repeated."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm2vec_fast.corpus.ids import FILE, DuplicateIdError, UniqueIds

NAMES = ["a.jsonl", "b.jsonl"]


def test_a_duplicate_names_both_rows_and_records_nothing(tmp_path):
    with UniqueIds(tmp_path, NAMES) as ids:
        ids.record("s0", 0, [(0, "x"), (1, "y")])
        with pytest.raises(DuplicateIdError, match=r"row 7 of b\.jsonl .*'y'.* row 1 of a\.jsonl"):
            ids.record("s1", 1, [(6, "z"), (7, "y")])
        assert ids.knows("s0") and not ids.knows("s1")
        ids.record("s1", 1, [(8, "z")])  # free: the failed shard left nothing
    with UniqueIds(tmp_path, NAMES) as ids:  # another run
        with pytest.raises(DuplicateIdError):
            ids.record("s2", 1, [(9, "x")])


def test_a_duplicate_within_a_shard(tmp_path):
    with UniqueIds(tmp_path, NAMES) as ids:
        with pytest.raises(DuplicateIdError, match=r"row 5 .* row 3 of a\.jsonl"):
            ids.record("s0", 0, [(3, "x"), (4, "y"), (5, "x")])


def test_the_same_rows_again_are_no_conflict(tmp_path):
    """A run that was killed after recording and before its shard was there."""
    with UniqueIds(tmp_path, NAMES) as ids:
        ids.record("s0", 0, [(0, "x"), (1, "y")])
        ids.record("s0", 0, [(0, "x"), (1, "y")])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=5), max_size=5))
def test_refused_exactly_where_a_set_would(shards):
    with tempfile.TemporaryDirectory() as directory, UniqueIds(Path(directory), NAMES) as ids:
        seen: set[str] = set()
        for number, shard in enumerate(shards):
            good = len(set(shard)) == len(shard) and not seen & set(shard)
            rows = [(number * 10 + at, id) for at, id in enumerate(shard)]
            if good:
                ids.record(f"s{number}", 0, rows)
                seen |= set(shard)
            else:
                with pytest.raises(DuplicateIdError):
                    ids.record(f"s{number}", 0, rows)


def test_ranks_share_it(tmp_path):
    """Several connections at once: each waits for the other, one of two equal ids loses."""
    failed = []

    def run(rank: int) -> None:
        with UniqueIds(tmp_path, NAMES) as ids:
            for n in range(rank, 20, 2):
                rows = [(n * 100 + at, f"id {n * 100 + at}") for at in range(100)]
                ids.record(f"s{n}", 0, rows)
            try:
                ids.record(f"last {rank}", 1, [(rank, "the same")])
            except DuplicateIdError as error:
                failed.append(str(error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 1 and "the same" in failed[0]
    with sqlite3.connect(tmp_path / FILE) as connection:
        assert connection.execute("SELECT count(*) FROM ids").fetchone() == (2001,)


def test_ranks_that_open_it_at_once(tmp_path):
    """SQLite refuses a change to its write-ahead log without waiting; a rank must not die of it."""
    died, start = [], threading.Barrier(8)

    def run(folder) -> None:
        start.wait()
        try:
            UniqueIds(folder, NAMES).connection.close()
        except Exception as error:
            died.append(error)

    for n in range(40):
        folder = tmp_path / str(n)
        folder.mkdir()
        threads = [threading.Thread(target=run, args=(folder,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not died


def test_a_file_that_stays_locked_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("llm2vec_fast.corpus.ids.PATIENCE", 0.05)
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match=r"ids\.sqlite cannot be used: database is locked"):
            UniqueIds(tmp_path, NAMES)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(ValueError, match=r"ids\.sqlite cannot be used.*deleted"):
        UniqueIds(tmp_path, NAMES)


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
    with UniqueIds(tmp_path, NAMES) as ids:
        ids.connection.execute("PRAGMA max_page_count = 20")
        with pytest.raises(OSError, match=r"ids\.sqlite cannot be written.*full.*same command"):
            ids.record("s0", 0, [(n, f"{n} {'x' * 100}") for n in range(5000)])
        assert not ids.knows("s0")
        ids.record("s1", 0, [(0, "x")])
