"""Three stages at once: a thread reads ahead, the caller's thread computes, a thread stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

Read = TypeVar("Read")
Made = TypeVar("Made")

# Jobs between the first row read and the shard on disk: one in each stage, and one to spare.
ALIVE = 4
# How long a reader that hangs (on a pipe nobody writes to) may hold up the end of a failed run.
PATIENCE = 5.0
END = object()


class Stopped(Exception):
    """Raised in a stage because another one failed; never reaches the caller."""


class Clock:
    """Seconds by (stage, what it waited for; "" while it worked). A stage belongs to one thread."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}
        self.inner = threading.local()  # seconds that measures within the current one took

    @contextmanager
    def measure(self, stage: str, waits_for: str = "") -> Iterator[None]:
        """Within another measure of the same thread it takes its time off that one: so the seconds
        of a thread add up to its life, with nothing counted twice.
        """
        outside, self.inner.seconds = getattr(self.inner, "seconds", 0.0), 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.add(stage, spent - self.inner.seconds, waits_for)
            self.inner.seconds = outside + spent

    def add(self, stage: str, seconds: float, waits_for: str = "") -> None:
        key = stage, waits_for
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds


class Queue:
    """A queue that notes its depth, without the END, whenever an item comes or is asked for."""

    def __init__(self) -> None:
        self.items: SimpleQueue = SimpleQueue()
        self.lock = threading.Lock()  # two threads note
        self.depth = self.notes = self.total = self.most = 0

    def put(self, item) -> None:
        if item is not END:
            self._note(1)
        self.items.put(item)

    def get(self):
        self._note(0)
        item = self.items.get()
        with self.lock:
            self.depth -= item is not END
        return item

    @property
    def mean(self) -> float:
        return self.total / max(self.notes, 1)

    def _note(self, more: int) -> None:
        with self.lock:
            self.depth += more
            self.notes += 1
            self.total += self.depth
            self.most = max(self.most, self.depth)


class Pipeline:
    """`run` moves items through the stages, in order; the first error of any stage ends them all.

    What bounds memory is the number of items alive, not the length of queues: so no stage ever
    waits to hand something over, and there is nothing to deadlock on. The clock knows the stages
    as read, forward and write; a stage that shares a thread measures itself within.
    """

    def __init__(self, clock: Clock | None = None, alive: int = ALIVE):
        self.clock = clock or Clock()
        self.stop = threading.Event()
        self.slots = threading.Semaphore(alive)
        self.ready, self.made = Queue(), Queue()
        self.jobs = 0  # items computed so far
        self.first_after: float | None = None  # seconds until the first could be computed
        self.unstored = 0  # items that are computed
        self.stored = threading.Condition()
        self.error: BaseException | None = None

    def check(self) -> None:
        """To be called within long stages: raises Stopped when the run is over."""
        if self.stop.is_set():
            raise Stopped

    def settle(self) -> None:
        """To be called within `compute`: waits until everything computed before is stored. So no
        more than one computed item is lost by a kill.
        """
        with self.clock.measure("forward", "the job before"), self.stored:
            self.stored.wait_for(lambda: not self.unstored or self.stop.is_set())
        self.check()

    def run(
        self,
        items: Iterator[Read],
        compute: Callable[[Read], Made],
        store: Callable[[Made], None],
    ) -> None:
        """items are drawn in one thread, computed here, stored in another thread.

        An interrupt (or any error here) still stores what is computed already.
        """
        # Daemons: a reader that hangs must not keep the process.
        reader = threading.Thread(target=self._read, args=(items,), name="read", daemon=True)
        writer = threading.Thread(target=self._store, args=(store,), name="store", daemon=True)
        began = time.perf_counter()
        reader.start()
        writer.start()
        try:
            while True:
                with self.clock.measure("forward", "input"):
                    item = self.ready.get()
                if item is END or self.stop.is_set():
                    break
                if self.first_after is None:
                    self.first_after = time.perf_counter() - began
                with self.clock.measure("forward"):
                    self.made.put(compute(item))
                self.jobs += 1
                with self.stored:
                    self.unstored += 1
                del item  # or the last job would live while the next one is waited for
        except Stopped:
            pass
        except BaseException:
            self.stop.set()
            raise
        finally:
            self.made.put(END)
            with self.clock.measure("forward", "the job before"):
                writer.join()
            self.stop.set()
            self.slots.release()
            reader.join(PATIENCE)
        if self.error is not None:
            raise self.error

    def _read(self, items: Iterator[Read]) -> None:
        try:
            while True:
                with self.clock.measure("read", "a free slot"):
                    self.slots.acquire()
                if self.stop.is_set():
                    return
                with self.clock.measure("read"):
                    item = next(items, END)
                self.ready.put(item)
                if item is END:
                    return
                del item
        except Stopped:
            pass
        except BaseException as error:
            self._fail(error)
        finally:
            close = getattr(items, "close", None)  # a generator closes its files
            if close:
                close()

    def _store(self, store: Callable[[Made], None]) -> None:
        try:
            while True:
                with self.clock.measure("write", "input"):
                    item = self.made.get()
                if item is END:
                    return
                with self.clock.measure("write"):
                    store(item)
                del item
                self.slots.release()
                with self.stored:
                    self.unstored -= 1
                    self.stored.notify_all()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.stop.set()
        self.ready.put(END)
        with self.stored:
            self.stored.notify_all()
