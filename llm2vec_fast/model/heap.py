"""Memory of the CPU path: freed activations stay with the process for the next layer."""

from __future__ import annotations

import ctypes
import sys

# glibc's names of its settings (malloc.h), and what they are set to.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = 1 << 30


def keep_freed_memory() -> bool:
    """Tells glibc not to return freed blocks below 1 GiB to the system; True if it agreed.

    By default a freed activation of some megabytes goes back at once, and the next layer pays for
    zeroed pages again (benchmarks/LOG.md has what that costs). It holds for the whole process,
    whose memory then stays at its peak. Other systems are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP)) & bool(mallopt(M_TRIM_THRESHOLD, KEEP))
