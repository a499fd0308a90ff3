"""PackedBatch: the one value that flows from the tokenizer to the pooling; and the way back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several texts end to end, without padding. T tokens in all, B texts.

    ids:         (T,) int32 token ids
    positions:   (T,) int32, each token's position in its own text
    cu_seqlens:  (B + 1,) int32, text b holds tokens cu_seqlens[b] to cu_seqlens[b + 1]
    spans:       (B, 2) int32, the tokens [start, end) that are pooled, counted in the batch
    max_seqlen:  tokens of the longest text
    lengths:     tokens of each text, kept on the host (nothing ever asks the device for them)
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    spans: Tensor
    max_seqlen: int
    lengths: tuple[int, ...]

    @classmethod
    def build(
        cls,
        ids: Sequence[Sequence[int] | np.ndarray],
        spans: Sequence[tuple[int, int]] | None = None,
        device: torch.device | str = "cpu",
        vocab_size: int = 1 << 31,
    ) -> PackedBatch:
        """Packs texts given as token ids; this is where values are checked, once, on the host.

        ids:     B sequences of token ids, none of them empty
        spans:   B pairs [start, end) within each text, default the whole text
        raises:  ValueError naming the text that is empty or whose span is not inside it, and on
                 ids that are no token ids of a vocabulary of this size: a GPU would not survive it
        """
        lengths = tuple(len(text) for text in ids)
        if not lengths:
            raise ValueError("PackedBatch: no texts; an empty batch has no forward pass")
        spans = [(0, n) for n in lengths] if spans is None else spans
        if len(spans) != len(lengths):
            raise ValueError(f"PackedBatch: {len(lengths)} texts but {len(spans)} spans")
        for row, (n, (start, end)) in enumerate(zip(lengths, spans, strict=True)):
            if not 0 <= start < end <= n:
                raise ValueError(
                    f"PackedBatch: text {row} has {n} tokens and the span [{start}, {end}); "
                    "each text needs a token and a span of at least one token inside it"
                )
        total, count = sum(lengths), len(lengths)
        # One buffer, pinned where that helps: one copy brings everything to the device. Each
        # part starts at 16 bytes: Triton compiles a kernel anew for every alignment it meets.
        sizes = (total, total, count + 1, 2 * count)
        starts = [0, *itertools.accumulate(-(-size // 4) * 4 for size in sizes)]
        on_cuda = torch.device(device).type == "cuda"
        host = torch.empty(starts.pop(), dtype=torch.int32, pin_memory=on_cuda)
        flat = host.numpy()
        bounds = np.array([0, *itertools.accumulate(lengths)])
        joined = np.concatenate(ids)
        if joined.dtype.kind not in "iu" or joined.min() < 0 or joined.max() >= vocab_size:
            raise ValueError(
                f"PackedBatch: token ids must be whole numbers from 0 to {vocab_size - 1}, got "
                f"{joined.dtype} from {joined.min()} to {joined.max()}; does the tokenizer belong "
                "to this model?"
            )
        positions = np.arange(total) - np.repeat(bounds[:-1], lengths)
        inside = (np.asarray(spans) + bounds[:-1, None]).ravel()
        for start, part in zip(starts, (joined, positions, bounds, inside), strict=True):
            flat[start : start + len(part)] = part
        sent = host.to(device, non_blocking=True)
        parts = [sent[at : at + size] for at, size in zip(starts, sizes, strict=True)]
        return cls(*parts[:3], parts[3].view(count, 2), max(lengths), lengths)

    @property
    def n_tokens(self) -> int:
        return self.ids.shape[0]

    def __len__(self) -> int:
        return len(self.lengths)


class Download:
    """Vectors of texts on their way to the host. Nothing is waited for before `result`.

    n_texts, size: of the result; texts that no batch brings are zero
    """

    def __init__(self, n_texts: int, size: int, device: torch.device):
        self.device, self.on_cuda, self.rows = device, device.type == "cuda", []
        # Filled as batches come. Pinned, or the copies would wait for the device.
        self.host_ND = torch.empty(n_texts, size, pin_memory=self.on_cuda)
        self.copied = torch.cuda.Event() if self.on_cuda else None
        self.filled = 0

    def put(self, rows: np.ndarray, vectors_BD: Tensor) -> None:
        """Queues the copy of a batch: row rows[b] of the result will be vectors_BD[b]."""
        place = slice(self.filled, self.filled + len(rows))
        self.host_ND[place].copy_(vectors_BD, non_blocking=True)
        self.rows.append(rows)
        self.filled = place.stop
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))

    def result(self) -> np.ndarray:
        """(n_texts, size) fp32, when the device is done; from any thread."""
        if self.copied is not None:
            self.copied.synchronize()
        vectors = np.zeros(self.host_ND.shape, dtype=np.float32)
        if self.rows:
            vectors[np.concatenate(self.rows)] = self.host_ND[: self.filled].numpy()
        return vectors
