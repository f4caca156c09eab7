"""Prints one line per step on standard output; on a terminal a table with bars below it."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from steepest.loggers.api import LOGGERS, LoggerContext
from steepest.loggers.terminal import LEFT, Bars, Table, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

_ORDER = (
    "val/",
    "val-core/",
    "val-aux/",
    "training/global_step",
    "training/epoch",
    "train/",
    "critic/score/",
    "reward/",
    "critic/rewards/",
    "actor/",
    "critic/",
    "response_length",
    "prompt_length",
    "mismatch/",
    "training/",
)
"""Groups of metrics that are printed first. The others follow in the order of their first appearance, timings last."""

_LAST = ("perf/", "timing_s/", "eta_s")
_WINDOW = 10
"""Number of steps over which the speed and the time left are averaged."""


@LOGGERS.register("console")
class ConsoleLogger:
    """In a pipe or a file: `step:N - name:value - name:value ...`, each line flushed; five significant digits, whole
    numbers in full, nan and inf as such. The last entry, `eta_s`, is the number of seconds until the last step.

    On a terminal: a row of a table with the numbers one looks at first, and bars below it (`loggers/terminal.py`).
    Every `log_freq`-th step has a line; the first, the last and validations always have one.
    """

    name = "console"

    def __init__(
        self,
        context: LoggerContext,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._context = context
        self._seen: dict[str, int] = {}
        self._pace = Pace(clock)
        self._bars: Bars | None = None
        if console is None and self._stream.isatty():
            console = _rich_console(self._stream)
        if console is not None:
            self._bars = Bars(console, context.total_steps, context.start_step)
            self._table = Table(console.width)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.mark(step, metrics.get("timing_s/step"))
        left = self._pace.seconds_left(self._context.total_steps)
        if self._bars is not None:
            self._show(self._bars, step, metrics, left)
        elif self._is_due(step, metrics):
            ending = {} if left is None or step == self._context.total_steps else {"eta_s": round(left)}
            print(self._line(step, {**self._of_line(metrics), **ending}), file=self._stream, flush=True)

    def _of_line(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """What a line in a pipe shows: of the health checks, those that found something."""
        return {name: value for name, value in metrics.items() if value or not name.startswith("health/")}

    def _is_due(self, step: int, metrics: Mapping[str, float]) -> bool:
        first, last = self._context.start_step + 1, self._context.total_steps
        is_validation = any(name.startswith(_ORDER[:3]) for name in metrics)
        return is_validation or step % self._context.log_freq == 0 or step in (first, last)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        for name in metrics:
            self._seen.setdefault(name, len(self._seen))
        ordered = sorted(metrics, key=lambda name: (_rank(name), self._seen[name]))
        return " - ".join([f"step:{step}", *(f"{name}:{format_number(metrics[name])}" for name in ordered)])

    def _show(self, bars: Bars, step: int, metrics: Mapping[str, float], left: float | None) -> None:
        if self._is_due(step, metrics):
            shown = dict(metrics) if left is None else {**metrics, LEFT: left}
            for line in self._table.lines(step, shown) or [self._line(step, metrics)]:
                bars.write(line)
        parts = [] if left is None else [f"{format_seconds(left)} left"]
        if "perf/throughput" in metrics:
            parts.append(f"{metrics['perf/throughput']:,.0f} tokens/s")
        bars.stand(step, ", ".join(parts))

    def close(self) -> None:
        if self._bars is not None:
            self._bars.close()
            self._bars = None


def _rich_console(stream: TextIO) -> Console | None:
    """None on a terminal that cannot move its cursor."""
    from rich.console import Console

    console = Console(file=stream)
    return console if console.is_terminal and not console.is_dumb_terminal else None


def format_number(value: float) -> str:
    """Format whole numbers in full and others with five significant digits: 1319, 0.03125, 1e-06, nan, -inf."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.5g}"


def _rank(name: str) -> int:
    for rank, prefix in enumerate(_ORDER):
        if name.startswith(prefix):
            return rank
    for rank, prefix in enumerate(_LAST):
        if name.startswith(prefix):
            return len(_ORDER) + 1 + rank
    return len(_ORDER)


class Pace:
    """Averages the seconds per step over the last steps, for the time left. `clock` returns seconds."""

    def __init__(self, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)

    def mark(self, step: int, seconds: float | None = None) -> None:
        """Record that a step is done. `seconds`, if known, is its duration; with it the first step counts too.

        A second row of the same step (validation) changes the time of the step, not the number of steps.
        """
        now = self._clock()
        if not self._marks and seconds is not None:
            self._marks.append((step - 1, now - seconds))
        if self._marks and self._marks[-1][0] == step:
            self._marks.pop()
        self._marks.append((step, now))

    def seconds_left(self, total_steps: int | None) -> float | None:
        """Seconds until the last step; None before the first whole step, or if the number of steps is not known."""
        if total_steps is None or len(self._marks) < 2:
            return None
        (first, start), (last, now) = self._marks[0], self._marks[-1]
        return max(0, total_steps - last) * (now - start) / (last - first)
