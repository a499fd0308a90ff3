"""CUDA graphs of the forward pass: a short batch costs one launch instead of some hundred.

A graph replays the launches that it was captured from, with their sizes and on their memory. So
there is one for each bucket of batches: tokens, texts and longest text rounded up. What a batch
leaves over of its bucket is made of dummy texts behind it, of at least one token and never longer
than the bucket's longest text: real positions and bounds, so that no kernel needs to know.

A bucket decides a batch's shapes whether a graph is replayed or not, so vectors do not depend on
which graphs there are. No GPU has run capture and replay yet, and no constant here is measured.

source: torch.cuda.graphs (warm-up on a side stream, a pool of memory that graphs share)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2vec_fast import ops
from llm2vec_fast.batch import PackedBatch
from llm2vec_fast.model.config import ModelConfig
from llm2vec_fast.model.transformer import Linear, Transformer
from llm2vec_fast.model.work import forward_flop
from llm2vec_fast.ops import backend

SWITCH = "LLM2VEC_FAST_GRAPHS"  # of the environment: 0 turns graphs off

# A batch is launch-bound while the host needs longer to launch it than the GPU to compute it.
LAUNCH_SECONDS = 5e-6  # of the host, for one launch
LAUNCHES_PER_LAYER = 9  # as counted in tests/model/test_meta.py
LAUNCHES_BESIDE = 3  # the embedding, the last norm, pooling
RATE = 4e14  # FLOP/s of such batches on a data-centre GPU in bf16
QUERY = 128  # tokens that always go through a graph: single queries, at every size of model
MOST = 4096  # never more tokens: so what graphs share stays small
LIMIT = 1 << 30  # bytes of all graphs of a model; beyond, the least recently used ones go

_capturing = threading.Lock()  # a process can capture one graph at a time


class Bucket(NamedTuple):
    """Sizes of a batch with its dummy texts; `longest` bounds the length of every text."""

    tokens: int
    texts: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Bucket:
        """The bucket of a batch: at most a quarter more tokens than needed, one dummy or more."""
        total, longest = sum(lengths), _power_of_2(max(16, *lengths))
        texts = _power_of_2(len(lengths) + 1)
        while True:
            dummies = texts - len(lengths)
            tokens = _rounded(total + dummies)
            if tokens - total <= dummies * longest:
                return cls(tokens, texts, longest)
            texts *= 2

    def dummies(self, lengths: Sequence[int]) -> list[int]:
        """Lengths of the texts that fill the bucket, about equal."""
        left, count = self.tokens - sum(lengths), self.texts - len(lengths)
        return [left // count + (n < left % count) for n in range(count)]

    def build(
        self,
        ids: Sequence[Sequence[int] | np.ndarray],
        spans: Sequence[tuple[int, int]],
        device: torch.device | str,
        vocab_size: int = 1 << 31,
    ) -> PackedBatch:
        """As `PackedBatch.build`, with the dummy texts behind."""
        fill = self.dummies([len(text) for text in ids])
        ids = [*ids, *(np.zeros(n, dtype=np.int32) for n in fill)]
        batch = PackedBatch.build(ids, [*spans, *((0, n) for n in fill)], device, vocab_size)
        return dataclasses.replace(batch, max_seqlen=self.longest)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _rounded(tokens: int) -> int:
    """Up to the next of four steps between powers of two; never steps of less than 8."""
    step = max(8, _power_of_2(tokens) >> 3)
    return -(-tokens // step) * step


def most_tokens(config: ModelConfig) -> int:
    """Up to how many tokens a batch is launch-bound: an estimate, by the model's size."""
    launches = LAUNCHES_PER_LAYER * config.n_layers + LAUNCHES_BESIDE
    estimate = launches * LAUNCH_SECONDS * RATE / forward_flop(config, [1])
    return min(MOST, max(QUERY, int(estimate)))


def wanted(device: torch.device) -> bool:
    """Whether graphs are possible there and not turned off."""
    return device.type == "cuda" and os.environ.get(SWITCH) != "0"


def forward(model: Transformer, batch: PackedBatch, mode: str) -> Tensor:
    """(B, D) fp32, the texts' vectors."""
    return ops.pool(model(batch), batch.spans, mode)


class Pool:
    """Device memory that graphs share: they never run at once, and results are copied out."""

    def __init__(self, device: torch.device):
        with torch.cuda.device(device):
            self.device, self.handle = device, torch.cuda.graph_pool_handle()
            self.stream, self.done = torch.cuda.Stream(), torch.cuda.Event()

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None], int]:
        """(result, replay, bytes): `replay()` computes `result` again from the memory `run` reads.

        raises: RuntimeError (torch.OutOfMemoryError is one) if it cannot be captured
        """
        with _capturing, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            # Before: Triton compiles and loads kernels, cuBLAS takes its workspace for the stream.
            with torch.cuda.stream(self.stream):
                run()
            current.wait_stream(self.stream)
            torch.cuda.empty_cache()
            free, graph = torch.cuda.mem_get_info()[0], torch.cuda.CUDAGraph()
            # The outer block gives the current stream back even where the end of a capture fails.
            # Other threads (tokenising, writing) may use CUDA meanwhile: hence thread_local.
            with torch.cuda.stream(current):
                with torch.cuda.graph(
                    graph, self.handle, self.stream, capture_error_mode="thread_local"
                ):
                    result = run()
            return result, graph.replay, max(0, free - torch.cuda.mem_get_info()[0])

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """What is queued within runs after what was queued within before, on whatever stream."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.done)
        yield
        self.done.record(stream)


class Graph:
    """One captured forward pass, and the memory it reads: fed by copies, on the device's side."""

    def __init__(self, model: Transformer, batch: PackedBatch, mode: str, pool: Pool):
        # Normal tensors: those of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.reads = [x.clone() for x in _parts(batch)]
            still = PackedBatch(*self.reads, batch.max_seqlen, batch.lengths)
            # Made before the capture, and kept: the model may replace them by longer ones.
            self.rope = model.rope_tables(batch.max_seqlen, batch.ids.device)
            self.vectors, self.replay, self.bytes = pool.capture(
                lambda: forward(model, still, mode)
            )

    def __call__(self, batch: PackedBatch) -> Tensor:
        """(B, D) fp32, a tensor of its own."""
        torch._foreach_copy_(self.reads, _parts(batch))  # one launch
        self.replay()
        return self.vectors.clone()


def _parts(batch: PackedBatch) -> list[Tensor]:
    return [batch.ids, batch.positions, batch.cu_seqlens, batch.spans]


class Graphs:
    """The graphs of one model, for inference. A bucket runs eagerly at first; when it comes again
    it is captured. Weights that moved (`.to()`, another dtype) drop all graphs.
    """

    def __init__(self, model: Transformer):
        self.model, self.most = model, most_tokens(model.config)
        self.lock = threading.RLock()
        self.seen: set[tuple] = set()
        self.clear()

    def __reduce__(self):
        return Graphs, (self.model,)  # a copy captures its own

    def clear(self) -> None:
        """Drops all graphs; their memory is the device's again."""
        with self.lock:
            # Once its last graph is gone a pool cannot be used again.
            self.pool: Pool | None = None
            self.graphs: OrderedDict[tuple, Graph] = OrderedDict()
            self.weights: list[Tensor] = []
            self.places: list[int] = []

    def bucket(self, lengths: Sequence[int]) -> Bucket | None:
        """Where a batch of such texts belongs; None if it does better without a graph."""
        with self.lock:
            if not wanted(self.model.embed.weight.device):
                self.clear()
            elif sum(lengths) <= self.most and self._still():
                return Bucket.of(lengths)
        return None

    def run(self, batch: PackedBatch, mode: str) -> Tensor:
        """(B, D) fp32 vectors of a batch that `Bucket.build` made, the dummy texts' among them."""
        # What was forced by ops.use is what was captured.
        key = (batch.n_tokens, len(batch), batch.max_seqlen, mode, *backend.forced())
        with self.lock:
            graph = self.graphs.get(key)
            if graph is None and key in self.seen:
                graph = self._capture(key, batch, mode)
            if graph is not None:
                self.graphs.move_to_end(key)
                with self.pool.turn():
                    return graph(batch)
            self.seen.add(key)
        return forward(self.model, batch, mode)

    def _capture(self, key: tuple, batch: PackedBatch, mode: str) -> Graph | None:
        try:
            self.pool = self.pool or Pool(batch.ids.device)
            graph = self.graphs[key] = Graph(self.model, batch, mode, self.pool)
        except RuntimeError as error:
            self.clear()
            self.most = 0
            warnings.warn(
                f"short batches go on without CUDA graphs, which could not be captured: {error} "
                f"({SWITCH}=0 turns them off)",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        while sum(other.bytes for other in self.graphs.values()) > LIMIT and len(self.graphs) > 1:
            self.graphs.popitem(last=False)
        return graph

    def _still(self) -> bool:
        """Whether the weights may be read by graphs: drops those of weights that lay elsewhere.
        False for a model with adapters in training. Takes some 30 us, so it is asked every time.
        """
        if not self.weights:
            self.weights = [*self.model.parameters(), *self.model.buffers()]
            self.linears = [m for m in self.model.modules() if isinstance(m, Linear)]
        places = [weight.data_ptr() for weight in self.weights]
        if places != self.places:
            self.clear()
            self.places = places
        return all(linear.lora is None for linear in self.linears)
