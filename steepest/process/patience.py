"""Says what a command waits for, when that takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context

from steepest.console import say

FIRST_SECONDS, NEXT_SECONDS = 3.0, 30.0


@contextmanager
def waiting_for(
    what: str,
    *,
    first: float = FIRST_SECONDS,
    then: float = NEXT_SECONDS,
    tell: Callable[[str], None] = say,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Print `what` after `first` seconds of the block and again every `then` seconds, with the time that has passed.

    A thread prints, so that the block may be one call that does not return.
    """
    over, began = threading.Event(), clock()

    def watch() -> None:
        patience = first
        while not over.wait(patience):
            tell(f"waiting for {what} ({clock() - began:.0f} s) ...")
            patience = then

    thread = threading.Thread(target=copy_context().run, args=(watch,), name="patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
