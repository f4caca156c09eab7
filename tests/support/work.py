"""Work that must stay small: processor seconds of the thread itself, which other programs do not add to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def work_of_at_most(seconds: float, what: str = "") -> Iterator[None]:
    """For code that must not take a square of its input's length: give a hundred times what it needs, and an input so
    long that a square would take far more."""
    start = time.thread_time()
    yield
    used = time.thread_time() - start
    assert used < seconds, f"{what}: {used:.1f} processor seconds"
