"""Supervised fine-tuning by one command: parquet, jsonl or json of conversations, or of prompts with answers.

python -m steepest.trainer.main_sft data.train_files=sft.parquet model.path=DIR
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from steepest.config.load import load_sft_config
from steepest.loggers.start_display import start_shown
from steepest.process.entry import leave, run_entry
from steepest.progress import START
from steepest.trainer.run.files_exist import check_files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job that the overrides describe. Returns 0; raises SteepestError for what the user can fix."""
    config = load_sft_config(list(sys.argv[1:] if argv is None else argv))
    check_files(config)
    with start_shown():
        with START.activity("loading PyTorch and transformers"):
            from steepest.devices import hide_unusable

            hide_unusable(config.trainer.device)  # before transformers is imported
            from steepest.trainer.jobs.sft import run_sft
        run_sft(config)
    return 0


if __name__ == "__main__":
    leave(run_entry(main, sys.argv[1:]))
