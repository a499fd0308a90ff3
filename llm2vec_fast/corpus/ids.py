"""Ids that must be unique over a whole corpus, kept on disk: memory does not grow with them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

FILE = "ids.sqlite"
PATIENCE = 120.0  # seconds to wait for another rank's transaction
TABLES = """
CREATE TABLE IF NOT EXISTS ids (id TEXT PRIMARY KEY, source INT, row INT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (name TEXT PRIMARY KEY) WITHOUT ROWID;
"""


class DuplicateIdError(ValueError):
    """Two rows with one id."""


class UniqueIds:
    """All ids of an output directory with their rows, shared by the ranks of one machine.

    A shard's ids are one transaction, and recording the same row again is no conflict: so a run
    that is killed in between can be repeated. SQLite's write-ahead log needs a local file system.

    names: of the inputs, for messages
    """

    def __init__(self, output: Path, names: Sequence[str]):
        self.names, self.path = names, output / FILE
        # Opened by the thread that starts the run, used by the one that reads.
        self.connection = sqlite3.connect(
            self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            _patiently(lambda: self.connection.execute("PRAGMA journal_mode=WAL"))
            self.connection.execute("PRAGMA synchronous=NORMAL")
            self.connection.executescript(TABLES)
        except sqlite3.DatabaseError as error:
            self.connection.close()
            raise ValueError(
                f"{self.path} cannot be used: {error}. It can be deleted: the next run makes it "
                "again from the finished shards."
            ) from error

    def __enter__(self) -> UniqueIds:
        return self

    def __exit__(self, *exc_info) -> None:
        self.connection.close()

    def knows(self, shard: str) -> bool:
        """Whether this shard's ids are recorded."""
        found = self.connection.execute("SELECT 1 FROM shards WHERE name = ?", (shard,))
        return found.fetchone() is not None

    def record(self, shard: str, source: int, ids: Iterable[tuple[int, str]]) -> None:
        """Adds the (row, id) pairs of a shard.

        raises: DuplicateIdError naming both rows, OSError; nothing of the shard is recorded then
        """
        rows = [(id, source, row) for row, id in ids]
        try:
            with self.connection:  # commits, or rolls back on an error
                self.connection.execute("BEGIN IMMEDIATE")
                before = self.connection.total_changes
                self.connection.executemany("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", rows)
                if self.connection.total_changes - before < len(rows):
                    self._refuse_other_rows(rows)
                self.connection.execute("INSERT OR IGNORE INTO shards VALUES (?)", (shard,))
        except sqlite3.OperationalError as error:  # disk full, another rank hangs
            raise OSError(
                f"{self.path} cannot be written: {error}. Finished shards are safe: the same "
                "command goes on."
            ) from error

    def _refuse_other_rows(self, rows: list[tuple[str, int, int]]) -> None:
        for id, source, row in rows:
            place = self.connection.execute("SELECT source, row FROM ids WHERE id = ?", (id,))
            first = place.fetchone()
            if first != (source, row):
                raise DuplicateIdError(
                    f"row {row} of {self.names[source]} has the id {id!r:.80} of row {first[1]} of "
                    f"{self.names[first[0]]}. Make the ids unique, or leave out --unique-ids."
                )


def _patiently(step: Callable[[], object]) -> None:
    """Runs what SQLite refuses at once, without its own patience, where another rank is at it."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            step()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
