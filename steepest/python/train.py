"""`steepest.train`: a run of PPO or GRPO from a Python program or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steepest.config.load import load_settings
from steepest.config.schema import Config
from steepest.config.sections.reward import GIVEN
from steepest.errors import ConfigError
from steepest.loggers.start_display import start_shown
from steepest.process.entry import LOADED, stoppable
from steepest.process.start_timing import Laps
from steepest.progress import START
from steepest.python.rows import Rows, files_of
from steepest.python.run import Run
from steepest.rewards.given import given
from steepest.trainer.run.files_exist import check_files

Reward = Callable[..., Any]
NO_VALIDATION = {"trainer.val_before_train": False, "trainer.test_freq": -1, "trainer.val_only": False}
"""What holds without rows to validate on."""


def train(
    model: str | Path,
    train: Rows,
    *,
    val: Rows | None = None,
    reward: Reward | str | Sequence[Reward | str] | Mapping[str, Any] | None = None,
    algorithm: str = "ppo",
    folder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train a model, and return the run.

    model: folder or hub id, as `actor_rollout_ref.model.path`.
    train, val: rows (a `datasets.Dataset`, a pandas or polars frame, a pyarrow table, a list of dicts), or a path or
        hub id; docs/own_data.md has the columns. Rows are written next to the run folder. Without `val` nothing is
        validated.
    reward: a function, the name of a reward, a list of both, or `reward.functions` with weights; functions take this
        project's keywords or TRL's (docs/own_data.md) and are called in this process. None: the reward that each row's
        data_source chooses.
    algorithm: "ppo", or the name of a preset such as "grpo".
    folder: the run folder, `trainer.default_local_dir`. A run that is in it goes on.
    settings: any configuration key, `**{"trainer.total_training_steps": 20}`.

    Ctrl-C ends the step, saves it and raises KeyboardInterrupt; the same call continues from there.
    Raises SteepestError (ConfigError, DataError, ...) with the message that the command prints.
    """
    named, functions = _rewards(reward)
    values = {"actor_rollout_ref.model.path": str(model), **named, **settings}
    if folder is not None:
        values["trainer.default_local_dir"] = str(folder)
    preset = None if algorithm == "ppo" else algorithm
    with given(functions), stoppable():
        config = _with_data(values, preset, train, val)
        laps = Laps(LOADED)
        check_files(config)
        with start_shown():
            with START.activity("loading PyTorch and transformers"):
                from steepest.devices import hide_unusable

                hide_unusable(config.trainer.device)
                from steepest.trainer.jobs.ppo import run_ppo
            laps.lap("imports")
            return Run(run_ppo(config, laps).folder)


def _with_data(values: dict[str, Any], preset: str | None, train: Rows, val: Rows | None) -> Config:
    """The configuration with the files of the data, which lie next to the run folder: so it is read twice."""
    if twice := [key for key in ("data.train_files", "data.val_files") if key in values]:
        raise ConfigError(f"{twice[0]}: the data are the arguments train and val of steepest.train. Remove the key.")
    if val is None:
        asked = [key for key, off in NO_VALIDATION.items() if values.get(key, off) != off]
        if asked:
            raise ConfigError(
                f"{asked[0]}={values[asked[0]]}: there are no rows to validate on. Give val, or remove it."
            )
        values = {**NO_VALIDATION, **values}
    placeholders = {"data.train_files": "train", "data.val_files": "val"}
    run = Path(str(load_settings({**values, **placeholders}, preset).trainer.default_local_dir))
    data = run.with_name(f"{run.name}.data")
    files = {"data.train_files": files_of(train, data, "train")}
    files["data.val_files"] = files["data.train_files"] if val is None else files_of(val, data, "val")
    return load_settings({**values, **files}, preset)


def _rewards(reward: Any) -> tuple[dict[str, Any], dict[str, Reward]]:
    """The setting `reward.functions`, and the functions that it names."""
    if reward is None:
        return {}, {}
    if isinstance(reward, Mapping):
        return {"reward.functions": dict(reward)}, {}
    weights, functions = dict[str, float](), dict[str, Reward]()
    for one in [reward] if callable(reward) or isinstance(reward, str) else reward:
        name = one if isinstance(one, str) else GIVEN + _name_of(one)
        if name in weights:
            raise ConfigError(f"reward: two are called {name.removeprefix(GIVEN)}. Give one of them another __name__.")
        weights[name] = 1.0
        if not isinstance(one, str):
            functions[name] = one
    return {"reward.functions": weights}, functions


def _name_of(function: Any) -> str:
    if not callable(function):
        raise ConfigError(
            f"reward: found {type(function).__name__}; expected a function, the name of a reward, or a list of both."
        )
    name = str(getattr(function, "__name__", type(function).__name__))
    return name if name.isidentifier() else "reward"
