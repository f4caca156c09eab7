"""Measures how much of a small model's PPO step is not model arithmetic: the quickstart's step, part by part.

    python -m bench.overhead                         prepares the quickstart's model once, then measures
    python -m bench.overhead --folder DIR --steps 10 --threads 1

Time "in the models" is the time within their calls: forward passes, heads, backward passes, optimizer steps, and the
rollout engine's forward passes. All other time is overhead: packing and batches, sampling and its bookkeeping, decoding
to text, the round trip to the reward workers, statistics, and after the step the loggers. Two clocks are shown: wall
time, and processor seconds of this process, which hardly change when the machine has other work.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import SPINNING, STARTED_WITH

PARTS = ("gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "update_weights",
         "describe", "log", "step")  # fmt: skip
TARGET = 0.15
"""The largest accepted share of overhead in a step."""


Seconds = tuple[float, float]
"""Wall seconds, and processor seconds of this process."""


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def plus(a: Seconds, b: Seconds) -> Seconds:
    return a[0] + b[0], a[1] + b[1]


def minus(a: Seconds, b: Seconds) -> Seconds:
    return a[0] - b[0], a[1] - b[1]


class Clock:
    """Measures wall and processor seconds within the outermost of the functions that it wraps; `now` reads both."""

    def __init__(self, now: Callable[[], Seconds] = now) -> None:
        self.now = now
        self.spent = (0.0, 0.0)
        self._depth = 0

    def around(self, owner: Any, name: str) -> None:
        """Replace `owner.name` by a timed version of itself."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            if self._depth:
                return function(*args, **options)
            self._depth, began = 1, self.now()
            try:
                return function(*args, **options)
            finally:
                self._depth = 0
                self.spent = plus(self.spent, minus(self.now(), began))

        setattr(owner, name, timed)


class Split:
    """Sums the seconds of each part of the step, in total and in the models; the first `skip` steps do not count."""

    def __init__(self, models: Clock, skip: int) -> None:
        self.models, self.skip = models, skip
        self.steps = -skip
        self.whole: dict[str, Seconds] = defaultdict(lambda: (0.0, 0.0))
        self.inside: dict[str, Seconds] = defaultdict(lambda: (0.0, 0.0))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began, before = self.models.now(), self.models.spent
        try:
            yield
        finally:
            if self.steps >= (name == "log"):  # a step's logging comes after it
                spent = self.models.spent
                self.whole[name] = plus(self.whole[name], minus(self.models.now(), began))
                self.inside[name] = plus(self.inside[name], minus(spent, before))
            self.steps += name == "step"

    def share(self, clock: int) -> float:
        """The share of overhead, with logging, in a step and its logging."""
        whole = self.whole["step"][clock] + self.whole["log"][clock]
        return 1.0 - self.inside["step"][clock] / whole

    def table(self) -> str:
        """A table in milliseconds per step."""
        lines = [f"{'part':<16}{'wall ms':>10}{'models':>10}{'rest':>10}{'cpu ms':>12}{'models':>10}{'rest':>10}"]
        for name in PARTS:
            columns = []
            for clock in (0, 1):
                whole, inside = (1e3 * found[name][clock] / self.steps for found in (self.whole, self.inside))
                columns.append(f"{whole:>{10 + 2 * clock}.1f}{inside:>10.1f}{whole - inside:>10.1f}")
            lines.append(f"{name:<16}{''.join(columns)}")
        return "\n".join(lines)


def put_clock_around_models(clock: Clock) -> None:
    """Time every call that enters a model, forward and backward."""
    import torch

    from steepest.learner.optim import Optimizer
    from steepest.models import causal_lm, value_head
    from steepest.rollout.builtin import network

    for module in (causal_lm, value_head):
        clock.around(module, "run_backbone")
    clock.around(causal_lm.CausalLM, "_score")
    clock.around(value_head.ValueModel, "_head_values")
    clock.around(torch.Tensor, "backward")
    clock.around(Optimizer, "step")
    for kind in vars(network).values():
        if isinstance(kind, type) and kind.__module__ == network.__name__ and not getattr(kind, "_is_protocol", False):
            for name in ("hidden_states", "logits"):
                clock.around(kind, name)


def measure(overrides: list[str], skip: int) -> Split:
    """Run the job that the overrides describe with every part split."""
    from steepest.config.load import load_config
    from steepest.trainer import build_step
    from steepest.trainer.jobs import ppo
    from steepest.trainer.loop import Timer
    from steepest.trainer.run.hooks import Run

    clock = Clock()
    put_clock_around_models(clock)
    split = Split(clock, skip)

    class SplitTimer(Timer):
        @contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            with split.part(name), super().__call__(name):
                yield

    def log(self: Run, *args: Any, inner: Callable[..., None] = Run.log) -> None:
        with split.part("log"):
            inner(self, *args)

    build_step.Timer = SplitTimer  # type: ignore[misc]
    Run.log = log  # type: ignore[method-assign]
    ppo.run_ppo(load_config(overrides))
    return split


def as_started() -> None:
    """Restore the environment that `bench` changed, because this process is a run of ours."""
    for name in SPINNING.keys() - STARTED_WITH.keys():
        os.environ.pop(name, None)


def prepare(folder: Path) -> list[str]:
    """The quickstart's data and its model after the warm-up, made once; the overrides of its PPO job."""
    from steepest.trainer.jobs import quickstart

    settings = quickstart.Settings(folder=str(folder))
    warm = folder / "warm"
    if not warm.exists():
        quickstart.make_inputs(settings)
        quickstart.sft(settings).rename(warm)
    words = quickstart.job_overrides(settings, "bench", warm)
    return [*words, *quickstart.ppo_overrides(settings)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench_overhead"))
    parser.add_argument("--steps", type=int, default=8, help="steps that count; two more come before them")
    parser.add_argument("--threads", type=int, help="threads of torch; without it, as a run would have")
    parser.add_argument("overrides", nargs="*", help="more configuration keys, key=value")
    given = parser.parse_args()
    if given.threads:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
    as_started()
    import steepest.process.entry  # noqa: F401  sets what a run sets before torch is imported

    skip = 2
    words = [*prepare(given.folder), f"trainer.total_training_steps={given.steps + skip}", "trainer.test_freq=-1",
             "trainer.save_freq=0", "trainer.val_before_train=False", "trainer.resume_mode=disable",
             *given.overrides]  # fmt: skip
    split = measure(words, skip)
    print(f"\nMean of {split.steps} steps, milliseconds; `step` is the sum of the parts above `log`\n{split.table()}")
    print(
        f"\nbench: overhead wall_share={split.share(0):.3f} cpu_share={split.share(1):.3f} "
        f"step_ms={1e3 * split.whole['step'][0] / split.steps:.1f} target={TARGET}"
    )


if __name__ == "__main__":
    main()
