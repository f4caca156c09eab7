"""The PPO step on one screen: collect an experience, learn from it. The loop around it is in loop.py.

    collect   prompts -> responses -> scores                                                             (experience/)
    learn     log-probs, reference -> KL -> values -> advantages -> critic, actor -> weights to the engine (algorithm/)

Everything optional is an object chosen at start (`NoCritic`, `FromUpdate`, `all_rows`, ...), so neither half has a
branch. Validation, saving, logging and health checks are callers in run/hooks.py. `collect` and `learn` share nothing
but the experience and the engine's weights, so a queue can stand between the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from steepest.core.batch import Batch
from steepest.learner.metrics import Metrics
from steepest.trainer.algorithm.critic_values import CriticPart
from steepest.trainer.algorithm.old_log_probs import OldLogProbs
from steepest.trainer.experience.api import Collector, Experience
from steepest.trainer.loop import Timer

Observer = Callable[[int, Experience], None]
"""Called with a step's number and its experience after the step has been learnt from: every field of the batch is
filled."""


@dataclass
class Learn:
    """The second half of a step: from a scored batch to new weights in the engine."""

    old_log_probs: Callable[[Batch], OldLogProbs]
    ref_log_probs: Callable[[Batch], Tensor | None]
    shape_rewards: Callable[[Batch], Metrics]
    """Fills token_level_rewards: the scores, less the KL penalty where it is on."""
    critic: CriticPart
    estimate_advantages: Callable[[Batch], None]
    """Fills advantages and returns."""
    select_rows: Callable[[Batch, int], tuple[Batch, Metrics]]
    """The rows that the updates read."""
    critic_targets: Callable[[Batch, int], Batch]
    """The batch with the returns that the critic learns."""
    update_actor: Callable[[Batch, int], Metrics]
    publish_weights: Callable[[int], None]
    """Gives the engine the updated weights."""
    describe: Callable[[Batch], Metrics]
    """Statistics of the finished batch."""
    timed: Timer = field(default_factory=Timer)

    def __call__(self, experience: Experience, step: int) -> Metrics:
        batch, timed = experience.batch, self.timed
        with timed("old_log_prob"):
            self.old_log_probs(batch).write(batch)
        with timed("ref"):
            batch.ref_log_probs = self.ref_log_probs(batch)
        with timed("adv"):
            metrics = self.shape_rewards(batch)
        with timed("values"):
            values = self.critic.values(batch)
            batch.values, batch.final_values = values.values, values.final_values
        with timed("adv"):
            self.estimate_advantages(batch)
            chosen, found = self.select_rows(batch, step)
        with timed("update_critic"):
            metrics |= found | self.critic.update(self.critic_targets(chosen, step), values, step)
        with timed("update_actor"):
            metrics |= self.update_actor(chosen, step)
        with timed("update_weights"):
            self.publish_weights(step)
        with timed("describe"):
            metrics |= self.describe(batch)
        return metrics


@dataclass
class PPOStep:
    """One step over parts that are chosen once, at start."""

    collect: Collector
    learn: Learn
    observers: Sequence[Observer] = ()
    before_learning: Callable[[float], None] = lambda seconds: None
    """Called with the seconds of the longest `learn` so far; raises where the time left is shorter."""
    learning: bool = False
    learn_seconds: float = 0.0

    def __call__(self, step: int) -> Metrics:
        timed = self.learn.timed
        with timed("step"):
            experience = self.collect(step)
            self.before_learning(self.learn_seconds)
            began, self.learning = time.perf_counter(), True
            metrics = self.learn(experience, step)
            self.learn_seconds = max(self.learn_seconds, time.perf_counter() - began)
        timed.add(experience.seconds, experience.flops)
        for observe in self.observers:
            observe(step, experience)
        self.learning = False
        return experience.metrics | metrics
