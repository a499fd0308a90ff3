"""One value of a configuration: JSON or the text of a command line, to the type of its field."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import NoneType


def parse(where: str, name: str, value: object, types: tuple) -> object:
    """The value as the first of the types that it can be read as.

    raises: ValueError naming the key, its value, where it stands and what is expected
    """
    for kind in types:
        try:
            return READERS[kind][0](value)
        except ValueError:
            continue
    expected = " or ".join(READERS[kind][1] for kind in types)
    raise ValueError(f"{name} {value!r} in {where}: expected {expected}")


def _as_null(value: object) -> None:
    if value is not None:
        raise ValueError


def _as_bool(value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError
    return value


def _as_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    number = float(str(value))  # text first: a huge int would overflow instead
    if not math.isfinite(number):
        raise ValueError
    return number


def _as_int(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal():
        return int(value)
    number = _as_float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _as_text(value: object) -> str:
    if not isinstance(value, str | Path):
        raise ValueError
    return str(value)


def _as_texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("["):
        value = json.loads(value)
    if isinstance(value, str | Path):
        return (str(value),) if str(value) else ()
    if not isinstance(value, list | tuple):
        raise ValueError
    return tuple(_as_text(part) for part in value)


READERS: dict[type, tuple[Callable, str]] = {
    bool: (_as_bool, "true or false"),
    int: (_as_int, "a whole number"),
    float: (_as_float, "a number"),
    str: (_as_text, "a text"),
    tuple: (_as_texts, "a text or a list of texts"),
    NoneType: (_as_null, "null"),
}
