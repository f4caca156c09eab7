"""Writes TensorBoard's event files into the run folder, or into TENSORBOARD_DIR."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from steepest.loggers.api import LOGGERS, LoggerContext


@LOGGERS.register("tensorboard", package="tensorboard")
class TensorBoardLogger:
    """Logs metrics as scalars and the configuration as text. View them with `tensorboard --logdir FOLDER`."""

    name = "tensorboard"

    def __init__(self, context: LoggerContext) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.environ.get("TENSORBOARD_DIR") or str(context.run_folder / "tensorboard")
        # after a resume the points that the killed run wrote beyond the checkpoint are hidden
        purge = context.start_step + 1 if context.start_step else None
        self._writer = SummaryWriter(folder, purge_step=purge)
        text = json.dumps(context.config, indent=2, default=str)
        self._writer.add_text("config", "    " + text.replace("\n", "\n    "), context.start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
