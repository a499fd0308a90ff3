"""Safetensors files on disk: which ones belong to a model, what is in them, their raw bytes.

Everything is refused before anything is allocated. The safetensors library checks each header; the
bytes are then read by a few threads, straight into their destination or through a few small
buffers, so that loading needs no second copy of the weights and no resident memory map.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm2vec_fast.model.small_file import read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 8 << 20
THREADS_GPU, THREADS_CPU = 8, 4  # not measured on a GPU
SHARD_BYTES = 5 << 30


class WeightsError(ValueError):
    """Weight files that are missing, malformed, hostile, or of another model."""


@dataclass(frozen=True)
class TensorOnDisk:
    """Where one tensor lies: `size` bytes from `offset` in `path`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def read_header(path: Path) -> dict[str, TensorOnDisk]:
    """The tensors of one safetensors file. Raises WeightsError naming the file."""
    try:
        with safe_open(path, framework="pt"):
            pass  # the library refuses bad lengths, gaps, overlaps, unknown dtypes, trailing bytes
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not a valid safetensors file: {error}") from error
    header.pop("__metadata__", None)
    if not header:
        raise WeightsError(f"{path} holds no tensors")
    found = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        found[name] = TensorOnDisk(
            name, path, info["dtype"], tuple(info["shape"]), 8 + length + start, end - start
        )
    return found


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
    return out


def has_weights(directory: Path) -> bool:
    return any((directory / name).exists() for name in (SINGLE, INDEX))


def open_checkpoint(directory: Path) -> dict[str, TensorOnDisk]:
    """All tensors of a model directory: model.safetensors, or the shards that its index names."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return read_header(inside(directory, single.name))
    if not index.exists():
        pickles = sorted(p.name for p in directory.glob("*.bin")) if directory.is_dir() else []
        hint = (
            f"; it has {pickles[0]}, but pickle files are never read: convert it to safetensors"
            if pickles
            else ""
        )
        raise WeightsError(f"{directory} has no model.safetensors and no index of shards{hint}")
    try:
        told = read_json(index, object_pairs_hook=_no_duplicates)
        weight_map = told["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not a valid index of shards: {error!r}") from error
    found: dict[str, TensorOnDisk] = {}
    for shard in names:
        tensors = read_header(inside(directory, shard))
        twice = tensors.keys() & found.keys()
        if twice:
            raise WeightsError(f"{directory / shard}: {min(twice)!r} stands in another shard too")
        found |= tensors
    for name, shard in weight_map.items():
        if name not in found or found[name].path.name != Path(shard).name:
            raise WeightsError(f"{index} places {name!r} in {shard}, but it is not there")
    return found


def inside(directory: Path, name: object) -> Path:
    """The file `name` of a directory, refused if it leads out (a hub cache's blobs excepted)."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise WeightsError(f"{directory}: {name!r} is not the name of a file in this directory")
    path = directory / name
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # <repo>/snapshots/<revision>/file -> <repo>/blobs/<hash>
        allowed.append(home.parent.parent / "blobs")
    try:
        real, there = path.resolve(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, endless names, links in a circle
        raise WeightsError(f"{directory}: {name!r:.80} cannot be opened: {error}") from error
    if not any(real.is_relative_to(place) for place in allowed):
        raise WeightsError(f"{path} links to a place outside the model's directory: refused")
    if not there:
        raise WeightsError(f"{path} is missing")
    return path


@dataclass(frozen=True)
class Piece:
    """Some bytes of a tensor on disk, and the part of its destination that they fill."""

    source: TensorOnDisk
    offset: int
    into_n: Tensor  # flat

    @property
    def kind(self) -> torch.dtype:
        return DTYPES[self.source.dtype]


class Reader:
    """Copies tensors from disk to one device: threads read ahead, the caller converts and checks.

    Pieces go in the order of the files. Every thread has two pinned buffers on the way to a GPU:
    one is filled while the other is copied to the device, where its dtype is converted. On the CPU
    a piece is read right into its place, and only one of another dtype goes through a buffer.
    Everything that asks something of the device is done by the caller, on its current stream, so
    that what was queued there before and after needs no event. No GPU has run this yet.
    """

    def __init__(self, device: torch.device, threads: int | None = None):
        self.pinned = device.type == "cuda"
        # In a thread of its own every torch operation would bring a team of further threads: on a
        # CPU few readers, no more than the caller's own operations may use.
        few = min(THREADS_CPU, torch.get_num_threads())
        self.threads = threads or (THREADS_GPU if self.pinned else few)
        self._buffers: dict[int, Tensor] = {}
        self._copied: dict[int, torch.cuda.Event] = {}
        self._checks: list[tuple[TensorOnDisk, Tensor, Tensor]] = []

    def read(self, pairs: Iterable[tuple[Tensor, TensorOnDisk]]) -> None:
        """Fills contiguous tensors of as many elements as their sources have.

        The first error ends it: what is not begun is not read.
        """
        pieces = [piece for pair in pairs for piece in _pieces(*pair)]
        pieces.sort(key=lambda piece: (piece.source.path, piece.offset))
        if self.threads == 1 or len(pieces) == 1:
            for piece in pieces:
                self._land(piece, 0, self._fill(piece, 0))
            return
        slots = self.threads * (2 if self.pinned else 1)
        under_way: deque[tuple[Piece, int, Future[Tensor]]] = deque()
        pool = ThreadPoolExecutor(self.threads, "weights")
        try:
            for number, piece in enumerate(pieces):
                if len(under_way) == slots:  # so the oldest has the slot that is wanted now
                    self._await(*under_way.popleft())
                slot = number % slots
                under_way.append((piece, slot, pool.submit(self._fill, piece, slot)))
            while under_way:
                self._await(*under_way.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _await(self, piece: Piece, slot: int, filled: Future[Tensor]) -> None:
        self._land(piece, slot, filled.result())

    def _fill(self, piece: Piece, slot: int) -> Tensor:
        """The bytes of a piece on the host, as uint8; in a thread."""
        into_n = piece.into_n
        if self.pinned or into_n.dtype != piece.kind:
            if slot in self._copied:
                self._copied[slot].synchronize()
            if slot not in self._buffers:
                self._buffers[slot] = self._new_buffer()
            raw = self._buffers[slot][: into_n.numel() * piece.kind.itemsize]
        else:
            raw = into_n.view(torch.uint8)
        view, got = memoryview(raw.numpy()), 0
        path, name = piece.source.path, piece.source.name
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(piece.offset)
                while got < len(view):
                    count = file.readinto(view[got:])
                    if not count:
                        raise WeightsError(f"{path} ended while {name!r} was being read")
                    got += count
        except OSError as error:
            raise WeightsError(f"{path}: {name!r} cannot be read: {error}") from error
        return raw

    def _land(self, piece: Piece, slot: int, raw: Tensor) -> None:
        """Queues what is left to do with the bytes; nothing waits for the device."""
        self._bring(piece, raw)
        if self.pinned:
            self._copied[slot] = self._event(piece.into_n.device)

    def _bring(self, piece: Piece, raw: Tensor) -> None:
        into_n = piece.into_n
        if into_n.dtype != piece.kind:
            there = raw.to(into_n.device, non_blocking=True)
            into_n.copy_(there.view(piece.kind))
        elif self.pinned:
            into_n.view(torch.uint8).copy_(raw, non_blocking=True)
        # A sum is the cheapest look: NaN and infinity survive it. In its own dtype: a wider one
        # makes a copy of the piece, and the heap keeps the pages of every such copy.
        self._checks.append((piece.source, into_n, into_n.sum()))

    def _new_buffer(self) -> Tensor:
        return torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self.pinned)

    def _event(self, device: torch.device) -> torch.cuda.Event:
        return torch.cuda.current_stream(device).record_event()

    def refuse_non_finite(self) -> None:
        """One look at all that was read: a single host sync, however many tensors there were."""
        if not self._checks or torch.stack([total for *_, total in self._checks]).isfinite().all():
            return
        # Only now the exact question: a sum of large finite weights may overflow too.
        checks = [(source, piece) for source, piece, total in self._checks if not total.isfinite()]
        bad = {source.name: source.path for source, piece in checks if not piece.isfinite().all()}
        if bad:
            name, path = min(bad.items())
            raise WeightsError(
                f"{path}: {name!r} has weights that are NaN or infinite in the dtype they are "
                f"loaded to{f', as have {len(bad) - 1} other tensors' * (len(bad) > 1)}"
            )


def _pieces(destination: Tensor, source: TensorOnDisk) -> Iterator[Piece]:
    dtype = DTYPES.get(source.dtype)
    if dtype is None:
        raise WeightsError(
            f"{source.path}: {source.name!r} is {source.dtype}; {', '.join(DTYPES)} are read"
        )
    flat = destination.detach().view(-1)
    assert flat.numel() * dtype.itemsize == source.size
    step = CHUNK_BYTES // dtype.itemsize
    for at in range(0, flat.numel(), step):
        yield Piece(source, source.offset + at * dtype.itemsize, flat[at : at + step])


def read_into(pairs: Sequence[tuple[Tensor, TensorOnDisk]]) -> None:
    """Fills contiguous tensors, all on one device, from disk, converting their dtypes.

    raises: WeightsError naming file and tensor, if a file cannot be read to its end or a value is
            not finite in the dtype of its destination
    """
    reader = Reader(pairs[0][0].device)
    reader.read(pairs)
    reader.refuse_non_finite()


def read_tensor(source: TensorOnDisk, dtype: torch.dtype = torch.float32) -> Tensor:
    """One small tensor (an adapter's) on the CPU."""
    out = torch.empty(source.shape, dtype=dtype)
    read_into([(out, source)])
    return out


def save_checkpoint(tensors: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Writes model.safetensors, or shards of at most 5 GB with an index, each file atomically.

    What an earlier save left there in the other form is removed: it would be read in their place.
    """
    shards = list(_by_size(tensors))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = SINGLE if len(shards) == 1 else name
        write_safetensors(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        size = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        told = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(told, directory / INDEX)
        (directory / SINGLE).unlink(missing_ok=True)
    else:
        (directory / INDEX).unlink(missing_ok=True)


def _by_size(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard, size = {}, 0
    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += bytes_
    yield shard


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(host, partial, metadata={"format": "pt"})
    partial.replace(path)


def write_json(value: object, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
