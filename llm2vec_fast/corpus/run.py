"""The bulk job: inputs are cut into jobs, each job becomes one shard, the same command resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm2vec_fast.corpus.atomic import atomically, clean_partials
from llm2vec_fast.corpus.ids import UniqueIds
from llm2vec_fast.corpus.lock import Locks
from llm2vec_fast.corpus.pipeline import Clock, Pipeline
from llm2vec_fast.corpus.place import is_remote, place_of, size_of_shards
from llm2vec_fast.corpus.plan import STDIN, fingerprint_of, in_order, settle_manifest
from llm2vec_fast.corpus.progress import Profile, Progress
from llm2vec_fast.corpus.read import Columns, Source, open_sources, size_of
from llm2vec_fast.corpus.summary import Summary
from llm2vec_fast.corpus.walk import Rank, Walk
from llm2vec_fast.corpus.worker import (
    ROWS_PER_SHARD,
    Options,
    Work,
    compute,
    named,
    prepare,
    run_shard,
    store,
)
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.vectors import check_form

if TYPE_CHECKING:
    from llm2vec_fast.corpus.ray import Cluster

__all__ = ["Options", "Summary", "Work", "describe", "embed", "run_shard"]


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
    profile: bool = False,
    cluster: Cluster | None = None,
) -> Summary:
    """Embeds a corpus into shards `output`/part-*.parquet. Interrupted, the same call resumes.

    inputs:         files (.txt, .jsonl, .csv, .tsv, .parquet; also .gz, .zst), directories, globs,
                    fsspec URLs, or "-" for standard input
    output:         a directory, or an fsspec URL (s3://...), where each shard is one put, and two
                    runs at once are not told apart
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
    profile:        print on stderr what the stages did and waited for (it is measured anyway)
    cluster:        Ray's workers do the jobs (`corpus.ray.Cluster`), not this process; `model` must
                    be a name then
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
    if profile and cluster is not None:
        raise ValueError("--profile looks at the stages of one process: leave it out with --ray")
    if unique_ids and id_column is None:
        raise ValueError("unique_ids needs an id_column: ids made of file and row are unique")
    rank, output = Rank.from_environment(), place_of(output)
    if unique_ids and is_remote(output):
        raise ValueError("unique_ids keeps ids on disk: the output must be a directory, not a URL")
    if rank.world > 1 and is_remote(output):
        raise ValueError(f"{output} knows no locks for the ranks of torchrun: use --ray")
    sources = in_order(output, open_sources(_listed(inputs), whole_files))
    if rank.world > 1 and any(source.name == STDIN for source in sources):
        raise ValueError("standard input cannot be shared among processes: give files")
    loading: dict[str, Any] = {
        "pooling_mode": pooling_mode, "max_length": max_length, "dtype": dtype,
        "enable_bidirectional": enable_bidirectional, "device": _device(device, rank),
    }  # fmt: skip
    with ExitStack() as stack:
        if cluster is not None:
            workers = stack.enter_context(cluster.start(model, adapters, loading, output, rank))
            do_all, wanted = workers.do_all, workers.describe(sources, options)
        else:
            if not isinstance(model, LLM2Vec):
                model = LLM2Vec.from_pretrained(model, list(adapters), **loading)
            do_all, wanted = partial(_run, model=model), describe(sources, model, options)
        output.mkdir(parents=True, exist_ok=True)
        settled = settle_manifest(output, wanted, append, any_budget=tokens_per_batch is None)
        # What was settled when the job began, whatever memory is free today.
        options = replace(options, tokens_per_batch=settled["vectors"]["tokens_per_batch"])
        clean_partials(output)
        summary = _start(
            sources, do_all, output, options, rank, verify, unique_ids, show_progress,
            elsewhere=cluster is not None,
        )  # fmt: skip
    if profile and rank.rank == 0:
        from rich.console import Console

        Console(stderr=True).print(summary.profile)
    return summary


def describe(sources: Sequence[Source], model: LLM2Vec, options: Options) -> dict:
    """The manifest: everything that decides a vector, and nothing per row. Raises ValueError if the
    model's vectors cannot be given the form that the options name.
    """
    columns = options.columns
    check_form(model.dimension, options.truncate_dim, options.precision)
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
    do_all: Callable[[Walk], Summary],
    output: Path,
    options: Options,
    rank: Rank,
    verify: bool,
    unique_ids: bool,
    show_progress: bool,
    elsewhere: bool,
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
            sources, sizes, output, options, rank, locks, progress, Clock(), ids=ids,
            verify=verify, elsewhere=elsewhere,
        )  # fmt: skip
        summary = do_all(walk)
        summary.reused, summary.damaged = walk.reused, len(walk.damaged)
        summary.bytes = size_of_shards(output)
    if any(source.name == STDIN for source in sources):
        summary.notes.append(
            "standard input cannot be resumed or appended to unless the same bytes come again"
        )
    path = output / f"summary-{rank.rank:05d}.json"
    with atomically(path) as file:
        file.write((summary.as_json() + "\n").encode())
    return summary


def _run(walk: Walk, model: LLM2Vec) -> Summary:
    """Reading and tokenising, the forward pass, and writing, side by side. Reading costs a small
    part of tokenising, which uses all cores: a thread of its own would win nothing.
    """
    rank, clock, progress, options = walk.rank, walk.clock, walk.progress, walk.options
    summary = Summary(walk.output, rank=rank.rank, world=rank.world)
    line, began = Pipeline(clock), time.monotonic()

    def prepared() -> Iterator[Work]:
        for work in walk:
            line.check()
            with clock.measure("tokenise"), named(work):
                work = prepare(work, model, options)
            yield work
            del work

    def forward(work: Work) -> tuple[Work, tuple]:
        budget = options.tokens_per_batch or model.tokens_per_batch
        with named(work):
            start = _mark(model.device)
            work = compute(work, model, options, _counter(work, budget, line, progress))
            return work, (start, _mark(model.device))

    def finish(made: tuple[Work, tuple]) -> None:
        work, marks = made
        with named(work):
            _measure_gpu(clock, *marks)
            footer = store(work, walk.output, options).footer
        walk.finished(work, footer)
        summary.add(footer)

    line.run(prepared(), forward, finish)
    summary.seconds = time.monotonic() - began
    summary.profile = Profile.of(line, summary.seconds)
    summary.stages = {name: stage.seconds for name, stage in summary.profile.stages.items()}
    summary.stages["waiting"] = line.clock.seconds["forward", "input"]
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


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """A place in the GPU's stream, to be waited for by sleeping; None where there is no GPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _measure_gpu(clock: Clock, start: torch.cuda.Event | None, end: torch.cuda.Event | None):
    """The GPU's time between two marks. Only the writing thread waits here, for what it is going to
    write: the forward pass of the next job goes on. No GPU has run this yet.
    """
    if start is None:
        return
    with clock.measure("write", "the GPU"):
        end.synchronize()
    clock.add("gpu", start.elapsed_time(end) / 1000)
