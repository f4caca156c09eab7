"""Score a checkpoint or a model: `steepest evaluate`, and `Run.evaluate` in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steepest.loggers.start_display import start_shown
from steepest.progress import START

DEVICE = "trainer.device="


def main(
    source: str,
    words: Sequence[str],
    *,
    other: str | None = None,
    samples: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """See `jobs.evaluate.run_evaluation`, which is imported here: a package that cannot work is hidden from
    transformers before it is imported."""
    with start_shown():
        with START.activity("loading PyTorch and transformers"):
            from steepest.devices import hide_unusable

            hide_unusable(next((word.removeprefix(DEVICE) for word in words if word.startswith(DEVICE)), None))
            from steepest.trainer.jobs.evaluate import run_evaluation
        return run_evaluation(source, words, other=other, samples=samples, output=output)
