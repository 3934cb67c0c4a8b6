"""Keep the memory that a training step on the CPU has freed, for the next step.

A step frees all its activations at its end. glibc returns the free memory at the top of its heap to
the system, and the next step asks for it again, which costs a page fault for each 4 KiB. Whether
that happens depends on which small tensor happens to lie at the top.
"""

from __future__ import annotations

import ctypes
import os
import platform

KEPT = 2**30  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_MMAP = 2**25  # glibc takes no more; a larger tensor is always the system's
#: variables by which a user configures malloc
SAID = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory(most: int = KEPT) -> bool:
    """Let this process keep up to ``most`` freed bytes for its next allocations.

    It holds for the whole process until it ends, and changes no result. `fit` calls it on a CPU;
    another training loop may call it once, at its start.

    Args:
        most: bytes, below 2 GiB.

    Returns:
        Whether it was done: not if the C library is not glibc, or the environment configures
        malloc (``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``).

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
    # setting one of them stops glibc from adjusting the other, so both are set
    done = mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP), mallopt(M_TRIM_THRESHOLD, most)
    return done == (1, 1)
