"""Keeps report.html of a running job up to date without slowing the job."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steepest.console import say
from steepest.report.page import write_report

SHARE = 0.01
"""Part of the time of a run that writing its report may take: after a slow writing the next due ones are left out."""


@dataclass
class LiveReport:
    """Writes the report of a run every `freq` steps and when the run ends. `freq` 0: never.

    A report that cannot be written does not end the run: the first failure is printed.
    """

    folder: Path
    freq: int
    total_steps: int
    clock: Callable[[], float] = time.perf_counter
    _not_before: float = float("-inf")
    _failed: bool = False

    def is_due(self, step: int) -> bool:
        """Whether the report shows this step soon after it ended: the first, every `freq`-th and the last."""
        return self.freq > 0 and (step <= 1 or step % self.freq == 0 or step == self.total_steps)

    def after(self, step: int) -> None:
        """Write the report if it is due after `step`, unless the last writing was too slow for that."""
        if self.is_due(step) and self.clock() >= self._not_before:
            self._write()

    def close(self) -> None:
        """Write the report of a run that ends, at whatever step."""
        if self.freq > 0:
            self._write()

    def _write(self) -> None:
        began = self.clock()
        try:
            write_report(self.folder)
        except Exception as error:
            if not self._failed:
                reason = f"{type(error).__name__}: {error}"
                say(f"warning: the report of the run could not be written ({reason}). The run goes on without it.")
            self._failed = True
        ended = self.clock()
        self._not_before = ended + (ended - began) / SHARE
