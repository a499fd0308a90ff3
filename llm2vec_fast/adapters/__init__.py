"""Adapters that come with the package, by name: `shipped:smollm2-135m-mntp`."""

from __future__ import annotations

import difflib
from pathlib import Path

PREFIX = "shipped:"


def names() -> list[str]:
    """The names of all shipped adapters."""
    here = Path(__file__).parent
    return sorted(path.parent.name for path in here.glob("*/adapter_config.json"))


def shipped(name: str) -> Path:
    """The directory of a shipped adapter, with or without the prefix. Raises ValueError."""
    bare = name.removeprefix(PREFIX)
    if bare not in names():
        near = difflib.get_close_matches(bare, names(), 1)
        raise ValueError(
            f"no adapter {bare!r} is shipped; shipped are {', '.join(names()) or 'none'}"
            + (f". Did you mean {PREFIX}{near[0]}?" if near else "")
        )
    return Path(__file__).parent / bare
