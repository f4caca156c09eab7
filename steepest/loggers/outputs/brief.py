"""The console's line in short."""

from __future__ import annotations

from collections.abc import Mapping

from steepest.loggers.api import LOGGERS
from steepest.loggers.outputs.console import ConsoleLogger

_BRIEF = (
    "val/accuracy", "val/loss", "critic/score/mean", "train/loss", "actor/reward_kl_penalty", "actor/entropy",
    "actor/grad_norm", "train/grad_norm", "critic/vf_explained_var", "response_length/mean", "perf/throughput",
    "timing_s/step",
)  # fmt: skip


@LOGGERS.register("brief")
class BriefLogger(ConsoleLogger):
    """Prints the console's line with the most important metrics only; metrics.jsonl holds all."""

    name = "brief"

    def _of_line(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        return {name: metrics[name] for name in _BRIEF if name in metrics}
