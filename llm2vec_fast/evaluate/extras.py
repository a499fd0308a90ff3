"""The scorers of the extra `eval`, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def scorer(module: str, package: str) -> ModuleType:
    """A module of another package. Raises RuntimeError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"{package} cannot be imported ({error}): pip install 'llm2vec-fast[eval]'"
        ) from error
