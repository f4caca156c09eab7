"""Where a step's values come from, and the critic's update that belongs to them: three strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.learner.critic import ValuesAndGradient
from steepest.learner.metrics import Metrics


@dataclass(frozen=True)
class Values:
    """The critic's values before its update."""

    values: Tensor | None = None
    """(B, T) f32, V of the state before token t; 0 outside of trained_mask."""
    final_values: Tensor | None = None
    """(B,) f32, V of the state after the last response token."""
    gradient: ValuesAndGradient | None = None
    """The gradient of the critic's update, where the pass has computed it."""


class CriticPasses(Protocol):
    """The passes of the critic; a cluster offers them."""

    def values(self, batch: Batch) -> tuple[Tensor, Tensor]: ...
    def update_critic(self, batch: Batch, step: int) -> Metrics: ...
    def values_and_gradient(self, batch: Batch, estimator: EstimatorCall) -> ValuesAndGradient: ...
    def step_critic(self, batch: Batch, found: ValuesAndGradient) -> Metrics: ...


class CriticPart(Protocol):
    """The critic's part of a step."""

    def values(self, batch: Batch) -> Values: ...
    def update(self, batch: Batch, found: Values, step: int) -> Metrics: ...


@dataclass(frozen=True)
class NoCritic:
    """The estimator needs no values."""

    def values(self, batch: Batch) -> Values:
        return Values()

    def update(self, batch: Batch, found: Values, step: int) -> Metrics:
        return {}


@dataclass(frozen=True)
class ValuesFromPass:
    """A pass of the critic before its update."""

    critic: CriticPasses

    def values(self, batch: Batch) -> Values:
        return Values(*self.critic.values(batch))

    def update(self, batch: Batch, found: Values, step: int) -> Metrics:
        return self.critic.update_critic(batch, step)


@dataclass(frozen=True)
class ValuesFromUpdate:
    """The critic has one update a step, and a row's returns follow from this row alone: values and gradient come from
    one forward pass, so that `timing_s/values` holds the update's time as well."""

    critic: CriticPasses
    estimator: EstimatorCall

    def values(self, batch: Batch) -> Values:
        found = self.critic.values_and_gradient(batch, self.estimator)
        return Values(found.values, found.final_values, found)

    def update(self, batch: Batch, found: Values, step: int) -> Metrics:
        assert found.gradient is not None
        return self.critic.step_critic(batch, found.gradient)
