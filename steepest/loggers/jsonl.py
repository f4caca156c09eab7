"""Writes samples.jsonl, responses for people to read, and reads metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steepest.loggers.rows import RowFile, read_rows


class SampleLog:
    """Writes `samples.jsonl`, one line per logged response: what the model wrote and its score. See RowFile."""

    def __init__(self, path: str | Path, *, start_step: int = 0, redo: int | None = None) -> None:
        self._rows = RowFile(path, start_step=start_step, redo=redo)

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
