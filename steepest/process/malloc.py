"""Settings of the C library's allocator, so that it keeps the memory of a freed tensor for the next tensor.

By default a CPU tensor above 32 MiB gets a memory mapping of its own. The mapping is made for one operation, returned
after it and made again for the next one, with a page fault for each 4 KiB. These faults cost a training step several
percent.
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
"""Size in bytes from which a tensor still gets a mapping of its own."""


_LEAST_MAPPED = 2**17
"""glibc's own default: the size in bytes from which a block may be a mapping."""
_keeps = False
"""True after `keep_freed_memory` has set the limits."""


def keep_freed_memory() -> bool:
    """Make the allocator take tensors of up to 1 GiB from memory that it keeps; docs/passes.md has the measurements.

    Returns False and does nothing where the C library is not glibc or the environment already sets these limits.
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
    """In the `with` block tensors above 128 KiB still get mappings of their own. Use it for tensors that live long and
    are freed together. Example: the engine's copy of the weights, which is freed while the models train."""
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
    """Return free memory to the system, where the C library can. Called after a model was loaded and parts of it were
    replaced by smaller ones, and after training, when the engine's weights need the memory."""
    if (trim := _function("malloc_trim")) is not None:
        trim(0)


def _function(name: str) -> Any:
    """The function of that name in the C library; None where there is none."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
