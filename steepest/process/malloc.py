"""Memory of the C library's allocator, kept for the next tensor.

A CPU tensor above 32 MiB is a mapping of its own by default: made for one operation, given back after it, and made
again for the next, with a page fault for each 4 KiB. Those faults cost a training step several percent.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names for what mallopt sets (malloc.h)."""
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
LARGEST_KEPT = 2**30
"""Bytes from which a tensor has a mapping of its own all the same."""


_LEAST_MAPPED = 2**17
"""glibc's own default: from here on a block may be a mapping."""
_keeps = False
"""Whether `keep_freed_memory` has set the limits."""


def keep_freed_memory() -> bool:
    """Have the allocator take tensors of up to 1 GiB from memory that it keeps; docs/passes.md has what was measured.

    False, and nothing done, where the C library is not glibc or the environment already sets these limits.
    """
    global _keeps
    if any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    _keeps = bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return _keeps


@contextmanager
def given_back_when_freed() -> Iterator[None]:
    """Tensors above 128 KiB that are made meanwhile are mappings of their own all the same: for what lives long and is
    given up as a whole, such as an engine's copy of the weights while models train."""
    mallopt = _function("mallopt") if _keeps else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LEAST_MAPPED)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)


def give_back_freed() -> None:
    """Give what is free now back to the system, where the C library can: after a model was loaded, of which parts were
    replaced by smaller ones, and after training, where the engine's weights need the room."""
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


def _function(name: str) -> Any:
    """The C library's; None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
