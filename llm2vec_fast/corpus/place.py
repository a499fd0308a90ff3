"""Where outputs are: a directory, or a URL of a store whose objects appear whole, by one put each.

A URL's place has the methods of a Path (universal_pathlib). Such stores know neither rename nor
locks: a shard cut short by a kill is not there at all, or has no footer and is done again, and two
runs at once on one output do the same work twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from llm2vec_fast.corpus.read import URL


def place_of(output: str | Path) -> Path:
    """The place that a path or an fsspec URL names; `file://` is a path.

    raises: ValueError for a URL that no installed library knows
    """
    if isinstance(output, Path) or not URL.match(str(output)):
        return Path(output)
    try:
        import fsspec
        from upath import UPath

        filesystem, path = fsspec.core.url_to_fs(str(output))
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"output {output}: {error}. URLs need pip install 'llm2vec-fast[remote]' and the "
            "fsspec library of their store (s3fs, gcsfs, adlfs ...)"
        ) from error
    local = "file" in filesystem.protocol
    return Path(path) if local else cast(Path, UPath(output))


def is_remote(place: Path) -> bool:
    """Whether it is behind a URL."""
    return not isinstance(place, Path)


@contextmanager
def readable(place: Path) -> Iterator[Any]:
    """What pyarrow reads: a path as it is, an object opened."""
    if is_remote(place):
        with place.open("rb") as file:
            yield file
    else:
        yield place


def size_of_shards(output: Path) -> int:
    """Bytes of all shards: one listing, which for a store is one request in a thousand shards."""
    if not is_remote(output):
        shards = [*output.glob("part-*.parquet"), *output.glob("part-*.npy")]
        return sum(path.stat().st_size for path in shards)
    store = cast(Any, output)
    store.fs.invalidate_cache(store.path)
    found = store.fs.find(store.path, maxdepth=1, detail=True)
    return sum(told["size"] for name, told in found.items() if "/part-" in name)
