"""Loggers take the metrics of a run. A logger is one file: a class with `log` and `close`, registered by its name.

The package of a logger is imported only when the configuration names the logger. No logger needs torch.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from steepest.errors import ConfigError, SteepestError, setting
from steepest.registry import ModuleRegistry
from steepest.versions import pip_install

LOGGERS = ModuleRegistry("logger", setting("logger"), package="steepest.loggers.outputs")
"""Values are factories `f(LoggerContext) -> Logger`. The fact `package` names the module that must be importable;
the extra of Steepest that installs it has the logger's own name. The fact `start_hint` says what to do when the service
refuses to start. The fact `essential` marks a logger whose failure ends the run."""


@dataclass(frozen=True)
class LoggerContext:
    """What a logger gets when it is made: names, run folder, configuration and steps."""

    run_folder: Path
    project: str
    experiment: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as plain dicts, lists, strings and numbers."""
    total_steps: int | None = None
    """The number of the last step, for the progress bar."""
    start_step: int = 0
    """The step this run continues after; 0 for a new run. Rows that an earlier run logged after this step are
    replaced."""
    log_freq: int = 1
    """Steps from one line for people to the next. What is read by programs gets every step."""


class Logger(Protocol):
    """Takes one dict of numbers per step. `name` is its name in the table of loggers."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step. Values may be nan or inf; names are never changed."""

    def close(self) -> None:
        """Write everything that is still buffered. Called once, also when the run failed."""


class Guarded:
    """Wraps a logger. Its failures do not end the run: the first is a warning, all are counted and reported at the
    end."""

    def __init__(self, logger: Logger) -> None:
        self.logger, self.name = logger, logger.name
        self.num_failures = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            self.logger.log(step, metrics)
        except Exception as error:
            self._failed(f"at step {step}", error)

    def close(self) -> None:
        try:
            self.logger.close()
        except Exception as error:
            self._failed("while closing", error)
        if self.num_failures:
            warnings.warn(
                f"the logger {self.name!r} failed {self.num_failures} times; metrics.jsonl has every value it missed.",
                stacklevel=2,
            )

    def _failed(self, when: str, error: Exception) -> None:
        self.num_failures += 1
        if self.num_failures == 1:
            warnings.warn(
                f"the logger {self.name!r} failed {when} ({type(error).__name__}: {error}). The run goes on; "
                "further failures of it are counted and reported at the end.",
                stacklevel=3,
            )


class Loggers:
    """All loggers of a run. Those that are not essential are guarded; an essential one (jsonl) that fails raises."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)
        self._closed = False

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Give the metrics of one step to every logger. Values may be numbers, numpy scalars or 0-dim tensors."""
        numbers = {name: as_number(name, value) for name, value in metrics.items()}
        for logger in self.loggers:
            logger.log(step, numbers)

    def close(self) -> None:
        """Close every logger, also when one of them raises. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_number(name: str, value: Any) -> float | int:
    """Convert a value to int or float. Raises TypeError for anything else: metrics are numbers."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, (int, float)):
        return value
    if hasattr(value, "item"):  # numpy scalars and tensors of one element
        plain = value.item()
        if isinstance(plain, (int, float)):
            return int(plain) if isinstance(plain, bool) else plain
    raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a number")


def check_loggers(names: Sequence[str]) -> list[str]:
    """The problems of the names in `trainer.logger`, one message for each; empty if there is none.

    Looks for packages without importing them, so it can run before anything is loaded.
    """
    problems = []
    for name in names:
        try:
            entry = LOGGERS.get(name)
        except ConfigError as error:
            problems += error.marked_problems
            continue
        package = entry.facts.get("package")
        if package and not _is_installed(package):
            problems.append(
                f"{setting('logger')}: {name!r} needs the package {package}, which is not installed. "
                f"Run `{pip_install(name)}`, or take {name} out of {setting('logger')}."
            )
    return problems


def make_loggers(
    names: Sequence[str],
    run_folder: str | Path,
    project: str,
    experiment: str,
    config_dict: Mapping[str, Any],
    *,
    total_steps: int | None = None,
    start_step: int = 0,
    log_freq: int = 1,
) -> Loggers:
    """Make the loggers of a run. jsonl is always one of them; a repeated name counts once.

    Raises ConfigError for unknown names, packages that are not installed and services that refuse to start.
    """
    problems = check_loggers(names)
    if problems:
        raise ConfigError(problems)
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = LoggerContext(folder, project, experiment, config_dict, total_steps, start_step, log_freq)
    made: list[Logger] = []
    try:
        for name in dict.fromkeys(["jsonl", *names]):  # jsonl first: it has the row before a remote logger can fail
            made.append(_start(name, context))
    except BaseException:
        Loggers(made).close()
        raise
    return Loggers(made)


def _start(name: str, context: LoggerContext) -> Logger:
    entry = LOGGERS.get(name)
    try:
        logger: Logger = entry.value(context)
    except SteepestError:
        raise
    except Exception as error:
        hint = entry.facts.get("start_hint", "See to that")
        raise ConfigError(
            f"{setting('logger')}: {name} cannot start ({type(error).__name__}: {error}). {hint}, "
            f"or take {name} out of {setting('logger')}."
        ) from error
    return logger if entry.facts.get("essential") else Guarded(logger)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of a dotted name is missing
        return False
