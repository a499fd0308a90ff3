"""Locks between real processes: they say who holds them, and die with their holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llm2vec_fast.corpus.lock import DIRECTORY, LockError, Locks

SHARD = "part-00000-000003.parquet"
HOLDER = """
import sys, time
from pathlib import Path
from llm2vec_fast.corpus.lock import Locks
with Locks(Path(sys.argv[1])) as locks:
    locks.take(sys.argv[2])
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of SHARD."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), SHARD], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_process_is_named_and_its_death_frees_the_lock(tmp_path, holder):
    with Locks(tmp_path) as locks:
        with pytest.raises(LockError, match=f"{SHARD}.*pid {holder.pid} on .*torchrun"):
            locks.take(SHARD)
        locks.take("part-00000-000004.parquet")  # others are free
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / DIRECTORY / f"{SHARD}.lock").exists()  # left behind, and in nobody's way
        locks.take(SHARD)
        told = (tmp_path / DIRECTORY / f"{SHARD}.lock").read_text()
        assert told.startswith(f"pid {os.getpid()} on ")
    assert not (tmp_path / DIRECTORY).exists()


def test_the_same_process_twice(tmp_path):
    with Locks(tmp_path) as first, Locks(tmp_path) as second:
        first.take(SHARD)
        with pytest.raises(LockError):
            second.take(SHARD)
        first.give_back(SHARD)
        first.give_back(SHARD)  # of one that is not held: nothing
        second.take(SHARD)
        with pytest.raises(LockError):
            first.take(SHARD)


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """Between opening a lock file and locking it, its holder may remove it and let go."""
    with Locks(tmp_path) as first, Locks(tmp_path) as second:
        first.take(SHARD)
        lock = second._lock

        def after_the_holder_is_gone(handle, path):
            if SHARD in first.held:
                first.give_back(SHARD)
            return lock(handle, path)

        monkeypatch.setattr(second, "_lock", after_the_holder_is_gone)
        second.take(SHARD)
        with pytest.raises(LockError):
            first.take(SHARD)


def test_a_thread_that_comes_late_gets_no_lock(tmp_path):
    locks = Locks(tmp_path)
    with locks:
        pass
    with pytest.raises(LockError, match="over"):
        locks.take(SHARD)
    with Locks(tmp_path) as other:
        other.take(SHARD)


def test_without_locks_in_the_file_system_work_goes_on_with_a_warning(tmp_path, monkeypatch):
    import errno

    from llm2vec_fast.corpus import lock

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with Locks(tmp_path) as locks, pytest.warns(UserWarning, match="without locks"):
        locks.take(SHARD)
