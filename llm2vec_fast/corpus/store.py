"""Shards: Parquet files written whole or not at all, each carrying its own range and counts."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llm2vec_fast.corpus.read import Row

KEY = b"llm2vec_fast"
STORED = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "int8": pa.int8(),
    "binary": pa.uint8(),
}


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
) -> Footer:
    """Writes a shard under a temporary name, fsyncs, renames, and fsyncs the directory.

    A row of status `error` gets a null vector.
    """
    footer = Footer(
        first_row,
        len(rows),
        *offsets,
        int(n_tokens.sum()),
        {status: statuses.count(status) for status in sorted(set(statuses))},
        hashlib.sha256(np.ascontiguousarray(vectors_ND)).hexdigest(),
    )
    failed = pa.array([status == "error" for status in statuses])
    width = vectors_ND.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors_ND).reshape(-1), type=STORED[precision])
    embedding = pa.FixedSizeListArray.from_arrays(flat, width, mask=failed)
    table = {"id": pa.array([row.id for row in rows], pa.string())}
    for at, name in enumerate(keep):
        table[name] = pa.array([row.keep[at] for row in rows], pa.string())
    table["embedding"] = embedding
    if scale_N is not None:
        table["scale"] = pa.array(scale_N, pa.float32())
    table["n_tokens"] = pa.array(n_tokens, pa.int32())
    table["status"] = pa.array(statuses, pa.string())
    table["note"] = pa.array(notes, pa.string())
    data = pa.table(table).replace_schema_metadata({KEY: json.dumps(asdict(footer))})
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        pq.write_table(data, file, compression="none", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_directory(path.parent)
    return footer


def read_footer(path: Path) -> Footer | None:
    """The footer of a finished shard; None if the file is absent, cut short, or not a shard."""
    try:
        metadata = pq.read_metadata(path)
        footer = Footer(**json.loads(metadata.metadata[KEY]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return footer if metadata.num_rows == footer.rows else None


def read_shard(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A shard's table, with its page checksums verified."""
    return pq.ParquetFile(path, page_checksum_verification=True).read(columns)


def vectors_of(table: pa.Table, precision: str, dimension: int) -> np.ndarray:
    """(N, D) fp32 vectors of a shard's table, up to a factor per row; zero where there is none."""
    column = table.column("embedding").combine_chunks()
    flat = column.values.to_numpy(zero_copy_only=False)
    stored = flat.reshape(len(table), -1)[: len(table)]
    if precision == "binary":
        stored = np.unpackbits(stored, axis=1, count=dimension).astype(np.float32) * 2 - 1
    stored = stored.astype(np.float32)
    stored[column.is_null().to_numpy(zero_copy_only=False)] = 0
    return stored


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
