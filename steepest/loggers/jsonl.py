"""Writes metrics.jsonl, the record of a run, and samples.jsonl, responses for people to read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steepest.loggers.api import LOGGERS, LoggerContext
from steepest.loggers.rows import RowFile, read_rows


@LOGGERS.register("jsonl", essential=True)
class JsonlLogger:
    """Writes `metrics.jsonl` in the run folder, one line per step: {"step": N, "time": seconds since 1970, "name":
    value}.

    Numbers keep full precision. A value that is not finite is null, and "_nonfinite" says what it was.
    """

    name = "jsonl"

    def __init__(self, context: LoggerContext) -> None:
        self._rows = RowFile(context.run_folder / "metrics.jsonl", start_step=context.start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._rows.write({"step": step, "time": round(time.time(), 3), **metrics})

    def close(self) -> None:
        self._rows.close()


class SampleLog:
    """Writes `samples.jsonl`, one line per logged response: what the model wrote and its score."""

    def __init__(self, path: str | Path, *, start_step: int = 0) -> None:
        self._rows = RowFile(path, start_step=start_step)

    def add(
        self,
        step: int,
        split: str,
        *,
        prompt: Any,
        response: str,
        score: float | None,
        ground_truth: Any = None,
        **more: Any,
    ) -> None:
        """Append one response. `prompt` is its text or its messages; `score` is None when scoring failed."""
        row = {"step": step, "split": split, "prompt": prompt, "response": response}
        self._rows.write({**row, "score": score, "ground_truth": ground_truth, **more})

    def extend(self, step: int, split: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows that hold the keyword arguments of `add`."""
        for row in rows:
            self.add(step, split, **row)

    def close(self) -> None:
        self._rows.close()


def read_metrics(path: str | Path) -> dict[int, dict[str, float]]:
    """Step -> metrics of a metrics.jsonl. Rows of the same step (training and validation) are merged."""
    steps: dict[int, dict[str, float]] = {}
    for row in read_rows(path):
        step = row.pop("step")
        row.pop("time", None)
        steps.setdefault(step, {}).update(row)
    return steps
