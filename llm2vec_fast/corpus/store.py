"""Shards: files written whole or not at all, each carrying its own range, counts and checksum.

Two layouts, told apart by the footer alone: `parquet` has the vectors in a column `embedding`,
`npy` has them in a file beside (npy.py). Everything here reads both.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.corpus.atomic import StoreError, atomically, clean_partials
from llm2vec_fast.corpus.npy import npy_beside, npy_blocks, npy_form, write_npy
from llm2vec_fast.corpus.place import readable
from llm2vec_fast.corpus.read import Row

KEY = b"llm2vec_fast"
# sha256 of the footer, the columns' names and types: Parquet's own metadata has no checksum.
SEAL = b"llm2vec_fast.sha256"
__all__ = [
    "Block", "Footer", "ShardError", "StoreError", "blocks_of", "check_shard", "clean_partials",
    "read_footer", "read_shard", "rows_at", "vectors_of", "write_shard",
]  # fmt: skip
LAYOUTS = ("parquet", "npy")
STORED = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "binary": pa.uint8(),
}
OWN_COLUMNS = ("id", "embedding", "scale", "n_tokens", "status", "note")
# Rows of a row group, and of a block while reading: what a search holds and reads at a time.
BLOCK = 4096


class ShardError(OSError):
    """A shard that is unfinished or damaged; `reason` says how."""

    reason = ""


@dataclass(frozen=True)
class Footer:
    """What a finished shard says of itself, in its Parquet metadata."""

    first_row: int
    rows: int
    start_offset: int  # bytes in the input
    end_offset: int
    tokens: int
    statuses: dict[str, int]
    checksum: str  # of the vectors' bytes
    npy_bytes: int = 0  # size of the .npy beside; 0: the vectors are in this file


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a shard: vectors as stored (zero where there is none), and statuses."""

    first: int
    vectors: np.ndarray
    status: pa.Array


def write_shard(
    path: Path,
    rows: list[Row],
    keep: tuple[str, ...],
    vectors_ND: np.ndarray,
    scale_N: np.ndarray | None,
    n_tokens: np.ndarray,
    statuses: list[str],
    notes: list[str],
    *,
    precision: str,
    first_row: int,
    offsets: tuple[int, int],
    output_format: str = "parquet",
) -> Footer:
    """Writes a shard under a temporary name, fsyncs, renames, and fsyncs the directory.

    A row of status `error` gets a null vector (npy: zeros).
    output_format: parquet | npy
    raises:        StoreError (an OSError) naming the shard, with nothing of it left behind;
                   ValueError for a kept column with a name of ours
    """
    if output_format not in LAYOUTS:
        raise ValueError(
            f"output_format must be one of {', '.join(LAYOUTS)}; got {output_format!r}"
        )
    for name in set(keep) & set(OWN_COLUMNS):
        raise ValueError(f"column {name!r} cannot be kept: every shard has one of its own")
    failed_N = np.array([status == "error" for status in statuses], dtype=bool)
    vectors_ND = np.ascontiguousarray(vectors_ND)
    if vectors_ND[failed_N].any():
        vectors_ND = np.where(failed_N[:, None], 0, vectors_ND).astype(vectors_ND.dtype)
    npy_bytes = 0
    if output_format == "npy":
        with atomically(npy_beside(path)) as file:
            npy_bytes = write_npy(file, vectors_ND)
    footer = Footer(
        first_row,
        len(rows),
        *offsets,
        int(n_tokens.sum()),
        dict(sorted(Counter(statuses).items())),
        hashlib.sha256(vectors_ND).hexdigest(),
        npy_bytes,
    )
    columns = {"id": pa.array([row.id for row in rows], pa.string())}
    for at, name in enumerate(keep):
        columns[name] = pa.array([row.keep[at] for row in rows], pa.string())
    if output_format == "parquet":
        columns["embedding"] = _lists(vectors_ND, STORED[precision], failed_N)
    if scale_N is not None:
        columns["scale"] = pa.array(scale_N, pa.float32())
    columns["n_tokens"] = pa.array(n_tokens, pa.int32())
    columns["status"] = pa.array(statuses, pa.string())
    columns["note"] = pa.array(notes, pa.string())
    with atomically(path) as file:
        _write_table(pa.table(columns), footer, file)
    return footer


def _lists(vectors_ND: np.ndarray, kind: pa.DataType, null_N: np.ndarray) -> pa.FixedSizeListArray:
    flat = pa.array(vectors_ND.reshape(-1), type=kind)
    return pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1], mask=pa.array(null_N))


def _write_table(table: pa.Table, footer: Footer, file: BinaryIO) -> None:
    told = json.dumps(asdict(footer)).encode()
    table = table.replace_schema_metadata({KEY: told, SEAL: _seal(told, table.schema)})
    # Parquet has no bytes: plain int8 takes four each, a dictionary one. Floats gain nothing from
    # a dictionary and take twice as long.
    coded = [name for name in table.column_names if name != "embedding"]
    if "embedding" in table.column_names and not pa.types.is_floating(
        table.schema.field("embedding").type.value_type
    ):
        coded.append("embedding.list.element")
    pq.write_table(
        table,
        file,
        compression="none",
        use_dictionary=coded,
        row_group_size=BLOCK,
        write_page_checksum=True,
    )


def _seal(told: bytes, schema: pa.Schema) -> bytes:
    columns = [(f.name, "" if pa.types.is_nested(f.type) else str(f.type)) for f in schema]
    return hashlib.sha256(told + json.dumps(columns).encode()).hexdigest().encode()


def read_footer(path: Path, thorough: bool = False) -> Footer | None:
    """The footer of a finished shard; None if the file is absent, cut short, or not a shard.

    thorough: also None if `check_shard` finds a byte of the vectors or columns changed
    """
    try:
        footer = _footer(path)
    except ShardError:
        return None
    return None if thorough and check_shard(path) else footer


def _footer(path: Path) -> Footer:
    try:
        with readable(path) as file:
            metadata = pq.read_metadata(file)
        told = metadata.metadata[KEY]
        if _seal(told, metadata.schema.to_arrow_schema()) != metadata.metadata[SEAL]:
            raise ValueError("its checksum is wrong")
        footer = Footer(**json.loads(told))
    except FileNotFoundError as error:
        raise _damaged(path, "there is no such file") from error
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"it has no readable footer ({error})") from error
    if metadata.num_rows != footer.rows:
        raise _damaged(path, f"{metadata.num_rows} rows, its footer says {footer.rows}")
    if footer.npy_bytes:
        npy = npy_beside(path)
        size = npy.stat().st_size if npy.exists() else None
        if size != footer.npy_bytes:
            there = "is missing" if size is None else f"has {size} bytes, not {footer.npy_bytes}"
            raise _damaged(path, f"{npy.name} {there}")
    return footer


def check_shard(path: Path) -> str | None:
    """Why a shard is not what was written, from its every byte; None if all is well.

    Page checksums of all columns, the checksum of the vectors, and the counts of the footer.
    """
    try:
        footer = _footer(path)
        digest, statuses, tokens = hashlib.sha256(), Counter(), 0
        for block in blocks_of(path):
            digest.update(block.vectors)
            statuses.update(block.status.to_pylist())
        with _opened(path) as file:
            others = [name for name in file.schema_arrow.names if name != "embedding"]
            for batch in file.iter_batches(BLOCK, columns=others):
                tokens += batch.column("n_tokens").to_numpy().sum(dtype=np.int64)
    except ShardError as error:
        return error.reason
    if digest.hexdigest() != footer.checksum:
        return "the vectors do not have the checksum of the footer"
    if (dict(statuses), tokens) != (footer.statuses, footer.tokens):
        return "the counts of statuses or tokens are not those of the footer"
    return None


def blocks_of(path: Path, rows: int = BLOCK) -> Iterator[Block]:
    """A shard's vectors in blocks of at most `rows`, in order, checksums verified on the way.

    raises: ShardError; in the npy layout a changed byte is known after the last block only
    """
    footer = _footer(path)
    first = 0
    with _opened(path) as file:
        if footer.npy_bytes:
            statuses = file.read(["status"]).column("status").combine_chunks()
            for block in npy_blocks(npy_beside(path), footer.rows, rows, footer.checksum):
                yield Block(first, block, statuses.slice(first, len(block)))
                first += len(block)
            return
        for batch in file.iter_batches(rows, columns=["embedding", "status"]):
            yield Block(first, _stored(batch.column("embedding")), batch.column("status"))
            first += len(batch)


def rows_at(path: Path, rows: Sequence[int], columns: list[str]) -> dict[int, dict[str, Any]]:
    """Some rows of a shard by number: only the row groups that hold them are read."""
    found, wanted = {}, np.unique(np.asarray(rows, dtype=np.int64))
    with _opened(path) as file:
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            inside = wanted[(wanted >= start) & (wanted < end)]
            if len(inside):
                table = file.read_row_group(group, columns).take(pa.array(inside - start))
                found.update(zip(inside.tolist(), table.to_pylist(), strict=True))
            start = end
    return found


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A shard's table, all layouts alike, with its checksums verified. Raises ShardError."""
    footer = _footer(path)
    with _opened(path) as file:
        table = file.read(columns)
        if not footer.npy_bytes or (columns is not None and "embedding" not in columns):
            return table
        failed = np.array(file.read(["status"]).column("status").to_pylist(), dtype=str) == "error"
    with _damage_of(path):
        dtype, width = npy_form(npy_beside(path))
    vectors = np.empty((footer.rows, width), dtype)
    for block in blocks_of(path):
        vectors[block.first : block.first + len(block.vectors)] = block.vectors
    kind = pa.from_numpy_dtype(vectors.dtype)
    names = table.column_names
    at = names.index("scale" if "scale" in names else "n_tokens") if columns is None else 0
    table = table.add_column(at, "embedding", _lists(vectors, kind, failed))
    return table if columns is None else table.select(columns)


def vectors_of(table: pa.Table, precision: str, dimension: int) -> np.ndarray:
    """(N, D) fp32 vectors of a shard's table, up to a factor per row; zero where there is none."""
    column = table.column("embedding")
    width = column.type.list_size
    stored = [_stored(chunk) for chunk in column.chunks] or [np.zeros((0, width), np.uint8)]
    vectors = np.concatenate(stored)
    if precision == "binary":
        vectors = np.unpackbits(vectors, axis=1, count=dimension).astype(np.float32) * 2 - 1
        vectors[column.is_null().to_numpy()] = 0
    return vectors.astype(np.float32)


def _stored(column: pa.FixedSizeListArray) -> np.ndarray:
    """(N, W) as stored, writable; nulls, whose bytes Parquet does not keep, are zero."""
    width, values = column.type.list_size, column.values
    kind = np.dtype(values.type.to_pandas_dtype())
    if len(column) == 0:
        return np.zeros((0, width), kind)
    start = values.offset + column.offset * width  # `values` is not cut when the array is
    data = np.frombuffer(values.buffers()[1], dtype=kind)[start : start + len(column) * width]
    stored = data.reshape(-1, width).copy()
    stored[column.is_null().to_numpy(zero_copy_only=False)] = 0
    return stored


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    with _damage_of(path), readable(path) as opened:
        with pq.ParquetFile(opened, page_checksum_verification=True) as file:
            yield file


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """Whatever reading raises becomes a ShardError that names the file."""
    try:
        yield
    except ShardError:
        raise
    except (OSError, pa.ArrowException, AttributeError, KeyError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> ShardError:
    error = ShardError(
        f"shard {path} is unfinished or damaged: {reason}. Run the same embed command with "
        "--verify: it redoes only such shards."
    )
    error.reason = reason
    return error
