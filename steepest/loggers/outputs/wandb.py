"""Logs to Weights & Biases. WANDB_MODE=offline writes into the run folder and needs no account."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steepest.loggers.api import LOGGERS, LoggerContext


@LOGGERS.register("wandb", package="wandb", start_hint="Run `wandb login` or set WANDB_MODE=offline")
class WandbLogger:
    """Uses one wandb run per run folder. Its id is kept in `wandb_run_id.txt`, so a resumed run continues it."""

    name = "wandb"

    def __init__(self, context: LoggerContext) -> None:
        import wandb

        id_file = context.run_folder / "wandb_run_id.txt"
        known = id_file.read_text(encoding="utf-8").strip() if context.start_step and id_file.exists() else None
        self._run: Any = wandb.init(
            project=context.project,
            name=context.experiment,
            config=dict(context.config),
            dir=str(context.run_folder),
            id=known,
            resume="allow" if known else None,
        )
        id_file.write_text(self._run.id + "\n", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
