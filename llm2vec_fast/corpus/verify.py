"""Every byte of a job's shards against their checksums and the manifest."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from llm2vec_fast.corpus.npy import npy_beside, npy_form
from llm2vec_fast.corpus.place import place_of, readable
from llm2vec_fast.corpus.plan import read_manifest
from llm2vec_fast.corpus.store import Footer, check_shard, read_footer

NAME = re.compile(r"part-(\d{5,})-(\d{6,})\.parquet")
STORED = {"float32": "float32", "float16": "float16", "int8": "int8", "binary": "uint8"}


def verify(
    directory: str | Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    remove: bool = False,
) -> list[tuple[Path, str]]:
    """The shards of a job that are not what was written, each with the reason.

    progress: called with (shards checked, shards in all)
    remove:   deletes them, so that the same embed command makes them again, and no others
    returns:  in order of their names; a shard that is missing before a later one of its input
              counts, what an interrupted job has not reached yet does not
    raises:   ManifestError if `directory` is not the output of a job
    """
    directory = place_of(directory)
    manifest = read_manifest(directory)
    paths = sorted(directory.glob("part-*.parquet"))
    bad = _missing(directory, paths)
    for done, path in enumerate(paths):
        reason = check_shard(path) or _stranger(path, manifest)
        if reason:
            bad.append((path, reason))
        if progress:
            progress(done + 1, len(paths))
    if remove:
        for path, _ in bad:
            # First the file whose presence says that the shard is finished.
            path.unlink(missing_ok=True)
            npy_beside(path).unlink(missing_ok=True)
    return sorted(bad)


def _missing(directory: Path, paths: list[Path]) -> list[tuple[Path, str]]:
    numbers: dict[int, set[int]] = {}
    for path in paths:
        if name := NAME.fullmatch(path.name):
            numbers.setdefault(int(name[1]), set()).add(int(name[2]))
    return [
        (directory / f"part-{source:05d}-{number:06d}.parquet", "missing: later ones are there")
        for source, found in numbers.items()
        for number in range(max(found))
        if number not in found
    ]


def _stranger(path: Path, manifest: dict[str, Any]) -> str | None:
    """Why a whole shard does not belong to this job."""
    name, footer = NAME.fullmatch(path.name), read_footer(path)
    if name is None or int(name[1]) >= len(manifest["inputs"]):
        return "no input of the manifest has a shard of this name"
    assert footer is not None, "check_shard has just read it"
    per_shard = manifest["rows_per_shard"]
    first = int(name[2]) * per_shard
    if footer.first_row != first or footer.rows > per_shard:
        return (
            f"it has {footer.rows} rows from {footer.first_row} on, by its name at most "
            f"{per_shard} from {first} on"
        )
    layout = "npy" if footer.npy_bytes else "parquet"
    if layout != manifest.get("output_format", "parquet"):
        return f"its layout is {layout}, the manifest's {manifest.get('output_format', 'parquet')}"
    return _other_form(path, footer, manifest)


def _other_form(path: Path, footer: Footer, manifest: dict[str, Any]) -> str | None:
    """Another type or width of vectors, or other columns, than the manifest's."""
    form = manifest["vectors"]
    with readable(path) as file:
        schema = pq.read_schema(file)
    binary = form["precision"] == "binary"
    wanted = STORED[form["precision"]], -(-form["dimension"] // 8) if binary else form["dimension"]
    if footer.npy_bytes:
        found = npy_form(npy_beside(path))
    else:
        kind = schema.field("embedding").type
        found = str(np.dtype(kind.value_type.to_pandas_dtype())), kind.list_size
    if found != wanted:
        return f"its vectors are {found[0]} x {found[1]}, the manifest's {wanted[0]} x {wanted[1]}"
    missing = {"id", *manifest["columns"]["keep"]} - set(schema.names)
    return f"it has no column {', '.join(sorted(missing))}" if missing else None
