"""What the C library does with memory that a training step on the CPU has freed.

A step frees all its activations at its end. glibc hands what is free at the top of its heap back to
the system, and the next step asks for it again, which costs a page fault for each 4 KiB. Whether
that happens hangs on which small tensor happens to lie at the top.
"""

from __future__ import annotations

import ctypes
import os
import platform

KEPT = 2**30  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP = 2**25  # glibc takes no more; a larger tensor is always the system's
#: where a user has already said what malloc should do
SAID = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory(most: int = KEPT) -> bool:
    """Let this process keep up to ``most`` freed bytes for what it allocates next.

    For the whole process and until it ends; no result changes. `fit` on a CPU asks for it; so may a
    training loop of one's own, once, at its start.

    Args:
        most: bytes, below 2 GiB.

    Returns:
        Whether it was done: not where the C library is not glibc, or where the environment says
        what malloc should do (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``).

    Raises:
        ValueError: ``most`` is negative, or 2 GiB and more.

    """
    if not 0 <= most < 2**31:
        raise ValueError(f"most is a number of bytes from 0 to 2**31 - 1, got {most}")
    said = any(name in os.environ for name in SAID)
    if said or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # either ends that glibc moves the other as it goes, so both are said
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP), mallopt(M_TRIM_THRESHOLD, most)
    return kept == (1, 1)
