"""Freed memory stays with the process: asked of one of its own, since it holds for all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from llm2vec_fast.model.heap import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
for _ in range(12):  # small blocks carved out of a freed one make the heap grow a few times first
    torch.ones(48 << 20)
before = pages()
for _ in range(5):
    torch.ones(48 << 20)
print(kept, pages() - before)
"""


def faults(mode: str) -> tuple[str, int]:
    command = [sys.executable, "-c", CODE, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_pages_are_reused():
    kept, with_it = faults("keep")
    _, without = faults("default")
    if without < 100:
        pytest.skip("this system does not count page faults")
    assert kept == "True" and with_it < without / 10
