"""`steepest watch`: curves, health and the newest answers of a run on a terminal, from the files of its folder."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steepest.console import shortened
from steepest.loggers.rows import read_rows
from steepest.loggers.terminal import format_seconds
from steepest.report import read
from steepest.report.page import metrics_file

if TYPE_CHECKING:
    from rich.console import Console, Group

BARS = "▁▂▃▄▅▆▇█"
SHOWN = (
    ("validation", "val/accuracy"),
    ("score", "critic/score/mean"),
    ("loss", "train/loss"),
    ("KL", "actor/reward_kl_penalty"),
    ("KL (loss)", "actor/kl_loss"),
    ("entropy", "actor/entropy"),
    ("length", "response_length/mean"),
    ("cut", "response_length/clip_ratio"),
    ("clipped", "actor/pg_clipfrac"),
    ("explained", "critic/vf_explained_var"),
    ("grad norm", "actor/grad_norm"),
    ("s/step", "timing_s/step"),
)
"""Label and metric of each curve; those that the run has are shown."""
_SAMPLES = 3
_NUMBERS = 33
"""Characters of a line of a curve besides the curve."""


@dataclass
class Watcher:
    """Reads a run folder again where its files have grown."""

    folder: Path
    _size: int = -1
    _steps: dict[int, dict[str, float]] = field(default_factory=dict)

    def screen(self, width: int, now: float) -> Group:
        """What is shown, `width` characters wide, at the time `now` (seconds since 1970).

        Raises SteepestError for a folder that is no run's, and for a damaged file.
        """
        from rich.console import Group
        from rich.text import Text

        steps = self._read()
        lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in self._lines(steps, width, now)]
        return Group(*lines)

    def _read(self) -> dict[int, dict[str, float]]:
        file = metrics_file(self.folder)
        if (size := file.stat().st_size) != self._size:
            self._steps, self._size = read.read_steps(file), size
        return self._steps

    def _lines(self, steps: Mapping[int, Mapping[str, float]], width: int, now: float) -> list[str]:
        if not steps:
            return [f"{self.folder}: no step yet"]
        last = max(steps)
        times = [found["time"] for found in steps.values() if "time" in found]
        age = f"{format_seconds(times[-1] - times[0])} of training, the last row {format_seconds(now - times[-1])} ago"
        lines = [f"step {last}   {age}   {self.folder}", ""]
        for label, metric in SHOWN:
            values = [found[metric] for found in steps.values() if metric in found]
            if values:
                lines.append(curve_line(label, values, width))
        return lines + self._health(steps, last) + self._samples(width)

    def _health(self, steps: Mapping[int, Mapping[str, float]], last: int) -> list[str]:
        found = [
            f"  {name}: steps {', '.join(_stretch(first, end) for first, end in stretches)}"
            + ("   (now)" if stretches[-1][1] == last else "")
            for name, stretches in sorted(read.events(steps).items())
        ]
        return ["", "health", *found] if found else []

    def _samples(self, width: int) -> list[str]:
        file = self.folder / "samples.jsonl"
        rows = list(read_rows(file)) if file.exists() else []
        if not rows:
            return []
        newest = [row for row in rows if row["step"] == rows[-1]["step"]][:_SAMPLES]
        lines = ["", f"answers of step {rows[-1]['step']}"]
        for row in newest:
            score = "no score" if row.get("score") is None else f"score {row['score']:.3g}"
            lines += [
                f"  {shortened(_question(row), width - 4)}",
                f"    {score}: {shortened(str(row['response']), width)}",
            ]
        return lines


def curve_line(label: str, values: Sequence[float], width: int) -> str:
    """Label, the newest value, the curve, and the range of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return f"{label:<11}{values[-1]:>9.4g}   no finite value"
    low, high = min(finite), max(finite)
    room = max(1, width - _NUMBERS)
    return f"{label:<11}{values[-1]:>9.4g} {spark(values, room)} {low:.3g} to {high:.3g}"


def spark(values: Sequence[float], room: int) -> str:
    """At most `room` characters, whose heights are those of the values; of more values each character is a mean.
    A blank stands where no value is finite."""
    count = min(room, len(values))
    ends = [round(place * len(values) / count) for place in range(count + 1)]
    means = [_mean(values[start:end]) for start, end in pairwise(ends)]
    finite = [one for one in means if one is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(" " if one is None else BARS[round((one - low) / step)] for one in means)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _stretch(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _question(row: Mapping[str, Any]) -> str:
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content"))
    return str(prompt)


def snapshot(folder: Path, console: Console) -> str:
    """What `watch` shows now, as plain lines."""
    with console.capture() as captured:
        console.print(Watcher(folder).screen(console.width, time.time()))
    return captured.get().rstrip("\n")


def watch(folder: Path, console: Console, *, interval: float) -> None:
    """Show the run on a terminal until Ctrl-C."""
    from rich.live import Live

    watcher = Watcher(folder)
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(watcher.screen(console.width, time.time()), refresh=True)
            time.sleep(interval)
