"""Writes metrics.jsonl, the record of a run. `loggers.jsonl.read_metrics` reads it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from steepest.loggers.api import LOGGERS, LoggerContext
from steepest.loggers.rows import RowFile


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
