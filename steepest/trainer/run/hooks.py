"""What happens around the steps: logging, health, validation, checkpoints. The step itself knows none of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from steepest.console import say, shortened
from steepest.errors import HealthError, SteepestError
from steepest.learner.checkpoint import CheckpointStore, Start
from steepest.learner.metrics import Metrics
from steepest.loggers.api import Loggers, as_number
from steepest.loggers.jsonl import SampleLog, read_metrics
from steepest.loggers.rows import dumps, plain, restored
from steepest.process.stopping import STOP
from steepest.trainer.loop import Schedule
from steepest.trainer.run.health.checks import Seen
from steepest.trainer.run.health.watch import Health
from steepest.trainer.run.metrics import speed_metrics
from steepest.trainer.run.resume import UNREADABLE
from steepest.trainer.run.validation import Evaluation, Evaluator

ACCURACY = "val/accuracy"
GLOBAL_STEP = "training/global_step"
"""Stands in the row of a training step, and not in that of a validation."""
METRICS = "metrics"
"""Entry of a checkpoint's state: the row of its step."""


def validation_history(metrics_file: Path, start: Start, *, metric: str = ACCURACY) -> dict[int, float]:
    """Step -> result of every validation of this run before `start`, from its metrics.jsonl."""
    if start.step == 0 or not metrics_file.exists():
        return {}
    rows = read_metrics(metrics_file).items()
    return {step: row[metric] for step, row in rows if metric in row and step <= start.step}


def owes_validation(schedule: Schedule, start: Start, history: Mapping[int, float]) -> bool:
    """Whether the run was killed after it had saved the step that it starts from, and before it had validated it."""
    return schedule.tests(start.step) and start.step not in history


def is_finished(schedule: Schedule, start: Start, history: Mapping[int, float], metrics_file: Path) -> bool:
    """Whether no step, no validation and no row of the metrics is left to do."""
    over = start.step >= schedule.total_steps and not owes_validation(schedule, start, history)
    return over and unlogged_row(metrics_file, start) is None


def kept_row(metrics: Metrics) -> dict[str, Any]:
    """The row of a step as a checkpoint's state holds it."""
    return plain({name: as_number(name, value) for name, value in metrics.items()})


def unlogged_row(metrics_file: Path, start: Start) -> Metrics | None:
    """The metrics of the step that a run resumes from, if a kill fell between its checkpoint and its row.

    None where the checkpoint is another run's: the record of this one begins with its own first step.
    """
    kept = start.state.get(METRICS)
    if start.checkpoint is None or kept is None or start.checkpoint.resolve().parent != metrics_file.resolve().parent:
        return None
    logged = read_metrics(metrics_file).get(start.step, {}) if metrics_file.exists() else {}
    return None if GLOBAL_STEP in logged else restored(kept)


@dataclass
class Run:
    """The hooks of `loop.run_steps` over one run folder."""

    folder: Path
    loggers: Loggers
    store: CheckpointStore
    writers: Mapping[str, Callable[[Path], None]]
    """Sub-folder of a checkpoint -> what writes it."""
    state: Callable[[], dict[str, Any]]
    """What a resumed run needs in addition to the folders of `writers`, as it is now."""
    checkpoint_bytes: int
    """About how much disk one checkpoint takes."""
    evaluator: Evaluator
    schedule: Schedule
    health: Health
    ends_on_problem: bool
    """Whether a check that counts as a problem ends the run."""
    val_before_train: bool
    steps_per_epoch: int
    sample_log: SampleLog
    num_logged_samples: int
    validation_data_dir: str | None
    owes_validation: bool = False
    """See `owes_validation`; the start step is then validated first."""
    history: dict[int, float] = field(default_factory=dict)
    remembered: dict[str, Any] = field(default_factory=dict)

    def before_training(self, start_step: int) -> None:
        """Validation before the first step; after a kill between saving and validating, the one that is missing."""
        if self.owes_validation or (start_step == 0 and self.val_before_train):
            self.validate(start_step)

    def examine(self, step: int, metrics: Metrics) -> Metrics:
        """The metrics of the health checks, which are run on those of the step."""
        return self.health.examine(Seen(step, metrics, self.history))

    def remember(self, step: int) -> None:
        """Note the state at the end of a step: what ends the next one early may have changed it, the weights not."""
        self.remembered = self.state()

    def save(self, step: int, metrics: Metrics) -> None:
        """The step's metrics go into the checkpoint too, see `unlogged_row`."""
        state = {"step": step, METRICS: kept_row(self._row(step, metrics)), **self.remembered}
        self.store.save(step, self.writers, state, expected_bytes=self.checkpoint_bytes)

    def _row(self, step: int, metrics: Metrics) -> Metrics:
        epoch = {"training/epoch": float((step - 1) // self.steps_per_epoch)}
        return {**epoch, **metrics, GLOBAL_STEP: float(step), **speed_metrics(metrics)}

    def log(self, step: int, metrics: Metrics) -> None:
        """Warnings first, then the step's line. Metrics are written even when saving the step failed.

        Raises HealthError for a problem that ends the run; after the last step there is nothing to end.
        """
        for message in self.health.said:
            say(f"warning: step {step}: {message}.")
        self.loggers.log(step, self._row(step, metrics))
        if self.ends_on_problem and self.health.problems and step < self.schedule.total_steps:
            raise HealthError(
                f"step {step}: {self.health.problems[0]}. The run ends here because of trainer.on_problem=stop; with "
                "trainer.on_problem=warn the same command goes on."
            )

    def validate(self, step: int) -> None:
        """Score the validation set, remember the best step, and print one line.

        The row in metrics.jsonl comes last: a run that was killed before it validates the step again.
        """
        start = time.perf_counter()
        found = self.evaluator()
        metrics = {**found.metrics, ACCURACY: found.score, "timing_s/testing": time.perf_counter() - start}
        with STOP.during("hold"):
            self._write_samples(step, found)
            if self.store.holds(step):
                self.store.mark_best(step, found.score)
            self.loggers.log(step, metrics)
            self.history[step] = found.score

    def close(self) -> None:
        self.loggers.close()
        self.sample_log.close()

    def _write_samples(self, step: int, found: Evaluation) -> None:
        shown = found.samples[: self.num_logged_samples]
        self.sample_log.extend(step, "val", shown)
        for sample in shown:
            say(f"sample {sample['id']}, score {sample['score']}: {shortened(sample['response'])}")
        if self.validation_data_dir:
            rows = [{"step": step, "split": "val", **sample} for sample in found.samples]
            write_jsonl(Path(self.validation_data_dir) / f"{step}.jsonl", rows)


def changed_values(path: Path, new: Any) -> list[str]:
    """Values of a `config.yaml` that differ from `new`, as `key: old -> new`; none where no file can be read."""
    if not path.exists():
        return []
    before, after = saved_values(path), flatten(new)
    if before is None:
        say(f"{path} cannot be read, so what changed since the run's last start is not known; it is written again.")
        return []
    return [f"{key}: {before.get(key)} -> {value}" for key, value in after.items() if before.get(key, value) != value]


def saved_values(path: Path) -> dict[str, Any] | None:
    """Key -> value of a `config.yaml`; None where there is none that can be read."""
    try:
        return flatten(OmegaConf.to_container(OmegaConf.load(path)))
    except UNREADABLE:
        return None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix.rstrip("."): tree}
    return {key: value for name, branch in tree.items() for key, value in flatten(branch, f"{prefix}{name}.").items()}


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """A whole file at once: a step that is repeated after a resume replaces its own file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(dumps(record) + "\n" for record in records)
    except OSError as error:
        raise SteepestError(
            f"{path}: the responses cannot be written ({error.strerror}). Make room, or choose another folder, then "
            "start the same command again: it resumes from the last checkpoint."
        ) from error
