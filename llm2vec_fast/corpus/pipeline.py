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
    """Seconds by stage. Every stage belongs to one thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


class Pipeline:
    """`run` moves items through the stages, in order; the first error of any stage ends them all.

    What bounds memory is the number of items alive, not the length of queues: so no stage ever
    waits to hand something over, and there is nothing to deadlock on.
    """

    def __init__(self, clock: Clock | None = None, alive: int = ALIVE):
        self.clock = clock or Clock()
        self.stop = threading.Event()
        self.slots = threading.Semaphore(alive)
        self.ready: SimpleQueue = SimpleQueue()
        self.made: SimpleQueue = SimpleQueue()
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
        with self.stored:
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
        reader.start()
        writer.start()
        try:
            while True:
                with self.clock.measure("waiting"):
                    item = self.ready.get()
                if item is END or self.stop.is_set():
                    break
                self.made.put(compute(item))
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
            writer.join()
            self.stop.set()
            self.slots.release()
            reader.join(PATIENCE)
        if self.error is not None:
            raise self.error

    def _read(self, items: Iterator[Read]) -> None:
        try:
            while self.slots.acquire() and not self.stop.is_set():
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
            while (item := self.made.get()) is not END:
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
