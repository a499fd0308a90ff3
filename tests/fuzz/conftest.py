"""Mutations of real files, drawn by hypothesis and tried in a process of its own: a reader that
crashes, hangs or eats all memory ends that process and not the tests.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CPU_SECONDS = 5  # of one input; a pause of the machine is no hang
WALL_SECONDS = 120  # of one input: what hangs without computing, or where no signal is looked at
MEMORY = 3 << 30  # bytes of address space beyond what the process has already
HOSTILE = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**64, -(2**63), 0.5, -2.5, 1e308, float("nan"),
    float("inf"), "", "a", "\0", "\ud800", "../outside", "/", r"([a-z_.0-9]+)+!", "x" * 3000,
    "{text}", "<s>", [], [0], ["a"], {}, {"a": 1}, [[[[]]]],
)  # fmt: skip
BYTES = b"\x00\x01\x7f\x80\xff\xfe0179{}[]:,\"\\'-+eE. \n\r\t"


class Hang(BaseException):
    """An input took too long. Not an Exception: no reader may swallow it."""


class Pairs(list):
    """A JSON object, which may have one key several times."""


def dump(node) -> str:
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(dump, node)) + "]"
    return json.dumps(node)


@st.composite
def damaged_bytes(draw, files: tuple[bytes, ...], hot: float = 1.0) -> bytes:
    """A file with one to four flips, cuts, holes, insertions, exchanges or pieces of another file;
    half of them in its first `hot` (negative: last) part.
    """
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        size = len(data)
        part = max(1, int(abs(hot) * size)) if draw(st.booleans()) else size
        at = draw(st.integers(0, part - 1))
        at = size - 1 - at if hot < 0 else at
        kind = draw(st.sampled_from(["flip", "byte", "drop", "insert", "splice", "cut"]))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at] = draw(st.sampled_from(BYTES))
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "splice":
            other = draw(st.sampled_from(files))
            start = draw(st.integers(0, len(other) - 1))
            piece = other[start : start + draw(st.integers(1, 200))]
            data[at : at + (len(piece) if draw(st.booleans()) else 0)] = piece
        else:
            del data[at:]
    return bytes(data)


@st.composite
def damaged_json(draw, text: str) -> str:
    """The same JSON with one to three values exchanged for hostile ones or for one another, taken
    away, or there twice.
    """
    root = [json.loads(text, object_pairs_hook=Pairs)]
    hostile = st.sampled_from(HOSTILE).map(copy.deepcopy)
    for _ in range(draw(st.integers(1, 3))):
        parent, at = root, 0
        while True:
            node = parent[at][1] if isinstance(parent, Pairs) else parent[at]
            if not isinstance(node, list) or not node or not draw(st.integers(0, 3)):
                break
            parent, at = node, draw(st.integers(0, len(node) - 1))
        kind = draw(st.sampled_from(["value", "value", "value", "drop", "twice", "key"]))
        if isinstance(parent, Pairs):
            key = parent[at][0]
            names = st.sampled_from(["", "a", "../outside", "__metadata__", parent[0][0]])
            parent[at] = (draw(names), node) if kind == "key" else (key, draw(hostile))
            if kind == "twice":
                parent.append((key, node))
        else:
            parent[at] = draw(hostile)
        if kind == "drop" and parent is not root:
            del parent[at]
    return dump(root[0])


def apart(function) -> Counter:
    """Calls the function in a forked process and gives what it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            try:
                told = json.dumps(function())
            except BaseException:
                told = shortened(traceback.format_exc())
            with os.fdopen(write, "wb") as pipe:
                pipe.write(told.encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended or not told.startswith("{"):
        pytest.fail(f"the process that read the files ended with {ended}\n{told}", pytrace=False)
    return Counter(json.loads(told))


def shortened(text: str) -> str:
    """Inputs of kilobytes are quoted in errors; both ends tell what happened."""
    lines = [
        line if len(line) < 600 else f"{line[:300]} ... {line[-300:]}" for line in text.split("\n")
    ]
    return "\n".join(lines)[:50_000]


def limited() -> None:
    """Bounds what one input may take, in the process that is to read it."""
    import resource

    def hang(*_):
        raise Hang(f"more than {CPU_SECONDS} s for one input")

    signal.signal(signal.SIGPROF, hang)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


@pytest.fixture(params=[200, pytest.param(5000, marks=pytest.mark.soak)], ids="{} inputs".format)
def fuzz(request):
    """fuzz(strategy, attempt) -> how many inputs were {"refused": ..., "read": ...}

    attempt: takes an input; True if it was read, False if it was refused as it should be, and
             whatever it raises is a failure
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is bounded through /proc")

    def run(strategy, attempt) -> Counter:
        outcomes = Counter(refused=0, read=0)

        @settings(
            max_examples=request.param, deadline=None, database=None,
            derandomize=request.param < 1000, suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def check(given_input):
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
            outcomes["read" if attempt(given_input) else "refused"] += 1
            signal.setitimer(signal.ITIMER_PROF, 0)

        def all_of_them():
            limited()
            check()
            return outcomes

        found = apart(all_of_them)
        assert found.total() >= 0.9 * request.param
        return found

    run.bytes, run.json = damaged_bytes, damaged_json
    return run
