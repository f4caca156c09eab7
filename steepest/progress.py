"""What the program is doing now, for those who show it: parts of the start, and parts of a step with a count.

Code that takes long says so by `STEP.activity(...)` or `START.activity(...)`; a display listens. Without a listener
nothing happens. This file needs neither torch nor rich.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(eq=False)
class Activity:
    """One thing that is going on; `total` is None where nothing is counted."""

    name: str
    channel: Channel
    total: int | None = None
    done: int = 0

    def advance(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number
        for listener in self.channel.listeners:
            listener.changed(self)


class Listener(Protocol):
    """Shows activities. They nest: the last one that began ends first."""

    def began(self, activity: Activity) -> None: ...
    def changed(self, activity: Activity) -> None: ...
    def ended(self, activity: Activity) -> None: ...


@dataclass
class Channel:
    """Activities of one kind, and who listens to them."""

    listeners: list[Listener] = field(default_factory=list)

    @contextmanager
    def activity(self, name: str, total: int | None = None) -> Iterator[Activity]:
        """The block is this activity."""
        now = Activity(name, self, total)
        for listener in self.listeners:
            listener.began(now)
        try:
            yield now
        finally:
            for listener in self.listeners:
                listener.ended(now)

    @contextmanager
    def heard_by(self, listener: Listener) -> Iterator[None]:
        """Tell `listener` what begins in the block."""
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)


START, STEP = Channel(), Channel()
"""What happens before the first step, and in the steps and validations."""
