"""Where the seconds before the first step go."""

from __future__ import annotations

import time
from collections.abc import Callable


class Laps:
    """Names each stretch of the start when it is over. `began`: when the command did; without it, now."""

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.began = self._last = clock() if began is None else began
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What lies between the last call and this one is called `name`; a name may come again."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return self._last - self.began

    def describe(self) -> str:
        """`11.2 s (imports 4.1, data 2.9, models 3.7, engine 0.5)`."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"{self.total:.1f} s ({parts})"
