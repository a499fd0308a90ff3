"""The bulk job: inputs are cut into jobs, each job becomes one shard, the same command resumes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm2vec_fast.corpus.plan import Job, fingerprint_of, settle_manifest
from llm2vec_fast.corpus.progress import Progress
from llm2vec_fast.corpus.read import (
    Columns,
    Position,
    Row,
    Source,
    count_lines,
    open_source,
    read_rows,
)
from llm2vec_fast.corpus.store import Footer, read_footer, write_shard
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.vectors import check_form, finish

ROWS_PER_SHARD = 16_384


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


@dataclass
class Summary:
    """What a run did; `reused` documents were in valid shards already."""

    output: Path
    documents: int = 0
    tokens: int = 0
    reused: int = 0
    seconds: float = 0.0
    bytes: int = 0
    statuses: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(self.statuses.items()))
        rate = self.tokens / self.seconds if self.seconds else 0
        done = f"{self.documents} documents, {self.tokens} tokens in {self.seconds:.1f} s"
        return (
            f"{done} ({rate:.0f} tokens/s), {self.reused} reused; {kinds or 'no documents'}; "
            f"{self.bytes / 1e6:.1f} MB in {self.output}"
        )


def embed(
    inputs: str | Path | Sequence[str | Path],
    model: str | Path | LLM2Vec,
    output: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    text_column: str = "text",
    id_column: str | None = None,
    keep: Sequence[str] = (),
    instruction: str | None = None,
    precision: str = "float16",
    dtype: str = "auto",
    truncate_dim: int | None = None,
    normalize: bool = False,
    pooling_mode: str | None = None,
    max_length: int | None = None,
    enable_bidirectional: bool | None = None,
    tokens_per_batch: int | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    on_error: str = "raise",
    device: str | None = None,
    show_progress: bool = True,
) -> Summary:
    """Embeds files of texts into `output`/part-*.parquet. Interrupted, the same call resumes.

    inputs:         .txt (a line a document) or .jsonl files
    model:          a path or hub name with `adapters`, or a model that is loaded already
    keep:           fields of a jsonl object that are carried into the output, as text
    precision:      of the stored vectors: float16 | float32 | int8 (with a column `scale`) | binary
    rows_per_shard: documents of a job: sorted by length together, written as one shard, redone
                    together if killed
    on_error:       "raise" stops at a row that is not text; "skip" stores it with a null vector
    The other arguments are those of `LLM2Vec.from_pretrained` and `encode`.
    returns:        a Summary
    raises:         ValueError naming file and row; ManifestError if `output` holds another job
    """
    options = Options(
        Columns(text_column, id_column, tuple(keep)), instruction, precision, truncate_dim,
        normalize, tokens_per_batch, rows_per_shard, on_error,
    )  # fmt: skip
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    inputs = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    sources = [open_source(path) for path in inputs]
    if not isinstance(model, LLM2Vec):
        model = LLM2Vec.from_pretrained(
            model, list(adapters), pooling_mode=pooling_mode, max_length=max_length,
            enable_bidirectional=enable_bidirectional, dtype=dtype, device=device,
        )  # fmt: skip
    check_form(model.dimension, truncate_dim, precision)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    settle_manifest(output, describe(sources, model, options))
    return _run(sources, model, output, options, show_progress)


def describe(sources: Sequence[Source], model: LLM2Vec, options: Options) -> dict:
    """The manifest: everything that decides a vector, and nothing per row."""
    columns = options.columns
    return {
        "inputs": [fingerprint_of(source) for source in sources],
        "columns": {"text": columns.text, "id": columns.id, "keep": list(columns.keep)},
        "rows_per_shard": options.rows_per_shard,
        "model": model.describe(),
        "vectors": {
            "instruction": options.instruction,
            "precision": options.precision,
            "normalize": options.normalize,
            "dimension": options.truncate_dim or model.dimension,
            "tokens_per_batch": options.tokens_per_batch or model.tokens_per_batch,
        },
    }


def _run(sources, model: LLM2Vec, output: Path, options: Options, shown: bool) -> Summary:
    summary, began = Summary(output), time.monotonic()
    with Progress(count_lines(sources) if shown else None, shown) as progress:
        for job, rows, start, end in _jobs(sources, output, options, summary, progress.update):
            footer = run_shard(job, rows, start, end, model, output, options, progress.update)
            summary.documents += footer.rows
            summary.tokens += footer.tokens
            summary.statuses.update(footer.statuses)
    summary.seconds = time.monotonic() - began
    summary.bytes = sum(path.stat().st_size for path in output.glob("part-*.parquet"))
    return summary


def _jobs(
    sources: Sequence[Source],
    output: Path,
    options: Options,
    summary: Summary,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[Job, list[Row], Position, Position]]:
    """The jobs that have no valid shard yet, in order, with their rows."""
    for index, source in enumerate(sources):
        position, number = Position(), 0
        while True:
            job = Job(index, number)
            footer = read_footer(output / job.shard)
            if footer is not None and footer.first_row == position.row:
                position = Position(footer.first_row + footer.rows, footer.end_offset)
                summary.reused += footer.rows
                progress(footer.rows, 0)
            else:
                start = position
                rows, position = read_rows(source, options.columns, start, options.rows_per_shard)
                if not rows:
                    break
                yield job, rows, start, position
            number += 1


def run_shard(
    job: Job,
    rows: list[Row],
    start: Position,
    end: Position,
    encoder: LLM2Vec,
    output: Path,
    options: Options,
    progress: Callable[[int, int], None] | None = None,
) -> Footer:
    """One job, whole: rows to vectors to a finished shard. The one worker of every kind of run."""
    for at, row in enumerate(rows):
        if row.error and options.on_error == "raise":
            raise ValueError(
                f"row {start.row + at} ({row.id}): {row.error}. Mend it, or use --on-error skip: "
                "the row is then stored with status 'error' and no vector."
            )
    good = [at for at, row in enumerate(rows) if not row.error]
    instruction = options.instruction or ""
    tokens = encoder.tokenizer([rows[at].text for at in good], [instruction] * len(good))
    vectors = np.zeros((len(rows), encoder.dimension), dtype=np.float32)
    vectors[good] = encoder.embed_tokens(tokens, options.tokens_per_batch, progress=progress)
    statuses, notes = ["error"] * len(rows), [row.error for row in rows]
    n_tokens = np.zeros(len(rows), dtype=np.int32)
    for at, found in zip(good, tokens, strict=True):
        statuses[at], notes[at], n_tokens[at] = found.status, found.note, len(found)
    for at in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
        if options.on_error == "raise":
            raise ValueError(f"row {start.row + at} ({rows[at].id}): the vector is not finite")
        statuses[at], notes[at], vectors[at] = "error", "the vector is not finite", 0
    stored, scale = finish(vectors, options.truncate_dim, options.normalize, options.precision)
    if progress:
        progress(len(rows) - len(good), 0)
    return write_shard(
        output / job.shard, rows, options.columns.keep, stored, scale, n_tokens, statuses, notes,
        precision=options.precision, first_row=start.row, offsets=(start.offset, end.offset),
    )  # fmt: skip
