"""The jobs that are still to do, in order, with their rows: what the reading thread walks over."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path

import pyarrow.parquet as pq

from llm2vec_fast.corpus.ids import UniqueIds
from llm2vec_fast.corpus.lock import Locks
from llm2vec_fast.corpus.pipeline import Clock
from llm2vec_fast.corpus.plan import Job
from llm2vec_fast.corpus.progress import Progress
from llm2vec_fast.corpus.read import Position, Rows, Source
from llm2vec_fast.corpus.store import Footer, check_shard, read_footer, read_shard
from llm2vec_fast.corpus.worker import Options, Work

BY_BYTES = ("txt", "jsonl", "csv", "tsv")


@dataclass(frozen=True)
class Rank:
    """Which of several processes this is: it takes every `world`-th job."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> Rank:
        """As torchrun tells it; alone where nothing does. Raises ValueError on nonsense."""
        told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        if told["RANK"] is None or told["WORLD_SIZE"] is None:
            return cls()
        try:
            rank, world = int(told["RANK"]), int(told["WORLD_SIZE"])
            found = cls(rank, world, int(told["LOCAL_RANK"] or rank))
        except ValueError as error:
            raise ValueError(f"{told} in the environment are not all numbers") from error
        if not 0 <= found.rank < found.world:
            raise ValueError(f"RANK={rank} must be between 0 and WORLD_SIZE={world} - 1")
        return found


@dataclass
class Walk:
    """Iterates over the jobs of this rank without a valid shard, locked; counts the others.

    verify:    read every byte of finished shards, and redo those that are damaged
    elsewhere: the jobs go to other processes, which read the rows themselves where they can: of
               inputs that can be read from the middle, unless the ids are asked for here
    """

    sources: Sequence[Source]
    sizes: Sequence[int | None]  # bytes of each source, None if unknown
    output: Path
    options: Options
    rank: Rank
    locks: Locks
    progress: Progress
    clock: Clock
    ids: UniqueIds | None = None
    verify: bool = False
    elsewhere: bool = False
    reused: int = 0
    damaged: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Work]:
        turn = count()  # over the jobs of all sources, alike in every rank
        for number, source in enumerate(self.sources):
            with _Reader(source, self.options) as reader:
                yield from self._jobs(number, source, reader, turn)

    def _jobs(self, number: int, source: Source, reader: _Reader, turn) -> Iterator[Work]:
        position, full = Position(), self.options.rows_per_shard
        passed = 0
        for n in count():
            job, start = Job(number, n), position
            mine = next(turn) % self.rank.world == self.rank.rank
            footer, rows = self._footer(job, start, mine), []
            if footer is not None:
                position = Position(start.row + footer.rows, footer.end_offset)
                self._reuse(job, footer, mine)
            else:
                with self.clock.measure("read"):
                    if mine and not (self.elsewhere and source.seekable and not self.ids):
                        rows, position = reader.take(start)
                    else:
                        position = reader.skip(start)
            last = position.row - start.row < full
            size, passed = self._bytes(source, number, position, passed, last)
            if mine and footer is None and position.row > start.row:
                if self.ids:
                    known = [(start.row + at, r.id) for at, r in enumerate(rows) if not r.error]
                    self.ids.record(job.shard, number, known)
                yield Work(job, source, rows, start, position, size)
            else:
                self.progress.pass_by(size)
                self.locks.give_back(job.shard)
            if last:
                return

    def finished(self, work: Work, footer: Footer) -> None:
        """To be told of each job when its shard is there."""
        self.locks.give_back(work.job.shard)
        self.progress.pass_by(work.size)
        self.progress.finished(work.size, footer.tokens)

    def _footer(self, job: Job, start: Position, mine: bool) -> Footer | None:
        """The footer of a job's shard; None, and a lock if the job is ours, where it is to do."""
        footer = self._valid_footer(job, start, mine)
        if footer is None and mine:
            self.locks.take(job.shard)
            # Who held the lock until now may have finished it.
            footer = self._valid_footer(job, start, mine)
        return footer

    def _valid_footer(self, job: Job, start: Position, mine: bool) -> Footer | None:
        path = self.output / job.shard
        footer = read_footer(path)
        if footer is None or (footer.first_row, footer.start_offset) != (start.row, start.offset):
            return None
        if self.verify and mine and job.shard not in self.damaged and (why := check_shard(path)):
            self.damaged.append(job.shard)
            self.progress.say(f"{job.shard} is damaged and done again: {why}")
        return None if job.shard in self.damaged else footer

    def _reuse(self, job: Job, footer: Footer, mine: bool) -> None:
        if not mine:
            return
        self.reused += footer.rows
        if self.ids and not self.ids.knows(job.shard):
            table = read_shard(self.output / job.shard, ["id", "status"])
            pairs = zip(*(table.column(name).to_pylist() for name in ("id", "status")), strict=True)
            rows = [(footer.first_row + at, id) for at, (id, s) in enumerate(pairs) if s != "error"]
            self.ids.record(job.shard, job.source, rows)

    def _bytes(self, source, number: int, position: Position, passed: int, last: bool):
        """(bytes of input since `passed`, the new `passed`): exact where offsets are bytes, by rows
        where their number is known, else all at the end of the input.
        """
        size = self.sizes[number] or 0
        now = size if last else passed
        if not last and source.format in BY_BYTES and source.seekable:
            now = min(position.offset, size)
        elif not last and (rows := _rows_in(source)):
            now = size * min(position.row, rows) // rows
        return now - passed, now


@lru_cache(maxsize=2)
def _rows_in(source: Source) -> int | None:
    """The number of rows where it is known without reading them."""
    if source.format == "files":
        return len(source.files)
    if source.format == "parquet" and "://" not in source.files[0]:
        return pq.read_metadata(source.files[0]).num_rows
    return None


class _Reader:
    """The rows of one source, opened when they are needed, and moved only forwards where the
    source cannot seek.
    """

    def __init__(self, source: Source, options: Options):
        self.source, self.options = source, options
        self.rows: Rows | None = None
        self.at = Position()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exc_info) -> None:
        if self.rows is not None:
            self.rows.__exit__(*exc_info)
            self.rows = None

    def take(self, start: Position):
        rows, self.at = self._opened(start).take(self.options.rows_per_shard)
        return rows, self.at

    def skip(self, start: Position) -> Position:
        self.at = self._opened(start).skip(self.options.rows_per_shard)
        return self.at

    def _opened(self, start: Position) -> Rows:
        if self.rows is not None and self.source.seekable and self.at != start:
            self.__exit__(None, None, None)
        if self.rows is None:
            self.at = start if self.source.seekable else Position()
            self.rows = Rows(self.source, self.options.columns, self.at).__enter__()
        if self.at.row < start.row:
            self.at = self.rows.skip(start.row - self.at.row)
        if self.at.row != start.row:
            raise ValueError(
                f"{self.source.name} ends at row {self.at.row}, but shards were made of "
                f"{start.row} rows of it. Give the same input, or another output directory."
            )
        return self.rows
