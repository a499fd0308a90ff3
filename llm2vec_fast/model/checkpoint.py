"""Safetensors files on disk: which ones belong to a model, what is in them, their raw bytes.

Everything is refused before anything is allocated. The safetensors library checks each header; the
bytes are then read straight into their destination through one small buffer, so that loading needs
no second copy of the weights and no resident memory map.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 16 << 20
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
        return read_header(_inside(directory, single.name))
    if not index.exists():
        pickles = sorted(p.name for p in directory.glob("*.bin")) if directory.is_dir() else []
        hint = (
            f"; it has {pickles[0]}, but pickle files are never read: convert it to safetensors"
            if pickles
            else ""
        )
        raise WeightsError(f"{directory} has no model.safetensors and no index of shards{hint}")
    try:
        told = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
        weight_map = told["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not a valid index of shards: {error!r}") from error
    found: dict[str, TensorOnDisk] = {}
    for shard in names:
        tensors = read_header(_inside(directory, shard))
        twice = tensors.keys() & found.keys()
        if twice:
            raise WeightsError(f"{directory / shard}: {min(twice)!r} stands in another shard too")
        found |= tensors
    for name, shard in weight_map.items():
        if name not in found or found[name].path.name != Path(shard).name:
            raise WeightsError(f"{index} places {name!r} in {shard}, but it is not there")
    return found


def _inside(directory: Path, name: object) -> Path:
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


class Reader:
    """Copies tensors from disk into parameters, converting the dtype on the way."""

    def __init__(self) -> None:
        self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        self._view = memoryview(self._buffer.numpy())
        self._checks: list[tuple[TensorOnDisk, Tensor, Tensor]] = []

    def read_into(self, destination: Tensor, source: TensorOnDisk) -> None:
        """Fills a contiguous tensor of as many elements as `source` has."""
        dtype = DTYPES.get(source.dtype)
        if dtype is None:
            raise WeightsError(
                f"{source.path}: {source.name!r} is {source.dtype}; {', '.join(DTYPES)} are read"
            )
        flat, width, done = destination.view(-1), dtype.itemsize, 0
        assert flat.numel() * width == source.size
        with open(source.path, "rb", buffering=0) as file:
            file.seek(source.offset)
            while done < source.size:
                want = min(CHUNK_BYTES, source.size - done)
                self._fill(file, want, source)
                piece = flat[done // width : (done + want) // width]
                piece.copy_(self._buffer[:want].view(dtype))
                # A sum is the cheapest look: NaN and infinity survive it. In its own dtype: a wider
                # one makes a copy of the piece, and the heap keeps the pages of every such copy.
                self._checks.append((source, piece, piece.sum()))
                done += want

    def _fill(self, file, want: int, source: TensorOnDisk) -> None:
        got = 0
        while got < want:
            count = file.readinto(self._view[got:want])
            if not count:
                raise WeightsError(f"{source.path} ended while {source.name!r} was being read")
            got += count

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


def read_tensor(source: TensorOnDisk, dtype: torch.dtype = torch.float32) -> Tensor:
    """One small tensor (an adapter's) on the CPU."""
    reader, out = Reader(), torch.empty(source.shape, dtype=dtype)
    reader.read_into(out, source)
    reader.refuse_non_finite()
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
