"""Memory of the C library's allocator, kept for the next tensor.

A CPU tensor above 32 MiB is a mapping of its own by default: made for one operation, given back after it, and made
again for the next, with a page fault for each 4 KiB. Those faults cost a training step several percent.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names for what mallopt sets (malloc.h)."""
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
LARGEST_KEPT = 2**30
"""Bytes from which a tensor has a mapping of its own all the same."""


def keep_freed_memory() -> bool:
    """Have the allocator take tensors of up to 1 GiB from memory that it keeps; docs/passes.md has what was measured.

    False, and nothing done, where the C library is not glibc or the environment already sets these limits.
    """
    if any(name in os.environ for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
