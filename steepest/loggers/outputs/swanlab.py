"""Logs to SwanLab. SWANLAB_MODE=offline writes into the run folder and needs no account."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steepest.loggers.api import LOGGERS, LoggerContext


@LOGGERS.register("swanlab", package="swanlab", start_hint="Run `swanlab login` or set SWANLAB_MODE=offline")
class SwanlabLogger:
    """Uses one SwanLab run per run folder. Its id is kept in `swanlab_run_id.txt`, so a resumed run continues it."""

    name = "swanlab"

    def __init__(self, context: LoggerContext) -> None:
        import swanlab

        id_file = context.run_folder / "swanlab_run_id.txt"
        known = id_file.read_text(encoding="utf-8").strip() if context.start_step and id_file.exists() else None
        folder = context.run_folder / "swanlab"
        folder.mkdir(exist_ok=True)
        self._run: Any = swanlab.init(
            project=context.project,
            name=context.experiment,
            config=dict(context.config),
            log_dir=str(folder),
            id=known,
            resume="allow" if known else None,
        )
        id_file.write_text(self._run.id + "\n", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
