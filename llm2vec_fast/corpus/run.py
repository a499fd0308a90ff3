"""The bulk job: inputs are cut into jobs, each job becomes one shard, the same command resumes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llm2vec_fast.corpus.atomic import atomically, clean_partials
from llm2vec_fast.corpus.ids import UniqueIds
from llm2vec_fast.corpus.lock import Locks
from llm2vec_fast.corpus.pipeline import Clock, Pipeline
from llm2vec_fast.corpus.plan import STDIN, fingerprint_of, in_order, settle_manifest
from llm2vec_fast.corpus.progress import Progress
from llm2vec_fast.corpus.read import Columns, Source, open_sources, size_of
from llm2vec_fast.corpus.walk import Rank, Walk
from llm2vec_fast.corpus.worker import (
    ROWS_PER_SHARD,
    Options,
    Work,
    compute,
    prepare,
    run_shard,
    store,
)
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.vectors import check_form

__all__ = ["Options", "Summary", "Work", "describe", "embed", "run_shard"]


@dataclass
class Summary:
    """What a run did; `reused` documents were in valid shards already.

    stages: seconds spent reading, tokenising, in the forward pass, writing (side by side), and
            waiting: the forward pass for rows
    """

    output: Path
    documents: int = 0
    tokens: int = 0
    reused: int = 0
    damaged: int = 0
    seconds: float = 0.0
    bytes: int = 0
    rank: int = 0
    world: int = 1
    statuses: Counter = field(default_factory=Counter)
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(self.statuses.items()))
        seconds = self.seconds or 1e-9
        stages = ", ".join(f"{name} {spent:.1f}" for name, spent in sorted(self.stages.items()))
        lines = [
            f"{self.documents} documents, {self.tokens} tokens in {self.seconds:.1f} s "
            f"({self.tokens / seconds:.0f} tokens/s, {self.documents / seconds:.1f} documents/s), "
            f"{self.reused} reused",
            f"{kinds or 'no documents'}; {self.bytes / 1e6:.1f} MB in {self.output}",
            f"seconds by stage, side by side: {stages}" if stages else "",
            f"{self.damaged} damaged shards were done again" if self.damaged else "",
            f"this is rank {self.rank} of {self.world}" if self.world > 1 else "",
            *self.notes,
        ]
        return "\n".join(filter(None, lines))

    def as_json(self) -> str:
        """The same for programs."""
        return json.dumps(vars(self) | {"output": str(self.output)})


def embed(
    inputs: str | Path | Sequence[str | Path],
    model: str | Path | LLM2Vec,
    output: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    whole_files: bool = False,
    text_column: str = "text",
    id_column: str | None = None,
    keep: Sequence[str] = (),
    instruction: str | None = None,
    precision: str = "float16",
    output_format: str = "parquet",
    dtype: str = "auto",
    truncate_dim: int | None = None,
    normalize: bool = False,
    pooling_mode: str | None = None,
    max_length: int | None = None,
    enable_bidirectional: bool | None = None,
    tokens_per_batch: int | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    on_error: str = "raise",
    append: bool = False,
    verify: bool = False,
    unique_ids: bool = False,
    device: str | None = None,
    show_progress: bool = True,
) -> Summary:
    """Embeds a corpus into shards `output`/part-*.parquet. Interrupted, the same call resumes.

    inputs:         files (.txt, .jsonl, .csv, .tsv, .parquet; also .gz, .zst), directories, globs,
                    fsspec URLs, or "-" for standard input
    model:          a path or hub name with `adapters`, or a model that is loaded already
    whole_files:    each file is one document
    keep:           fields of a row that are carried into the output, as text
    precision:      of the stored vectors: float16 | float32 | int8 (with a column `scale`) | binary
    output_format:  parquet, or npy: vectors in part-*.npy beside, for memory mapping
    rows_per_shard: documents of a job: sorted by length together, written as one shard, redone
                    together if killed
    on_error:       "raise" stops at a row that is not text; "skip" stores it with a null vector
    append:         the output may be of fewer inputs; those must be unchanged
    verify:         read every byte of finished shards first, and redo the damaged ones
    unique_ids:     refuse ids that occur twice; they are kept on disk in the output directory
    The other arguments are those of `LLM2Vec.from_pretrained` and `encode`.

    Several processes started by torchrun share the jobs; each uses the GPU of its LOCAL_RANK.
    returns:        a Summary of this process, also written to `output`/summary-<rank>.json
    raises:         ValueError naming file and row; ManifestError if `output` holds another job;
                    LockError if another process is writing there; OSError if the disk is full
    """
    options = Options(
        Columns(text_column, id_column, tuple(keep)), instruction, precision, truncate_dim,
        normalize, tokens_per_batch, rows_per_shard, on_error, output_format,
    )  # fmt: skip
    if unique_ids and id_column is None:
        raise ValueError("unique_ids needs an id_column: ids made of file and row are unique")
    rank, output = Rank.from_environment(), Path(output)
    sources = in_order(output, open_sources(_listed(inputs), whole_files))
    if rank.world > 1 and any(source.name == STDIN for source in sources):
        raise ValueError("standard input cannot be shared among processes: give files")
    if not isinstance(model, LLM2Vec):
        model = LLM2Vec.from_pretrained(
            model, list(adapters), pooling_mode=pooling_mode, max_length=max_length,
            enable_bidirectional=enable_bidirectional, dtype=dtype, device=_device(device, rank),
        )  # fmt: skip
    check_form(model.dimension, truncate_dim, precision)
    output.mkdir(parents=True, exist_ok=True)
    settle_manifest(output, describe(sources, model, options), append)
    clean_partials(output)
    return _start(sources, model, output, options, rank, verify, unique_ids, show_progress)


def describe(sources: Sequence[Source], model: LLM2Vec, options: Options) -> dict:
    """The manifest: everything that decides a vector, and nothing per row."""
    columns = options.columns
    return {
        "inputs": [fingerprint_of(source) for source in sources],
        "columns": {"text": columns.text, "id": columns.id, "keep": list(columns.keep)},
        "rows_per_shard": options.rows_per_shard,
        "output_format": options.output_format,
        "model": model.describe(),
        "vectors": {
            "instruction": options.instruction,
            "precision": options.precision,
            "normalize": options.normalize,
            "dimension": options.truncate_dim or model.dimension,
            "tokens_per_batch": options.tokens_per_batch or model.tokens_per_batch,
        },
    }


def _listed(inputs: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [inputs] if isinstance(inputs, str | Path) else list(inputs)


def _device(device: str | None, rank: Rank) -> str | None:
    """Of several processes, each takes the GPU of its local rank."""
    if rank.world == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    if rank.local >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={rank.local}, but there are {torch.cuda.device_count()} GPUs: start as "
            "many processes as GPUs"
        )
    torch.cuda.set_device(rank.local)
    return f"cuda:{rank.local}"


def _start(
    sources: Sequence[Source],
    model: LLM2Vec,
    output: Path,
    options: Options,
    rank: Rank,
    verify: bool,
    unique_ids: bool,
    show_progress: bool,
) -> Summary:
    """Takes what a run holds on to, runs, and gives it back whatever happens."""
    sizes = [size_of(source) for source in sources]
    total = None if None in sizes else sum(sizes)
    shown = show_progress and rank.rank == 0
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(total, shown, 1 / rank.world))
        locks = stack.enter_context(Locks(output))
        ids = None
        if unique_ids:
            ids = stack.enter_context(UniqueIds(output, [source.name for source in sources]))
        walk = Walk(
            sources, sizes, output, options, rank, locks, progress, Clock(), ids=ids, verify=verify
        )
        summary = _run(walk, model)
    if any(source.name == STDIN for source in sources):
        summary.notes.append(
            "standard input cannot be resumed or appended to unless the same bytes come again"
        )
    path = output / f"summary-{rank.rank:05d}.json"
    with atomically(path) as file:
        file.write((summary.as_json() + "\n").encode())
    return summary


def _run(walk: Walk, model: LLM2Vec) -> Summary:
    """Reading and tokenising, the forward pass, and writing, side by side."""
    rank, clock, progress, options = walk.rank, walk.clock, walk.progress, walk.options
    summary = Summary(walk.output, rank=rank.rank, world=rank.world, stages=clock.seconds)
    line, began = Pipeline(clock), time.monotonic()

    def prepared() -> Iterator[Work]:
        for work in walk:
            line.check()
            with clock.measure("tokenise"), _named(work):
                work = prepare(work, model, options)
            yield work
            del work

    def forward(work: Work) -> Work:
        budget = options.tokens_per_batch or model.tokens_per_batch
        with clock.measure("forward"), _named(work):
            return compute(work, model, options, _counter(work, budget, line, progress))

    def finish(work: Work) -> None:
        with clock.measure("write"), _named(work):
            footer = store(work, walk.output, options).footer
        walk.locks.give_back(work.job.shard)
        progress.pass_by(work.size)
        progress.finished(work.size, footer.tokens)
        summary.documents += footer.rows
        summary.tokens += footer.tokens
        summary.statuses.update(footer.statuses)

    line.run(prepared(), forward, finish)
    summary.reused, summary.damaged = walk.reused, len(walk.damaged)
    summary.seconds = time.monotonic() - began
    shards = [*walk.output.glob("part-*.parquet"), *walk.output.glob("part-*.npy")]
    summary.bytes = sum(path.stat().st_size for path in shards)
    return summary


def _counter(work: Work, budget: int, line: Pipeline, progress: Progress):
    """Counts the batches of a job. Before the last one the job before must be stored: so a kill
    costs one computed job at most, and writing still goes on beside the forward pass.
    """
    left = sum(map(len, work.tokens))

    def count(documents: int, tokens: int) -> None:
        nonlocal left
        line.check()
        progress.update(documents, tokens)
        left -= tokens
        if left <= budget:
            line.settle()

    return count


@contextmanager
def _named(work: Work) -> Iterator[None]:
    """Errors tell which rows they are about; interrupts do not."""
    try:
        yield
    except Exception as error:
        if work.source.name not in str(error):
            error.add_note(f"in {work}")
        raise
