"""PPO (and GRPO) of a language model by one command, with verl's keys.

    python -m steepest.trainer.main_ppo data.train_files=... data.val_files=... actor_rollout_ref.model.path=...

The configuration is checked whole before torch is imported, the data row by row before a model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from steepest.config.load import load_config
from steepest.loggers.start_display import start_shown
from steepest.process.entry import LOADED, leave, run_entry
from steepest.process.start_timing import Laps
from steepest.progress import START
from steepest.trainer.run.files_exist import check_files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the overrides describe. Returns 0; raises SteepestError for what the user can fix."""
    laps = Laps(LOADED)
    config = load_config(list(sys.argv[1:] if argv is None else argv))
    check_files(config)
    with start_shown():
        with START.activity("loading PyTorch and transformers"):
            from steepest.devices import hide_unusable

            hide_unusable(config.trainer.device)  # before transformers is imported
            from steepest.trainer.jobs.ppo import run_ppo
        laps.lap("imports")
        run_ppo(config, laps)
    return 0


if __name__ == "__main__":
    leave(run_entry(main, sys.argv[1:]))
