"""The PPO step, whole on one screen; the loop around it is in loop.py.

    prompts -> generate -> score -> log-probs, reference -> KL -> values -> advantages -> critic, actor -> weights

Everything optional is an object chosen at start (`NoCritic`, `NoReference`, `ActorOfOneUpdate`, ...), so the step has
no branches. Validation, saving, logging and health checks are callers in run/hooks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.learner.critic import ValuesAndGradient
from steepest.learner.metrics import Metrics
from steepest.trainer.loop import Timer


class ActorLike(Protocol):
    def log_probs(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]: ...
    def update(self, batch: Batch, *, step: int) -> Metrics: ...


class CriticLike(Protocol):
    def values(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]: ...
    def update(self, batch: Batch, *, step: int) -> Metrics: ...


class ReferenceLike(Protocol):
    def log_probs(self, batch: Batch) -> Tensor | None: ...


class NoCritic:
    """Stands where an estimator needs no values."""

    def values(self, batch: Batch) -> tuple[None, None]:
        return None, None

    def update(self, batch: Batch, *, step: int) -> Metrics:
        return {}


class NoReference:
    """Stands where neither the reward nor the loss has a KL term."""

    def log_probs(self, batch: Batch) -> None:
        return None


@dataclass
class ActorOfOneUpdate:
    """The actor of a run with one update a step and no use of its log-probs before: they need no pass of their own.

    The update's own log-probs are the old ones, and it writes them into the batch.
    """

    actor: ActorLike

    def log_probs(self, batch: Batch) -> tuple[None, None]:
        return None, None

    def update(self, batch: Batch, *, step: int) -> Metrics:
        return self.actor.update(batch, step=step)


class OneUpdateCritic(Protocol):
    def values_and_gradient(self, batch: Batch, estimator: EstimatorCall) -> ValuesAndGradient: ...
    def step_on_gradient(self, batch: Batch, found: ValuesAndGradient) -> Metrics: ...


@dataclass
class CriticOfOneUpdate:
    """The critic of a run with one update a step, whose returns follow from each row alone: values and gradient come
    from one forward pass, so that `timing_s/values` holds the update's time as well."""

    critic: OneUpdateCritic
    estimator: EstimatorCall
    found: ValuesAndGradient | None = None

    def values(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        self.found = self.critic.values_and_gradient(batch, self.estimator)
        return self.found.values, self.found.final_values

    def update(self, batch: Batch, *, step: int) -> Metrics:
        assert self.found is not None
        return self.critic.step_on_gradient(batch, self.found)


@dataclass
class ActorAfterWarmup:
    """The actor, left alone during the first `num_steps` steps while the critic learns (`trainer.critic_warmup`)."""

    actor: ActorLike
    num_steps: int

    def log_probs(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return self.actor.log_probs(batch)

    def update(self, batch: Batch, *, step: int) -> Metrics:
        return self.actor.update(batch, step=step) if step > self.num_steps else {}


@dataclass
class PPOStep:
    """One step over parts that are chosen once, at start."""

    generate: Callable[[int], Batch]
    """Responses for the prompts of a step, with the engine's log-probs."""
    score: Callable[[Batch, int], Metrics]
    """Fills token_level_scores."""
    actor: ActorLike
    critic: CriticLike
    reference: ReferenceLike
    shape_rewards: Callable[[Batch], Metrics]
    """Fills token_level_rewards: the scores, less the KL penalty where it is on."""
    estimate_advantages: Callable[[Batch], None]
    """Fills advantages and returns."""
    publish_weights: Callable[[int], None]
    """Gives the engine the updated weights."""
    describe: Callable[[Batch], Metrics]
    """Statistics of the finished batch."""
    timed: Timer = field(default_factory=Timer)

    def __call__(self, step: int) -> Metrics:
        timed = self.timed
        with timed("step"):
            with timed("gen"):
                batch = self.generate(step)
            with timed("reward"):
                metrics = self.score(batch, step)
            with timed("old_log_prob"):
                batch.old_log_probs, batch.entropies = self.actor.log_probs(batch)
            with timed("ref"):
                batch.ref_log_probs = self.reference.log_probs(batch)
            with timed("adv"):
                metrics |= self.shape_rewards(batch)
            with timed("values"):
                batch.values, batch.final_values = self.critic.values(batch)
            with timed("adv"):
                self.estimate_advantages(batch)
            with timed("update_critic"):
                metrics |= self.critic.update(batch, step=step)
            with timed("update_actor"):
                metrics |= self.actor.update(batch, step=step)
            with timed("update_weights"):
                self.publish_weights(step)
            with timed("describe"):
                metrics |= self.describe(batch)
        return metrics
