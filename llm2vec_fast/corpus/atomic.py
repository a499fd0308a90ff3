"""Files that appear whole or not at all, and what is left of writers that were killed."""

from __future__ import annotations

import io
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from llm2vec_fast.corpus.place import is_remote

# part-x.parquet.<host>-<pid>.partial; the manifest's has its writer's thread too.
OWNER = re.compile(r"\.(?:parquet|npy|json)\.(?P<host>.+?)(?:-t\d+)?-(?P<pid>\d+)\.partial$")
STALE = 3600  # seconds after which no living writer can own a temporary file


class StoreError(OSError):
    """A file that could not be written: disk full, read-only, no directory."""


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is whole and on the disk, or not at all."""
    with _told(path), _put(path) if is_remote(path) else _renamed(path) as file:
        yield file


@contextmanager
def _put(path: Path) -> Iterator[BinaryIO]:
    """An object of a store. Not through a file of its own, which puts what it has also when the
    writing fails.
    """
    file, place = io.BytesIO(), cast(Any, path)
    yield file
    place.fs.pipe_file(place.path, file.getvalue())


@contextmanager
def _renamed(path: Path) -> Iterator[BinaryIO]:
    partial = path.with_name(f"{path.name}.{platform.node() or 'host'}-{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_directory(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = StoreError(
            f"{path} could not be written: {error.strerror or error}. Finished shards are "
            "safe: once there is room and the directory can be written, the same command goes on."
        )
        told.errno = error.errno
        raise told from error


def clean_partials(directory: Path) -> list[Path]:
    """Removes temporary files whose writer is gone; those of living writers stay.

    A writer on another machine cannot be asked, so its files count as left behind after an hour.
    """
    removed: list[Path] = []
    if is_remote(directory):  # there are none
        return removed
    kinds = ("part-*", "manifest.json.*", "summary-*")
    for path in sorted(p for kind in kinds for p in directory.glob(f"{kind}.partial")):
        owner = OWNER.search(path.name)
        here = owner is not None and owner["host"] == (platform.node() or "host")
        with suppress(FileNotFoundError):  # its writer has just finished
            old = time.time() - path.stat().st_mtime > STALE
            if old or (here and not _alive(int(owner["pid"]))):
                path.unlink()
                removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and somebody else's
        return True
    return True


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
