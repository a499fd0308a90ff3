"""What a bulk job is: how inputs are cut into jobs, and the manifest that a resume must match."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_fast.corpus.read import Source
from llm2vec_fast.model.checkpoint import write_json
from llm2vec_fast.version import __version__

MANIFEST = "manifest.json"
FORMAT = 1
ENDS = 64 << 10  # bytes of a file's start and end that its fingerprint covers


class ManifestError(ValueError):
    """An output directory that belongs to another job, or whose manifest is broken."""


@dataclass(frozen=True)
class Job:
    """`count` rows of one input: a sorting window and an output shard."""

    source: int  # which input
    number: int  # which job of it: rows from number * count on

    @property
    def shard(self) -> str:
        return f"part-{self.source:05d}-{self.number:06d}.parquet"


def fingerprint_of(source: Source) -> dict[str, Any]:
    """Path, size, time of change, and a hash of both ends of an input."""
    stat = source.path.stat()
    with open(source.path, "rb") as file:
        digest = hashlib.sha256(file.read(ENDS))
        file.seek(max(0, stat.st_size - ENDS))
        digest.update(file.read(ENDS))
    return {
        "path": source.path.as_posix(),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ends": digest.hexdigest(),
    }


def settle_manifest(output: Path, wanted: dict[str, Any]) -> None:
    """Writes the manifest of a new job, or checks that the one there is the same job.

    raises: ManifestError showing every difference
    """
    path = output / MANIFEST
    wanted = {"format": FORMAT, "made_by": f"llm2vec_fast {__version__}", **wanted}
    wanted = json.loads(json.dumps(wanted))
    if not path.exists():
        if any(output.glob("part-*.parquet")):
            raise ManifestError(
                f"{output} holds shards but no {MANIFEST}: choose another directory or clear it"
            )
        write_json(wanted, path)
        return
    found = read_manifest(output)
    differences = list(_differences({**found, "made_by": wanted["made_by"]}, wanted))
    if differences:
        raise ManifestError(
            f"{output} holds another job, and resuming it would mix two kinds of vectors:\n  "
            + "\n  ".join(differences)
            + "\nUse the same options and inputs, or another output directory."
        )


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of a finished or interrupted job. Raises ManifestError if there is none."""
    path = output / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"format {FORMAT} expected")
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not the manifest of an embedding job: {error}") from error
    return found


def _differences(found: Any, wanted: Any, where: str = ""):
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for at, pair in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(*pair, f"{where}[{at}]")
    elif found != wanted:
        yield f"{where}: {found!r} there, {wanted!r} now"
