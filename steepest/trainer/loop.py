"""The loop around the steps: which run, what is timed, when hooks are called. PPO and supervised training share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from steepest.learner.metrics import Metrics


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
    """When to validate and when to save. A frequency of -1 or 0 means never; the last step always counts."""

    total_steps: int
    save_freq: int
    test_freq: int

    def saves(self, step: int) -> bool:
        return self._due(step, self.save_freq)

    def tests(self, step: int) -> bool:
        return self._due(step, self.test_freq)

    def _due(self, step: int, freq: int) -> bool:
        return freq > 0 and step > 0 and (step % freq == 0 or step == self.total_steps)


class RunHooks(Protocol):
    """What `run_steps` calls around the steps; see `trainer.run.hooks.Run`."""

    def before_training(self, start_step: int) -> None: ...
    def save(self, step: int, metrics: Metrics) -> None: ...
    def log(self, step: int, metrics: Metrics) -> None: ...
    def validate(self, step: int) -> None: ...


def run_steps(step_fn: Callable[[int], Metrics], timed: Timer, schedule: Schedule, hooks: RunHooks, start: int) -> None:
    """Steps `start + 1` to the last. A step is saved before it is validated: a failing validation costs nothing."""
    hooks.before_training(start)
    for step in range(start + 1, schedule.total_steps + 1):
        metrics: dict[str, Any] = step_fn(step) | timed.flush()
        try:
            if schedule.saves(step):
                with timed("save_checkpoint"):
                    hooks.save(step, metrics)  # with them: a kill before the next line loses no row
        finally:
            hooks.log(step, metrics | timed.flush())
        if schedule.tests(step):
            hooks.validate(step)
