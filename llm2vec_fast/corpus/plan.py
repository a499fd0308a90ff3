"""What a bulk job is: how inputs are cut into jobs, and the manifest that a resume must match."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2vec_fast.corpus.atomic import atomically
from llm2vec_fast.corpus.place import is_remote
from llm2vec_fast.corpus.read import Source
from llm2vec_fast.vectors import check_form
from llm2vec_fast.version import __version__

MANIFEST = "manifest.json"
FORMAT = 1
ENDS = 64 << 10  # bytes of a file's start and end that its fingerprint covers
STDIN = "-"
LATER = {"output_format": "parquet"}  # what older manifests do not name
# What is read of a manifest, and what each must be; of its model only where texts are encoded.
PARTS = {
    "rows_per_shard": int, "columns": dict, "columns.keep": list, "vectors": dict,
    "vectors.dimension": int, "vectors.precision": str,
}  # fmt: skip
MODEL_PARTS = {
    "model": dict, "model.base": str, "model.adapters": list, "model.settings": dict,
    "model.dtype": str, "model.fingerprint": str,
}  # fmt: skip
# What file systems behind URLs tell of a file besides its size, whichever they have.
REMOTE_MARKS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime")


class ManifestError(ValueError):
    """An output directory that belongs to another job, or whose manifest is broken."""


@dataclass(frozen=True)
class Job:
    """Consecutive rows of one input: a sorting window and an output shard."""

    source: int  # which input
    number: int  # which job of it: rows from number * rows_per_shard on

    @property
    def shard(self) -> str:
        return f"part-{self.source:05d}-{self.number:06d}.parquet"


def fingerprint_of(source: Source) -> dict[str, Any]:
    """What tells whether an input is still the same, without reading all of it.

    A file: size, time of change, hash of both ends. A URL: size, what the store tells of its
    version, hash of both ends. Files that are documents: their number, and a hash of names, sizes
    and times. Standard input has none: it cannot be resumed unless the same bytes come again.
    """
    told: dict[str, Any] = {"path": source.name}
    if source.name == STDIN:
        return told
    if source.format == "files":
        digest = hashlib.sha256()
        for path in source.files:
            mark = _file_marks(path) if "://" not in path else _remote_marks(path)
            digest.update(json.dumps([path, mark]).encode())
        return told | {"files": len(source.files), "names": digest.hexdigest()}
    path = source.files[0]
    if "://" in path:
        import fsspec

        told |= _remote_marks(path)
        with fsspec.open(path, "rb") as file:
            return told | {"ends": _hash_of_ends(file, told["size"])}
    told |= _file_marks(path)
    with open(path, "rb") as file:
        return told | {"ends": _hash_of_ends(file, told["size"])}


def _file_marks(path: str) -> dict[str, Any]:
    stat = os.stat(path)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _remote_marks(url: str) -> dict[str, Any]:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    info = system.info(path)
    marks = {name: str(info[name]) for name in REMOTE_MARKS if info.get(name) is not None}
    return {"size": info["size"], **marks}


def _hash_of_ends(file, size: int) -> str:
    digest = hashlib.sha256(file.read(ENDS))
    file.seek(max(0, size - ENDS))
    digest.update(file.read(ENDS))
    return digest.hexdigest()


def in_order(output: Path, sources: Sequence[Source]) -> list[Source]:
    """Inputs in the order of the manifest that is there, new ones behind: a shard's name holds
    its input's number, and a new file of a directory may sort before the old ones.
    """
    if not (output / MANIFEST).exists():
        return list(sources)
    known = [told["path"] for told in _read(output)["inputs"]]
    place = {path: at for at, path in enumerate(known)}
    return sorted(sources, key=lambda source: place.get(source.name, len(known)))


def settle_manifest(
    output: Path, wanted: dict[str, Any], append: bool = False, any_budget: bool = False
) -> dict[str, Any]:
    """Writes the manifest of a new job, or checks that the one there is the same job.

    append:     the job there may have fewer inputs; the manifest is rewritten with the new ones
    any_budget: nobody asked for this number of tokens in a batch (it goes by the free memory, which
                another rank, or a run that resumes, finds different): the one there holds
    returns:    the manifest that is there now
    raises:     ManifestError showing every difference
    """
    wanted = {"format": FORMAT, "made_by": f"llm2vec_fast {__version__}", **wanted}
    wanted = json.loads(json.dumps(wanted))
    # Looked for before the manifest: another rank may be writing both, the manifest first.
    shards = any(output.glob("part-*.parquet"))
    if not (output / MANIFEST).exists():
        if shards:
            raise ManifestError(
                f"{output} holds shards but no {MANIFEST}: choose another directory or clear it"
            )
        if _create(output, wanted):
            return wanted
    found = _read(output)
    if any_budget and isinstance(found.get("vectors"), dict):
        wanted["vectors"]["tokens_per_batch"] = found["vectors"].get("tokens_per_batch")
    same = {"inputs": None, "made_by": None}  # inputs are compared by name, the maker not at all
    differences = [
        *_differences(LATER | found | same, LATER | wanted | same),
        *_input_differences(found["inputs"], wanted["inputs"], append),
    ]
    if differences:
        raise ManifestError(
            f"{output} holds another job, and resuming it would mix two kinds of vectors:\n  "
            + "\n  ".join(differences)
            + "\nUse the same options and inputs, or another output directory."
        )
    new = wanted["inputs"][len(found["inputs"]) :]
    if new:
        found = {**found, "inputs": found["inputs"] + new}
        _replace(output, found)
    return found


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of a finished or interrupted job, with all PARTS.

    raises: ManifestError if there is none
    """
    found = _read(output)
    require_parts(output, found, PARTS)
    dimension = found["vectors"]["dimension"]
    try:
        check_form(dimension, dimension, found["vectors"]["precision"])
    except ValueError as error:
        raise _broken(output, error) from error
    return found


def require_parts(output: Path, manifest: dict[str, Any], parts: dict[str, type]) -> None:
    """Raises ManifestError if one is not there, or not as this program writes it."""
    for part, kind in parts.items():
        outer, _, name = part.rpartition(".")
        if not isinstance((manifest[outer] if outer else manifest).get(name), kind):
            raise _broken(output, f"no {part}, or none that this program wrote")


def _read(output: Path) -> dict[str, Any]:
    """What can be compared with another job's manifest."""
    try:
        found = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"format {FORMAT} expected")
        inputs = found.get("inputs")
        if not isinstance(inputs, list) or not all(map(_names_a_path, inputs)):
            raise ValueError("no list of inputs")
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(output, error) from error
    return found


def _broken(output: Path, why: object) -> ManifestError:
    return ManifestError(f"{output / MANIFEST} is not the manifest of an embedding job: {why}")


def _names_a_path(told: object) -> bool:
    return isinstance(told, dict) and isinstance(told.get("path"), str)


def _create(output: Path, manifest: dict[str, Any]) -> bool:
    """Puts the manifest there whole, unless another process was first: then False."""
    if is_remote(output):
        _replace(output, manifest)
        return True
    partial = _write(output, manifest)
    try:
        os.link(partial, output / MANIFEST)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links; what is there is compared after this
        if (output / MANIFEST).exists():
            return False
        partial.replace(output / MANIFEST)
        return False
    finally:
        partial.unlink(missing_ok=True)
    return True


def _replace(output: Path, manifest: dict[str, Any]) -> None:
    if is_remote(output):
        with atomically(output / MANIFEST) as file:
            file.write(_as_bytes(manifest))
    else:
        _write(output, manifest).replace(output / MANIFEST)


def _as_bytes(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def _write(output: Path, manifest: dict[str, Any]) -> Path:
    """The manifest on disk, under a name that nobody else uses."""
    owner = f"{platform.node() or 'host'}-t{threading.get_ident()}-{os.getpid()}"
    partial = output / f"{MANIFEST}.{owner}.partial"  # as atomic.clean_partials expects it
    try:
        with open(partial, "wb") as file:
            file.write(_as_bytes(manifest))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # of a full disk it does not name the file
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(output / MANIFEST)) from error
    return partial


def _input_differences(found: list[dict], wanted: list[dict], append: bool):
    now = {told["path"]: told for told in wanted}
    for at, then in enumerate(found):
        path = then["path"]
        if path not in now:
            yield f"inputs[{at}]: {path} was an input and is not given now"
        else:
            yield from _one_input(then, now[path], f"inputs[{at}]")
    known = {told["path"] for told in found}
    new = [told["path"] for told in wanted if told["path"] not in known]
    if new and not append:
        yield f"inputs: {', '.join(new[:5])} new ({len(new)} in all); --append adds new inputs"


def _one_input(found: dict, wanted: dict, where: str):
    """A new time alone is no difference where the ends are the whole file; in a larger file,
    another middle may hide behind it.
    """
    differences = list(_differences(found, wanted, where))
    if [key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key)] == [
        "mtime_ns"
    ]:
        if found["size"] <= 2 * ENDS:
            return
        seconds = f"{found['mtime_ns'] // 10**9}.{found['mtime_ns'] % 10**9:09d}"
        yield (
            f"{differences[0]} ({found['path']} has the same size and ends; if it is the same "
            f"file, say so with: touch -d @{seconds} FILE)"
        )
        return
    yield from (f"{difference} ({found['path']})" for difference in differences)


def _differences(found: Any, wanted: Any, where: str = ""):
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for at, pair in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(*pair, f"{where}[{at}]")
    elif found != wanted:
        yield f"{where}: {found!r} there, {wanted!r} now"
