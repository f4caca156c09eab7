"""Shows what a start is doing: a spinner with what is done on a terminal, in a pipe a line when a part begins."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from steepest.console import say
from steepest.progress import START, Activity

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


class StartLines:
    """A line for each part, when it begins."""

    def __init__(self, write: Callable[[str], None] = say) -> None:
        self._write = write
        self._depth = 0

    def began(self, activity: Activity) -> None:
        if self._depth == 0:
            self._write(f"{activity.name} ...")
        self._depth += 1

    def changed(self, activity: Activity) -> None:
        pass

    def ended(self, activity: Activity) -> None:
        self._depth -= 1


class StartSpinner:
    """A spinner with the present part and the parts done with their seconds. It disappears between two parts."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._open: list[float] = []
        self._done: list[str] = []
        self._status: Status | None = None

    def began(self, activity: Activity) -> None:
        from rich.text import Text

        self._open.append(self._clock())
        if len(self._open) == 1:
            done = f"   (done: {', '.join(self._done)})" if self._done else ""
            text = Text(f"{activity.name} ...{done}", no_wrap=True, overflow="ellipsis")
            self._status = self._console.status(text)
            self._status.start()

    def changed(self, activity: Activity) -> None:
        pass

    def ended(self, activity: Activity) -> None:
        began = self._open.pop()
        if not self._open and self._status is not None:
            self._status.stop()
            self._status = None
            self._done.append(f"{activity.name} {self._clock() - began:.1f} s")


@contextmanager
def start_shown(stream: TextIO | None = None) -> Iterator[None]:
    """Show the parts of a start that happen in the block."""
    target = sys.stdout if stream is None else stream
    with START.heard_by(_display(target)):
        yield


def _display(stream: TextIO) -> StartLines | StartSpinner:
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream)
        if console.is_terminal and not console.is_dumb_terminal:
            return StartSpinner(console)
    return StartLines()
