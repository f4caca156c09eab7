"""Which loggers a run gets, and what a failing one does to it."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from steepest.config.schema import Config, SFTConfig
from steepest.config.tree import leaves
from steepest.errors import ConfigError, SteepestError
from steepest.loggers import LOGGERS, api, check_loggers, make_loggers
from tests.support.machine import files_of_at_most, only_installed


def test_the_configuration_knows_the_same_names() -> None:
    for schema in (Config, SFTConfig):
        assert leaves(schema)["trainer.logger"].choices == tuple(LOGGERS.names())
    assert LOGGERS.names() == ["brief", "console", "jsonl", "mlflow", "swanlab", "tensorboard", "wandb"]


def test_jsonl_is_always_there_and_first(tmp_path: Path) -> None:
    with make_loggers(["console", "console"], tmp_path / "a" / "b", "p", "e", {}) as loggers:
        assert [logger.name for logger in loggers.loggers] == ["jsonl", "console"]
    assert (tmp_path / "a" / "b" / "metrics.jsonl").exists()
    with make_loggers([], tmp_path, "p", "e", {}) as loggers:
        assert [logger.name for logger in loggers.loggers] == ["jsonl"]


def test_all_wrong_names_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "tensorboard").mkdir(parents=True)
    (tmp_path / "site" / "tensorboard" / "__init__.py").write_text("raise SystemExit('it was imported')")
    for name in ("tensorboard", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    only_installed(monkeypatch, tmp_path / "site")
    assert check_loggers(["console", "tensorboard"]) == []
    with pytest.raises(ConfigError) as caught:
        make_loggers(["wandbb", "mlflow"], tmp_path / "run", "p", "e", {})
    unknown, missing = caught.value.problems
    assert unknown.startswith("logger='wandbb': no such logger. Did you mean 'wandb'? Known: brief, console, jsonl, ")
    assert "needs the package mlflow" in missing and "pip install -e '.[mlflow]'" in missing
    assert not (tmp_path / "run").exists()


def test_packages_are_looked_for_without_importing_them() -> None:
    assert api._is_installed("json") and not api._is_installed("no_such_package")
    assert not api._is_installed("no_such_package.inside")


@pytest.fixture
def register() -> Iterator[Any]:
    """Add loggers for one test; the table is as before afterwards."""
    with LOGGERS.temporarily():
        yield LOGGERS.register


class Recorder:
    """Keeps rows; fails at the steps it is told to."""

    name = "recorder"
    made: ClassVar[list[Recorder]] = []

    def __init__(self, context: api.LoggerContext, fail_at: tuple[int, ...] = (), fail_close: bool = False) -> None:
        self.context, self.fail_at, self.fail_close = context, fail_at, fail_close
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0
        Recorder.made.append(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step in self.fail_at:
            raise ConnectionError("no route")
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1
        if self.fail_close:
            raise TimeoutError("late")


def test_a_failing_logger_is_warned_about_once_counted_and_the_run_goes_on(tmp_path: Path, register: Any) -> None:
    register("recorder")(lambda context: Recorder(context, fail_at=(2, 3)))
    loggers = make_loggers(["recorder"], tmp_path, "p", "e", {})
    with pytest.warns(UserWarning, match=r"'recorder' failed at step 2 \(ConnectionError: no route\)") as seen:
        for step in range(1, 5):
            loggers.log(step, {"x": step})
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="'recorder' failed 2 times; metrics.jsonl has every value"):
        loggers.close()
    assert [step for step, _ in Recorder.made[-1].rows] == [1, 4]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_logger_that_fails_to_close_does_not_keep_the_others_open(tmp_path: Path, register: Any) -> None:
    register("first")(lambda context: Recorder(context, fail_close=True))
    register("second")(Recorder)
    loggers = make_loggers(["first", "second"], tmp_path, "p", "e", {})
    first, second = Recorder.made[-2:]
    with pytest.warns(UserWarning) as seen:
        loggers.close()
    assert [str(warning.message).partition(" (")[0].partition(";")[0] for warning in seen] == [
        "the logger 'recorder' failed while closing",
        "the logger 'recorder' failed 1 times",
    ]
    assert (first.closed, second.closed) == (1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.close()
    assert (first.closed, second.closed) == (1, 1)


def test_jsonl_that_cannot_write_ends_the_run(tmp_path: Path) -> None:
    loggers = make_loggers([], tmp_path, "p", "e", {})
    loggers.log(1, {"x": 1.0})
    said = r"metrics.jsonl: cannot append to this record of the run \(File too large\)"
    with files_of_at_most(60), pytest.raises(SteepestError, match=said):
        loggers.log(2, {"x": 1.0})


def test_a_service_that_refuses_to_start_is_an_error_of_the_configuration(tmp_path: Path, register: Any) -> None:
    @register("service", start_hint="Run `service login`")
    def start(context: api.LoggerContext) -> Recorder:
        raise RuntimeError("no key")

    register("recorder")(Recorder)
    with pytest.raises(ConfigError) as caught:
        make_loggers(["recorder", "service"], tmp_path, "p", "e", {})
    assert str(caught.value) == (
        "logger: service cannot start (RuntimeError: no key). Run `service login`, or take service out of logger."
    )
    assert Recorder.made[-1].closed == 1  # what had started is closed again


def test_a_logger_of_the_users_own(tmp_path: Path) -> None:
    code = (
        "class Mine:\n"
        "    name = 'mine'\n"
        "    def __init__(self, context): self.file = open(context.run_folder / 'mine.txt', 'w')\n"
        "    def log(self, step, metrics): self.file.write(f'{step} {metrics}')\n"
        "    def close(self): self.file.close()\n"
    )
    (tmp_path / "mine.py").write_text(code)
    with make_loggers([f"{tmp_path / 'mine.py'}:Mine"], tmp_path, "p", "e", {}) as loggers:
        loggers.log(1, {"a": 2})
    assert (tmp_path / "mine.txt").read_text() == "1 {'a': 2}"


def test_metrics_become_plain_numbers_and_nothing_else_is_taken(tmp_path: Path, register: Any) -> None:
    register("recorder")(Recorder)
    with make_loggers(["recorder"], tmp_path, "proj", "exp", {"a": 1}, total_steps=9, start_step=4) as loggers:
        loggers.log(5, {"t": torch.tensor(0.5), "n": np.int64(3), "f": np.float32(0.25), "b": True, "i": 2})
        with pytest.raises(TypeError, match="metric 'text' is a str, not a number"):
            loggers.log(6, {"text": "no"})
    row = Recorder.made[-1].rows[0][1]
    assert row == {"t": 0.5, "n": 3, "f": 0.25, "b": 1, "i": 2}
    assert [type(value) for value in row.values()] == [float, int, float, int, int]
    context = Recorder.made[-1].context
    assert (context.project, context.experiment, context.config) == ("proj", "exp", {"a": 1})
    assert (context.total_steps, context.start_step, context.run_folder) == (9, 4, tmp_path)
