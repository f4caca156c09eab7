"""Look at a PPO job before it runs: `steepest preflight`, with the keys of `steepest ppo`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout

from steepest.config.load import load_config
from steepest.loggers.start_display import start_shown
from steepest.process.entry import LOADED
from steepest.process.start_timing import Laps
from steepest.progress import START
from steepest.trainer.run.files_exist import check_files

JSON = "--json"


def main(argv: Sequence[str]) -> int:
    """Print the report of the job that the overrides describe. 0 without a problem, 1 with one; raises SteepestError
    for a configuration that is refused."""
    as_json = JSON in argv
    laps = Laps(LOADED)
    config = load_config([word for word in argv if word != JSON])
    check_files(config)
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), start_shown():
        with START.activity("loading PyTorch and transformers"):
            from steepest.devices import hide_unusable

            hide_unusable(config.trainer.device)  # before transformers is imported
            from steepest.trainer.jobs.preflight.command import preflight
        laps.lap("imports")
        report = preflight(config, laps)
    report.seconds = time.perf_counter() - LOADED
    report.show(as_json=as_json)
    return report.exit_code
