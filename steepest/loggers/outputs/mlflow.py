"""Logs to MLflow: to the server in MLFLOW_TRACKING_URI, else to a database file in the run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from steepest.loggers.api import LOGGERS, LoggerContext

_MAX_PARAM_CHARACTERS = 500
_PARAMS_A_CALL = 100
"""Parameters in one call, and characters of a value: limits of MLflow's tracking service."""


@LOGGERS.register("mlflow", package="mlflow")
class MlflowLogger:
    """Logs the project as experiment, the experiment name as run name and the configuration as parameters.

    MLflow allows no "@" in a metric's name: `acc/mean@1` is stored as `acc/mean_at_1`.
    """

    name = "mlflow"

    def __init__(self, context: LoggerContext) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        local = f"sqlite:///{context.run_folder.resolve() / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
        self._run_id = self._start(context)
        params = [Param(key, value[:_MAX_PARAM_CHARACTERS]) for key, value in flatten(context.config)]
        if context.start_step == 0:  # a parameter may be written once
            for i in range(0, len(params), _PARAMS_A_CALL):
                self._client.log_batch(self._run_id, params=params[i : i + _PARAMS_A_CALL])

    def _start(self, context: LoggerContext) -> str:
        id_file = context.run_folder / "mlflow_run_id.txt"
        if context.start_step and id_file.exists():
            return id_file.read_text(encoding="utf-8").strip()
        experiment = self._client.get_experiment_by_name(context.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(context.project)
        run_id = str(self._client.create_run(experiment_id, run_name=context.experiment).info.run_id)
        id_file.write_text(run_id + "\n", encoding="utf-8")
        return run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name.replace("@", "_at_"), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield ("a.b", "value") for each leaf of a nested configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
