"""Prints one line per step on standard output, and on a terminal a progress bar below the lines."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from steepest.loggers.api import LOGGERS, LoggerContext

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

_LAST = ("perf/", "timing_s/")
_WINDOW = 10
"""Number of steps over which the speed and the time left are averaged."""


@LOGGERS.register("console")
class ConsoleLogger:
    """Prints `step:N - name:value - name:value ...`: five significant digits, whole numbers in full, nan and inf as
    such.

    On a terminal a progress bar with the time left and tokens per second stays below the lines. In a pipe or a file
    there are only the lines, each flushed.
    """

    name = "console"

    def __init__(self, context: LoggerContext, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._seen: dict[str, int] = {}
        self._bar: _Bar | None = None
        if self._stream.isatty():
            self._bar = _Bar.open(self._stream, context)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name in metrics:
            self._seen.setdefault(name, len(self._seen))
        ordered = sorted(metrics, key=lambda name: (_rank(name), self._seen[name]))
        line = " - ".join([f"step:{step}", *(f"{name}:{format_number(metrics[name])}" for name in ordered)])
        if self._bar is not None:
            self._bar.show(line, step, metrics)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


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


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Bar:
    """The progress bar of a terminal."""

    def __init__(self, progress: Any, context: LoggerContext) -> None:
        self._progress, self._total = progress, context.total_steps
        self._pace = Pace()
        self._task = progress.add_task("", total=context.total_steps, completed=context.start_step, state="")
        progress.start()

    @classmethod
    def open(cls, stream: TextIO, context: LoggerContext) -> _Bar | None:
        """Make the bar; None on a terminal that cannot move its cursor."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(file=stream)
        if not console.is_terminal or console.is_dumb_terminal:
            return None
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[state]}"))
        return cls(Progress(*columns, console=console, refresh_per_second=2), context)

    def show(self, line: str, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._pace.mark(step, metrics.get("timing_s/step"))
        left = self._pace.seconds_left(self._total)
        parts = [] if left is None else [f"{format_seconds(left)} left"]
        if "perf/throughput" in metrics:
            parts.append(f"{metrics['perf/throughput']:,.0f} tokens/s")
        more = {"state": ", ".join(parts)} if parts else {}
        self._progress.update(self._task, completed=step, refresh=True, **more)

    def close(self) -> None:
        self._progress.stop()
