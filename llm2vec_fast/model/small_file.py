"""The small files of a model's directory: what is no plain file, or too large, is never opened."""

from __future__ import annotations

import json
from pathlib import Path

# Larger than any published index or tokenizer by a factor of several.
LIMIT = 256 << 20


def plain_file(path: Path) -> Path:
    """The same path, once it is certain that reading it ends: a pipe waits for ever, and a link may
    lead to a device without end.

    raises: OSError, ValueError
    """
    size = path.stat().st_size
    if not path.is_file():
        raise OSError(f"{path} is not a plain file")
    if size > LIMIT:
        raise ValueError(f"{path} has {size} bytes, more than such a file may have ({LIMIT})")
    return path


def read_json(path: Path, **options) -> object:
    """The JSON of a file. Raises OSError, ValueError, RecursionError for the caller to word.

    options: of json.loads
    """
    return json.loads(plain_file(path).read_text(encoding="utf-8"), **options)
