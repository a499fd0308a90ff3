"""The bulk job on Ray: the same jobs and shards, by workers on many GPUs and machines.

Ray starts the workers, and when one dies starts it again and gives it its jobs again. The driver
finds where jobs begin (reading lines, not parsing them), alone holds the locks, and counts; workers
read their rows themselves, but for inputs that cannot be read from the middle. A job that was
stored just before its worker died is stored again under the same name: nothing is doubled.

Proved on one machine with CPUs only; no GPU and no second machine has run it yet.

`Embedder` is for other people's pipelines of Ray Data, and needs no job.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llm2vec_fast.corpus.atomic import clean_partials
from llm2vec_fast.corpus.plan import MANIFEST
from llm2vec_fast.corpus.read import Source
from llm2vec_fast.corpus.run import describe
from llm2vec_fast.corpus.store import Footer
from llm2vec_fast.corpus.summary import Summary
from llm2vec_fast.corpus.walk import Rank, Walk
from llm2vec_fast.corpus.worker import Options, Work, run_shard
from llm2vec_fast.encoder import LLM2Vec
from llm2vec_fast.vectors import check_form, finish

# Jobs that a worker has at a time: while one is computed, another is read, tokenised or stored.
AT_ONCE = 2
# Seconds without any worker, after which somebody should look.
PATIENCE = 60
# How often a job whose worker dies is done again, before it is the job that is suspected.
RETRIES = 3


@dataclass(frozen=True)
class Cluster:
    """Where the workers of a bulk job run, for `embed(..., cluster=...)`.

    address:             of a Ray cluster that is running; None: the one that Ray finds (by
                         RAY_ADDRESS or on this machine), else this machine during the job
    num_gpus_per_worker: fractions share a GPU; default 1, or 0 where the cluster has no GPU
    num_workers:         default: as many as there are GPUs for; without GPUs one a machine

    Every machine needs this package, and sees model, inputs and output under the same names.
    """

    address: str | None = None
    num_gpus_per_worker: float | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {self.num_workers}")
        if self.num_gpus_per_worker is not None and self.num_gpus_per_worker < 0:
            raise ValueError(f"num_gpus_per_worker must be 0 or more: {self.num_gpus_per_worker}")

    @contextmanager
    def start(
        self,
        model: str | Path | LLM2Vec,
        adapters: Sequence[str | Path],
        loading: dict[str, Any],
        output: Path,
        rank: Rank,
    ) -> Iterator[Workers]:
        """The workers, each with the model that `LLM2Vec.from_pretrained(**loading)` gives."""
        if isinstance(model, LLM2Vec):
            raise ValueError("workers of Ray load the model themselves: give its directory or name")
        if rank.world > 1:
            raise ValueError("Ray starts its own workers: run the command once, without torchrun")
        given, ray = (str(model), [str(name) for name in adapters], loading), _ray()
        with _connected(ray, self.address):
            kind, count = ray.remote(Worker).options(**self._needs(ray)), self._count(ray)
            workers = [kind.remote(*given, output.absolute(), Path.cwd()) for _ in range(count)]
            try:
                yield Workers(ray, workers)
            finally:
                for worker in workers:
                    ray.kill(worker)

    def _gpus(self, ray) -> float:
        if self.num_gpus_per_worker is not None:
            return self.num_gpus_per_worker
        return 1 if ray.cluster_resources().get("GPU") else 0

    def _count(self, ray) -> int:
        if self.num_workers is not None:
            return self.num_workers
        gpus, there = self._gpus(ray), ray.cluster_resources().get("GPU", 0)
        count = int(there // gpus) if gpus else len(_machines(ray))
        if count < 1:
            raise ValueError(
                f"the Ray cluster has {there:g} GPUs, and a worker was to have {gpus:g}: use "
                "--num-gpus-per-worker 0 for CPUs; --num-workers N waits for machines to come"
            )
        return count

    def _needs(self, ray) -> dict[str, Any]:
        """What Ray reserves and does for a worker. Without GPUs the CPUs are shared out: Ray lets
        a worker have as many threads.
        """
        cpus, gpus = 1, self._gpus(ray)
        if not gpus:
            machines = _machines(ray)
            total = sum(machines) // self._count(ray)
            cpus = max(1, int(min(total, *machines)))
        return {
            "num_cpus": cpus, "num_gpus": gpus, "max_concurrency": AT_ONCE, "max_restarts": -1,
            "max_task_retries": RETRIES, "scheduling_strategy": "SPREAD",
        }  # fmt: skip


class Workers:
    """Hands jobs to workers as they become ready and free."""

    def __init__(self, ray, workers: Sequence[Any]):
        self.ray = ray
        self.free: deque = deque()  # a worker stands here once for each job that it can take
        self.busy: dict[Any, tuple[Any, Work]] = {}  # by the future footer
        self.starting = {worker.load.remote(): worker for worker in workers}
        self.model: dict | None = None  # what all workers have

    def describe(self, sources: Sequence[Source], options: Options) -> dict:
        """The manifest, as the first worker that has loaded the model sees it."""
        done, _ = self.ray.wait(list(self.starting), timeout=PATIENCE)
        if not done:
            print(f"no worker in {PATIENCE} s: `ray status` tells what is missing", file=sys.stderr)
        while not self.free:
            self._wait()
        return self._result(self.free[0].describe.remote(sources, options))

    def do_all(self, walk: Walk) -> Summary:
        """Every job of the walk, each told to the walk when it is stored."""
        summary, began = Summary(walk.output), time.monotonic()
        for work in walk:
            while not self.free:
                self._finish(walk, summary)
            worker = self.free.popleft()
            self.busy[worker.run.remote(work, walk.options)] = worker, replace(work, rows=[])
        while self.busy:
            self._finish(walk, summary)
        summary.seconds = time.monotonic() - began
        return summary

    def _finish(self, walk: Walk, summary: Summary) -> None:
        for work, footer in self._wait():
            walk.progress.update(footer.rows, footer.tokens)
            walk.finished(work, footer)
            summary.add(footer)

    def _wait(self) -> list[tuple[Work, Footer]]:
        """Until a worker is ready or a job is done: what was done."""
        done, _ = self.ray.wait([*self.busy, *self.starting])
        found = []
        for future in done:
            if future in self.starting:
                self._welcome(self.starting.pop(future), self._result(future))
            else:
                worker, work = self.busy.pop(future)
                found.append((work, self._result(future, work)))
                self.free.append(worker)
        return found

    def _welcome(self, worker, model: dict) -> None:
        self.model = self.model or model
        if model != self.model:
            raise ValueError(
                f"the workers do not have the same model: one has {self.model}, one {model}. Give "
                "all machines the same files, and name --dtype"
            )
        self.free.extend([worker] * AT_ONCE)

    def _result(self, future, work: Work | None = None):
        """What a worker has made. Its own errors are raised here as they were there."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(future)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            where = f"doing {work}" if work else "loading the model"
            raise RuntimeError(
                f"a worker died {where}, and again each time Ray started it ({RETRIES} times): "
                f"{error} What is finished is safe: the same command goes on."
            ) from error


class Worker:
    """A process of Ray's with an encoder. Ray may start it again at any time, on any machine: so it
    loads by itself what it lacks.
    """

    def __init__(self, model: str, adapters: list[str], loading: dict, output: Path, place: Path):
        self.given, self.output = (model, adapters, loading), output
        self.encoder: LLM2Vec | None = None
        self.first, self.turn = threading.Lock(), threading.Lock()
        with suppress(OSError):  # where the driver is: the names of files are as there
            os.chdir(place)
        clean_partials(output)  # of a worker that died here, and is now this one

    def load(self) -> dict:
        """Loads the model, and tells which it is."""
        return self._loaded().describe()

    def describe(self, sources: Sequence[Source], options: Options) -> dict:
        return describe(sources, self._loaded(), options)

    def run(self, work: Work, options: Options) -> Footer:
        if not (self.output / MANIFEST).exists():
            raise ValueError(
                f"{self.output} on {platform.node()} is not the output directory that the "
                "driver has: use a directory that all machines share, or a URL"
            )
        return run_shard(work, self._loaded(), self.output, options, turn=self.turn)

    def _loaded(self) -> LLM2Vec:
        model, adapters, loading = self.given
        with self.first:
            if self.encoder is None:
                self.encoder = LLM2Vec.from_pretrained(model, adapters, **loading)
        return self.encoder


class Embedder:
    """Adds vectors to batches of texts: for `map_batches` of Ray Data, or by itself.

    >>> ds.map_batches(
    ...     Embedder, fn_constructor_kwargs={"model": "DIR", "normalize": True}, num_gpus=1,
    ...     compute=ray.data.ActorPoolStrategy(size=8), batch_size=1024, batch_format="numpy",
    ... )

    model, adapters: as `LLM2Vec.from_pretrained` takes them, and so is every name in `loading`
    text_column:     of the batch; must hold texts
    output_column:   added: (N, D) of `precision`; for int8 also its `scale` (N,)
    The other arguments are those of `LLM2Vec.encode`.
    """

    def __init__(
        self,
        model: str | Path,
        adapters: Sequence[str | Path] = (),
        *,
        text_column: str = "text",
        output_column: str = "embedding",
        instruction: str | None = None,
        precision: str = "float32",
        normalize: bool = False,
        truncate_dim: int | None = None,
        tokens_per_batch: int | None = None,
        loading: dict[str, Any] | None = None,
    ):
        self.columns = text_column, output_column
        self.form = truncate_dim, normalize, precision
        self.how = dict[str, Any](instruction=instruction, tokens_per_batch=tokens_per_batch)
        self.encoder = LLM2Vec.from_pretrained(model, list(adapters), **(loading or {}))
        check_form(self.encoder.dimension, truncate_dim, precision)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch and its vectors. Raises ValueError naming the column or row that is no text."""
        text, output = self.columns
        if not isinstance(batch, dict):
            raise ValueError(f'a batch is a {type(batch).__name__}: use batch_format="numpy"')
        if text not in batch:
            raise ValueError(
                f"a batch has no column {text!r}, it has {', '.join(map(repr, batch))}: name the "
                "one with the texts, text_column=..."
            )
        vectors = self.encoder.encode(list(batch[text]), convert_to_numpy=True, **self.how)
        stored, scale = finish(vectors, *self.form)
        return {**batch, output: stored} | ({} if scale is None else {"scale": scale})


def _ray():
    try:
        import ray
    except ImportError as error:
        raise RuntimeError(
            f"Ray cannot be imported ({error}): pip install 'llm2vec-fast[ray]'"
        ) from error
    return ray


@contextmanager
def _connected(ray, address: str | None) -> Iterator[None]:
    """A connection to the cluster, ended if it was made here."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(f"this process is connected to Ray already; leave out {address!r}")
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    with redirect_stdout(sys.stderr):  # where Ray tells of workers that died
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="warning")
        except ConnectionError as error:
            raise ConnectionError(f"no Ray cluster can be reached at {address}: {error}") from error
        finally:  # Ray takes this signal for itself
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)
        try:
            yield
        finally:
            ray.shutdown()


def _machines(ray) -> list[float]:
    """The CPUs of each machine of the cluster that has any."""
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return [count for count in cpus if count] or [1]
