"""The three stages: order, bounded memory, and an end whatever fails."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from llm2vec_fast.corpus import pipeline as module
from llm2vec_fast.corpus.pipeline import ALIVE, END, Clock, Pipeline, Queue

SECONDS = 10  # a deadlock fails the test instead of hanging it


def run(items, compute, store, line=None):
    """Pipeline.run in a thread of its own, so that a hang is seen."""
    outcome = []

    def target():
        try:
            (line or Pipeline()).run(iter(items), compute, store)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "deadlock"
    left = [t.name for t in threading.enumerate() if t.name in ("read", "store")]
    assert not left
    if outcome[0] is not None:
        raise outcome[0]


def test_order_and_overlap():
    stored, threads = [], set()

    def compute(item):
        threads.add(threading.current_thread())
        time.sleep(0.01)
        return item * 2

    def store(item):
        threads.add(threading.current_thread())
        time.sleep(0.01)
        stored.append(item)

    def items():
        threads.add(threading.current_thread())
        for n in range(20):
            time.sleep(0.01)
            yield n

    run(items(), compute, store)
    assert stored == list(range(0, 40, 2)) and len(threads) == 3


def test_a_measure_within_another_is_not_counted_twice(monkeypatch):
    now, clock = [0.0], Clock()
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    for _ in range(2):
        with clock.measure("read"):
            now[0] += 1
            with clock.measure("tokenise"):
                now[0] += 10
                with clock.measure("tokenise", "a core"):
                    now[0] += 100
            with pytest.raises(ValueError), clock.measure("tokenise"):
                now[0] += 1000
                raise ValueError
    assert clock.seconds == {
        ("read", ""): 2, ("tokenise", ""): 2020, ("tokenise", "a core"): 200
    }  # fmt: skip


@pytest.mark.parametrize("slow", ["read", "forward", "write"])
def test_the_seconds_of_a_thread_are_its_life(slow):
    def stage(name, item):
        time.sleep(0.01 if name == slow else 0.001)
        return item

    line, began = Pipeline(), time.perf_counter()
    items = (stage("read", n) for n in range(20))
    run(items, lambda n: stage("forward", n), lambda n: stage("write", n), line)
    life, spent = time.perf_counter() - began, line.clock.seconds
    for thread in ("forward", "write"):
        total = sum(s for (name, _), s in spent.items() if name == thread)
        assert 0.6 * life < total <= life  # a busy machine takes its part between two measures
    assert max(("read", "forward", "write"), key=lambda name: spent[name, ""]) == slow
    assert spent[slow, ""] >= 0.2
    assert line.jobs == 20 and 0 < line.first_after < life


def test_a_queue_knows_its_depths():
    queue = Queue()
    for item in (1, 2, 3, END):
        queue.put(item)
    assert [queue.get() for _ in range(3)] == [1, 2, 3] and queue.get() is END
    assert (queue.mean, queue.most) == ((1 + 2 + 3 + 3 + 2 + 1 + 0) / 7, 3)


def test_waiting_for_what_is_stored_is_not_work():
    line = Pipeline()

    def compute(item):
        line.settle()
        return item

    run(range(5), compute, lambda item: time.sleep(0.02), line)
    spent = line.clock.seconds
    assert spent["forward", "the job before"] > 0.06 > spent["forward", ""]


@pytest.mark.parametrize("slow", ["compute", "store"])
def test_only_a_few_items_are_alive(slow):
    class Item:
        pass

    alive, most = weakref.WeakSet(), []

    def items():
        for _ in range(30):
            item = Item()
            alive.add(item)
            most.append(len(alive))
            yield item
            del item

    def stage(name):
        def work(item):
            if name == slow:
                time.sleep(0.005)
            return item

        return work

    line = Pipeline()
    run(items(), stage("compute"), stage("store"), line)
    gc.collect()
    assert len(most) == 30 and max(most) <= ALIVE and max(most) > 1
    full, other = (line.ready, line.made) if slow == "compute" else (line.made, line.ready)
    assert 1 < full.most <= ALIVE and other.most <= ALIVE and other.mean < full.mean


@pytest.mark.parametrize("where", ["read", "compute", "store"])
@pytest.mark.parametrize("when", [0, 7])
@pytest.mark.parametrize("slow", ["read", "compute", "store", None])
def test_an_error_of_any_stage_ends_all_and_reaches_the_caller(where, when, slow):
    stored = []

    def fail_at(name, item):
        if name == slow:
            time.sleep(0.004)
        if name == where and item == when:
            raise OSError(f"{name} failed at {item}")
        return item

    def items():
        for n in range(1000):
            yield fail_at("read", n)

    with pytest.raises(OSError, match=f"{where} failed at {when}"):
        run(
            items(),
            lambda item: fail_at("compute", item),
            lambda item: stored.append(fail_at("store", item)),
        )
    assert stored == list(range(len(stored))) and len(stored) <= when


def test_a_long_stage_is_left_when_another_fails():
    line = Pipeline()

    def compute(item):
        deadline = time.monotonic() + SECONDS
        while item and time.monotonic() < deadline:  # the batches of a job
            time.sleep(0.001)
            line.check()
        return item

    def store(item):
        time.sleep(0.05)
        raise OSError("disk full")

    began = time.monotonic()
    with pytest.raises(OSError, match="disk full"):
        run(range(10), compute, store, line)
    assert time.monotonic() - began < SECONDS / 2


def test_an_interrupt_still_stores_what_is_computed():
    stored = []

    def compute(item):
        if item == 5:
            raise KeyboardInterrupt
        return item

    def store(item):
        time.sleep(0.02)
        stored.append(item)

    with pytest.raises(KeyboardInterrupt):
        run(range(100), compute, store)
    assert stored == [0, 1, 2, 3, 4]


def test_a_reader_that_hangs_does_not_keep_the_caller(monkeypatch):
    monkeypatch.setattr("llm2vec_fast.corpus.pipeline.PATIENCE", 0.1)
    release = threading.Event()

    def items():
        yield 0
        release.wait(SECONDS)  # a pipe that nobody writes to

    began = time.monotonic()

    def compute(item):
        raise ValueError("bad")

    try:
        with pytest.raises(ValueError, match="bad"):
            Pipeline().run(items(), compute, print)
        assert time.monotonic() - began < 5
    finally:
        release.set()
        for thread in threading.enumerate():
            if thread.name == "read":
                thread.join(SECONDS)
