"""What a run shows on a terminal: a row of a table for each step, and bars for the run and for what it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steepest.progress import STEP, Activity

if TYPE_CHECKING:
    from rich.console import Console

HEADING_EVERY = 20
"""Rows after which the heading is written again."""


def format_seconds(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(value: float) -> str:
    """At most seven characters: 0.3125, 1.2e-06, 1319."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 0.001 or abs(value) >= 1e5 else f"{value:.4g}"


def _share(value: float) -> str:
    return f"{value:.0%}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


@dataclass(frozen=True)
class Column:
    """A column of the table: the first of `metrics` that a row has."""

    heading: str
    metrics: tuple[str, ...]
    form: Callable[[float], str] = _short
    rank: int = 0
    """On a narrow terminal those of the highest rank are left out first."""


LEFT = "left"
COLUMNS = (
    Column("score", ("critic/score/mean",)),
    Column("loss", ("train/loss",)),
    Column("KL", ("actor/reward_kl_penalty", "actor/kl_loss"), rank=1),
    Column("entropy", ("actor/entropy",), rank=2),
    Column("length", ("response_length/mean",), _whole, rank=1),
    Column("cut", ("response_length/clip_ratio",), _share, rank=4),
    Column("clip", ("actor/pg_clipfrac",), _share, rank=3),
    Column("grad", ("actor/grad_norm", "train/grad_norm"), rank=4),
    Column("lr", ("train/lr",), rank=3),
    Column("s/step", ("timing_s/step",)),
    Column(LEFT, (LEFT,), format_seconds),
)
_WIDTH = 9
VALIDATION = (("accuracy", "val/accuracy", _short), ("loss", "val/loss", _short),
              ("length", "val-aux/response_length/mean", _whole), ("prompts", "val-aux/num_prompts", _whole),
              ("seconds", "timing_s/testing", _short))  # fmt: skip


class Table:
    """Lines of the table for steps and validations."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._shown: tuple[Column, ...] = ()
        self._rows = 0

    def lines(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The lines of a row of metrics: a step's, a validation's, or both; a heading where the columns change."""
        lines: list[str] = []
        present = self._fitting(tuple(c for c in COLUMNS if any(name in metrics for name in c.metrics)))
        if "timing_s/step" in metrics and present:
            if present != self._shown or self._rows % HEADING_EVERY == 0:
                self._shown, self._rows = present, 0
                lines.append(f"{'step':>6}" + "".join(f"{column.heading:>{_WIDTH}}" for column in present))
            self._rows += 1
            cells = (column.form(_value(column, metrics)) for column in present)
            lines.append(f"{step:>6}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
        found = [f"{name} {form(metrics[key])}" for name, key, form in VALIDATION if key in metrics]
        if found and any(name.startswith("val") for name in metrics):
            lines.append(f"{step:>6}  validation: {', '.join(found)}")
        return lines

    def _fitting(self, columns: tuple[Column, ...]) -> tuple[Column, ...]:
        room = max(1, (self._width - 6) // _WIDTH)
        kept = sorted(columns, key=lambda column: column.rank)[:room]
        return tuple(column for column in columns if column in kept)


def _value(column: Column, metrics: Mapping[str, float]) -> float:
    return next(metrics[name] for name in column.metrics if name in metrics)


NAMES = {
    "gen": "generating", "reward": "scoring", "values": "values", "old_log_prob": "log-probs", "ref": "reference",
    "update_critic": "critic", "update_actor": "actor", "update_weights": "weights", "save_checkpoint": "saving",
}  # fmt: skip
"""Parts of a step, as the bar calls them."""


class Bars:
    """The bars: the run's, and that of what it is doing now. It is a listener of `STEP`."""

    def __init__(self, console: Console, total: int | None, start: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        texts = TextColumn("{task.description:>10}"), TextColumn("{task.fields[state]}")
        columns = texts[0], MofNCompleteColumn(), BarColumn(24), texts[1]
        self.console = console
        self._progress: Any = Progress(*columns, console=console, refresh_per_second=2)
        self._run = self._progress.add_task("step", total=total, completed=start, state="")
        self._now = self._progress.add_task("", total=None, visible=False, state="")
        self._open: list[Activity] = []
        self._hearing = STEP.heard_by(self)
        self._hearing.__enter__()
        self._progress.start()

    def write(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def stand(self, step: int, state: str) -> None:
        """The run has done `step`; `state` stands next to its bar."""
        more = {"state": state} if state else {}
        self._progress.update(self._run, completed=step, refresh=True, **more)

    def began(self, activity: Activity) -> None:
        self._open.append(activity)
        self._show()

    def changed(self, activity: Activity) -> None:
        self._show()

    def ended(self, activity: Activity) -> None:
        self._open.remove(activity)
        self._show()

    def _show(self) -> None:
        """The innermost activity that is counted, in its own bar."""
        counted = next((one for one in reversed(self._open) if one.total), None)
        outer = next((NAMES.get(one.name, one.name) for one in self._open if one is not counted), "")
        if counted is None:
            self._progress.update(self._now, visible=False)
            return
        name = NAMES.get(counted.name, counted.name)
        state = outer if outer and outer not in (name, "step") else ""
        self._progress.update(
            self._now, visible=True, description=name, total=counted.total, completed=counted.done, state=state
        )

    def close(self) -> None:
        self._hearing.__exit__(None, None, None)
        self._progress.stop()
