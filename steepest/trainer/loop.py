"""The loop around the steps: which run, what is timed, when hooks are called. PPO and supervised training share it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from steepest.console import say
from steepest.learner.metrics import Metrics
from steepest.process.stopping import Stop, Stopped
from steepest.progress import STEP

BYTES_A_SECOND = 100e6
"""How fast a checkpoint is written, as long as none has been."""


@dataclass
class Timer:
    """Seconds spent in named parts of a step, and the floating-point operations done in them.

    A device works behind the program's back: it is waited for at the end of each part, or its time would count for a
    later one.
    """

    synchronize: Callable[[], None] = lambda: None
    take_flops: Callable[[], float] = lambda: 0.0
    """Operations of the models since it was last called; read at the end of each part."""
    rates: Callable[[Mapping[str, float], Mapping[str, float]], Metrics] = lambda seconds, flops: {}
    """Metrics from each part's seconds and operations."""
    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with STEP.activity(name):
                yield
                self.synchronize()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.add_flops(name, self.take_flops())

    def add_flops(self, name: str, flops: float) -> None:
        """Count operations for a part."""
        self.flops[name] = self.flops.get(name, 0.0) + flops

    def add(self, seconds: Mapping[str, float], flops: Mapping[str, float]) -> None:
        """Add what another timer measured."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        for name, value in flops.items():
            self.add_flops(name, value)

    def flush(self) -> Metrics:
        """The metrics of a step, whose part "step" contains all others; the timer is empty afterwards."""
        metrics = {f"timing_s/{name}": value for name, value in self.seconds.items()}
        metrics |= self.rates(self.seconds, {**self.flops, "step": sum(self.flops.values())})
        self.seconds, self.flops = {}, {}
        return metrics


@dataclass
class Schedule:
    """When to validate and when to save. The last step is validated where any is, and saved unless `save_last` is off.

    `save_freq`: 0 saves nothing, -1 nothing but the last step. `test_freq`: -1 validates nothing.
    """

    total_steps: int
    save_freq: int
    test_freq: int
    save_last: bool = True

    def saves(self, step: int) -> bool:
        last = self.save_last and self.save_freq != 0 and step == self.total_steps
        return step > 0 and (last or (self.save_freq > 0 and step % self.save_freq == 0))

    def tests(self, step: int) -> bool:
        return self.test_freq > 0 and step > 0 and (step % self.test_freq == 0 or step == self.total_steps)

    @property
    def saves_anything(self) -> bool:
        """Whether a run that ends early is saved, too."""
        return self.save_freq > 0 or (self.save_freq < 0 and self.save_last)

    def describe(self) -> str:
        """For the start summary: which steps are saved."""
        if not self.saves_anything:
            return "no step (trainer.save_freq=0); the trained model is not kept"
        every = f"every {self.save_freq} steps" if self.save_freq > 0 else ""
        last = "the last step" if self.save_last else ""
        text = " and ".join(part for part in (every, last) if part)
        hint = "; a kill before that loses the run, trainer.save_freq=N saves every N steps" if not every else ""
        return f"{text}, and the one at which Ctrl-C, SIGTERM or an error ends the run{hint}"


class Step(Protocol):
    """What `run_steps` repeats."""

    learning: bool
    """True while the weights may be neither those before the step nor those after it."""

    def __call__(self, step: int) -> Metrics: ...


class RunHooks(Protocol):
    """What `run_steps` calls around the steps; see `trainer.run.hooks.Run`."""

    def before_training(self, start_step: int) -> None: ...
    def examine(self, step: int, metrics: Metrics) -> Metrics: ...
    def remember(self, step: int) -> None: ...
    def save(self, step: int, metrics: Metrics) -> None: ...
    def log(self, step: int, metrics: Metrics) -> None: ...
    def validate(self, step: int) -> None: ...


def run_steps(step_fn: Step, timed: Timer, schedule: Schedule, hooks: RunHooks, start: int, stop: Stop) -> None:
    """Steps `start + 1` to the last. A step is saved before it is validated: a failing validation costs nothing.

    When anything ends the run early, the last whole step is saved, if its weights are still there. A signal waits for
    the end of the step, in the limits of `stop`.
    """
    hooks.before_training(start)
    hooks.remember(start)
    steps = _Steps(step_fn, timed, schedule, hooks, stop, start, start, start, start)
    try:
        steps.run()
    except Exception as error:
        note = steps.rescue()
        if stop.requested is None:
            say(f"the run ends early. {note}")
            raise
        raise Stopped(stop.requested, f"Then the step failed: {error} {note}") from error
    except KeyboardInterrupt as error:
        note = steps.rescue()
        raise Stopped(stop.requested or signal.SIGINT, note) from error


@dataclass
class _Steps:
    """The steps of one start. `done`: the last whole step. `tried`: the last one whose saving began. `saved`: the last
    one on disk."""

    step: Step
    timed: Timer
    schedule: Schedule
    hooks: RunHooks
    stop: Stop
    start: int
    done: int
    tried: int
    saved: int
    metrics: Metrics = field(default_factory=dict)
    """The metrics of the last whole step. They go into its checkpoint, so that a kill before its row loses nothing."""

    def run(self) -> None:
        for number in range(self.start + 1, self.schedule.total_steps + 1):
            self.end_if_asked()
            with self.stop.during("hold"):
                with self.stop.during("step"):
                    metrics = self.step(number)
                metrics |= self.hooks.examine(number, metrics)
                self.hooks.remember(number)
                self.done, self.metrics = number, metrics | self.timed.flush()
                try:
                    if self.schedule.saves(number):
                        self.save()
                finally:
                    self.hooks.log(number, self.metrics | self.timed.flush())
            if number < self.schedule.total_steps or self.schedule.tests(number):  # else the run has ended anyway
                self.end_if_asked()
            if self.schedule.tests(number):
                self.hooks.validate(number)

    def end_if_asked(self) -> None:
        if self.stop.requested is not None:
            raise Stopped(self.stop.requested)

    def save(self) -> None:
        """Save the last whole step, and measure for the next signal how long that takes."""
        self.tried, before = self.done, self.timed.seconds.get("save_checkpoint", 0.0)
        with self.timed("save_checkpoint"):
            self.hooks.save(self.done, self.metrics)
        self.saved = self.done
        self.stop.reserve = max(self.stop.reserve, self.timed.seconds["save_checkpoint"] - before)

    def rescue(self) -> str:
        """Save the last whole step when the run ends early, and tell what is left of the work."""
        if self.stop.at_once or not self.schedule.saves_anything or self.done == self.tried or self.step.learning:
            return self.what_is_left()
        try:
            with self.stop.during("hold"):
                self.save()
        except Exception as error:  # the disk that is full, for which the run ends
            return f"Step {self.done} could not be saved: {error} {self.what_is_left()}"
        return self.what_is_left()

    def what_is_left(self) -> str:
        lost = self.done - self.saved
        cut = "" if not self.step.learning else f"Step {self.done + 1} was cut off while the weights changed. "
        if not self.schedule.saves_anything:
            return f"{cut}Nothing is saved (trainer.save_freq=0): the same command starts again."
        if self.saved == 0:
            return f"{cut}No checkpoint was written: the same command starts again."
        again = f", and does {lost} step(s) again" if lost else ""
        return f"{cut}Step {self.saved} is saved; the same command resumes from it{again}."
