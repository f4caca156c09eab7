"""Times the parts of a start: imports, data, models, engine."""

from __future__ import annotations

import time
from collections.abc import Callable


class Laps:
    """Measures the parts of a start. `began` is the time at which the command started; default: now."""

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.began = self._last = clock() if began is None else began
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Count the time since the last call under `name`. Times of the same name are added."""
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
