"""The one worker of every kind of run: rows to tokens, tokens to vectors, vectors to a shard.

`run_shard` is the three one after the other; the local loop runs them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm2vec_fast.corpus.plan import Job
from llm2vec_fast.corpus.read import Columns, Position, Row, Rows, Source
from llm2vec_fast.corpus.store import Footer, write_shard
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.text import Tokens
from llm2vec_fast.vectors import finish

ROWS_PER_SHARD = 16_384
Progress = Callable[[int, int], None]  # (documents, tokens) of a batch that is queued


@dataclass(frozen=True)
class Options:
    """How texts become stored vectors, beyond the model's own settings."""

    columns: Columns = field(default_factory=Columns)
    instruction: str | None = None
    precision: str = "float16"
    truncate_dim: int | None = None
    normalize: bool = False
    tokens_per_batch: int | None = None
    rows_per_shard: int = ROWS_PER_SHARD
    on_error: str = "raise"
    output_format: str = "parquet"

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {self.on_error!r}")
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {self.rows_per_shard}")
        if self.output_format not in ("parquet", "npy"):
            raise ValueError(f"output_format must be parquet or npy, got {self.output_format!r}")


@dataclass
class Work:
    """A job on its way to a shard; each stage adds its part and drops what nobody needs further."""

    job: Job
    source: Source
    rows: list[Row]
    start: Position
    end: Position
    size: int = 0  # bytes of input, for estimates
    tokens: list[Tokens] = field(default_factory=list)  # one a row; empty for rows without text
    vectors: Callable[[], np.ndarray] | None = None  # waits for the device
    footer: Footer | None = None

    def name_of(self, at: int) -> str:
        """A row as a person finds it."""
        row = f"row {self.start.row + at} of {self.source.name}"
        own = self.rows[at].id
        return row if own == f"{self.source.name}:{self.start.row + at}" else f"{row} (id {own})"

    def __str__(self) -> str:
        last = self.end.row - 1
        return f"rows {self.start.row} to {last} of {self.source.name} ({self.job.shard})"


def prepare(work: Work, encoder: LLM2Vec, options: Options) -> Work:
    """Tokenises the rows and lets go of their texts.

    raises: ValueError naming a row that is not text, unless errors are skipped
    """
    rows, good = work.rows, [at for at, row in enumerate(work.rows) if not row.error]
    if len(good) < len(rows) and options.on_error == "raise":
        at = next(at for at, row in enumerate(rows) if row.error)
        raise ValueError(
            f"{work.name_of(at)}: {rows[at].error}. Mend it, or use --on-error skip: the row is "
            "then stored with status 'error' and no vector."
        )
    instruction = options.instruction or ""
    found = encoder.tokenizer([rows[at].text for at in good], [instruction] * len(good))
    nothing = np.empty(0, dtype=np.int32)
    work.tokens = [Tokens(nothing, 0, 0, "error", row.error) for row in rows]
    for at, tokens in zip(good, found, strict=True):
        work.tokens[at] = tokens
        tokens.note = "; ".join(filter(None, (rows[at].note, tokens.note)))
    for row in rows:
        row.text = ""
    return work


def compute(
    work: Work, encoder: LLM2Vec, options: Options, progress: Progress | None = None
) -> Work:
    """Tokens to fp32 vectors, queued on the device: `store` waits for them. Batches depend on the
    job alone, so a resumed run repeats them.

    raises: ValueError naming a row that does not fit into the device's memory, unless errors are
            skipped
    """

    def too_long(at: int) -> None:
        told = f"its {len(work.tokens[at])} tokens do not fit into the device's memory"
        if options.on_error == "raise":
            raise ValueError(f"{work.name_of(at)}: {told}. Use --max-length, or --on-error skip.")
        work.tokens[at] = Tokens(work.tokens[at].ids[:0], 0, 0, "error", told)

    work.vectors = encoder.embed_tokens(
        work.tokens, options.tokens_per_batch, progress=progress, too_long=too_long
    )
    return work


def store(work: Work, output: Path, options: Options) -> Work:
    """Waits for the vectors, truncates, normalises, quantises, and writes the shard."""
    vectors, work.vectors = work.vectors(), None  # what they were downloaded into is free again
    statuses = [tokens.status for tokens in work.tokens]
    notes = [tokens.note for tokens in work.tokens]
    for at in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
        if options.on_error == "raise":
            raise ValueError(
                f"{work.name_of(at)}: the vector is not finite. Use --dtype bfloat16 or float32, "
                "or --on-error skip."
            )
        statuses[at], notes[at], vectors[at] = "error", "the vector is not finite", 0
    stored, scale = finish(vectors, options.truncate_dim, options.normalize, options.precision)
    work.footer = write_shard(
        output / work.job.shard, work.rows, options.columns.keep, stored, scale,
        np.array([len(tokens) for tokens in work.tokens], dtype=np.int32), statuses, notes,
        precision=options.precision, first_row=work.start.row,
        offsets=(work.start.offset, work.end.offset), output_format=options.output_format,
    )  # fmt: skip
    return work


def run_shard(
    work: Work,
    encoder: LLM2Vec,
    output: Path,
    options: Options,
    progress: Progress | None = None,
    turn: AbstractContextManager = nullcontext(),  # noqa: B008
) -> Footer:
    """One job, whole: rows to vectors to a finished shard. A job that comes without its rows, as to
    another machine, reads them.

    turn: held during the forward pass; a lock where several threads share the encoder
    """
    with named(work):
        if not work.rows:
            fetch(work, options)
        prepare(work, encoder, options)
        with turn:
            compute(work, encoder, options, progress)
        return store(work, output, options).footer


def fetch(work: Work, options: Options) -> None:
    """Reads the rows of a job. Raises ValueError if its input has changed since the job was cut."""
    with Rows(work.source, options.columns, work.start) as rows:
        work.rows, end = rows.take(options.rows_per_shard)
    if end != work.end:
        raise ValueError(
            f"{work} end at {end} here, they ended at {work.end} where the job was cut: the input "
            "has changed since, or machines do not see the same file"
        )


@contextmanager
def named(work: Work) -> Iterator[None]:
    """Errors tell which rows they are about; interrupts do not."""
    try:
        yield
    except Exception as error:
        if work.source.name not in str(error):
            error.add_note(f"in {work}")
        raise
