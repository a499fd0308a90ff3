"""The npy layout: a shard's vectors in a plain .npy file, which numpy.load can map into memory.

`part-x.npy` has one row per row of `part-x.parquet` beside it, which keeps every other column (ids,
kept columns, the scale of int8, status) and the footer. The .npy is written first, so a .parquet
that is there means that the shard is finished, in this layout as in the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

DTYPES = ("float32", "float16", "int8", "uint8")


def npy_beside(path: Path) -> Path:
    """Where the vectors of this shard are in the npy layout."""
    return path.with_suffix(".npy")


def write_npy(file: BinaryIO, vectors: np.ndarray) -> int:
    """Writes (N, W) vectors as `numpy.save` does. Returns the bytes."""
    form = np.lib.format
    form.write_array_header_1_0(file, form.header_data_from_array_1_0(vectors))
    file.write(vectors)  # numpy's own way hides the reason when a disk is full
    return file.tell()


def npy_blocks(path: Path, count: int, rows: int, checksum: str) -> Iterator[np.ndarray]:
    """The `count` rows of a .npy file in blocks of at most `rows`, writable and read once.

    raises: ValueError if the file is malformed, cut short, or (known at the end) its bytes are not
            those of `checksum`: a .npy has no checksums of its own
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        dtype, found, width = _header(file)
        if found != count:
            raise ValueError(f"{path.name} has {found} rows, the footer says {count}")
        for start in range(0, count, rows):
            block = np.empty((min(rows, count - start), width), dtype)
            if file.readinto(block) != block.nbytes:
                raise ValueError(f"{path.name} is cut short")
            digest.update(block)
            yield block
    if digest.hexdigest() != checksum:
        raise ValueError(f"the vectors in {path.name} do not have the checksum of the footer")


def npy_form(path: Path) -> tuple[str, int]:
    """The dtype's name and the width of the rows, from the header alone."""
    with path.open("rb") as file:
        dtype, _, width = _header(file)
    return dtype.name, width


def _header(file: BinaryIO) -> tuple[np.dtype, int, int]:
    """(dtype, rows, width). The checksum does not cover the header: only what we write passes."""
    try:
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy's parser lets errors of many kinds through
        raise ValueError(f"the header of the .npy is broken ({error})") from error
    plain = version == (1, 0) and len(shape) == 2 and not fortran and dtype.isnative
    if not plain or dtype.name not in DTYPES:
        raise ValueError(f"the .npy holds {dtype} of shape {shape}, expected plain rows")
    return dtype, *shape
