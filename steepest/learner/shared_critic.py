"""Critics on the actor's frozen base: a second adapter with a value head, or a value head alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.learner.critic import Critic, ValuesAndGradient
from steepest.learner.metrics import Metrics
from steepest.learner.reference import ReadingReference, States
from steepest.learner.trainable import MicroBatch
from steepest.learner.update_plan import Cut, UpdatePlan, of_rows
from steepest.models.lora_models import FrozenValueModel
from steepest.models.packing import scatter
from steepest.models.passes import HeadValues


class AdapterCritic(Critic):
    """A critic whose adapter lies on the actor's base: it is switched on for values and updates only."""

    model: FrozenValueModel

    def values(self, batch: Batch, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
        """See Critic."""
        with self.model.switched():
            return super().values(batch, cut)

    def update_by(self, batch: Batch, plan: UpdatePlan) -> Metrics:
        """See Critic."""
        with self.model.switched():
            return super().update_by(batch, plan)

    def values_and_gradient(self, batch: Batch, estimator: EstimatorCall, cut: Cut | None = None) -> ValuesAndGradient:
        """See Critic."""
        with self.model.switched():
            return super().values_and_gradient(batch, estimator, cut)


@dataclass(frozen=True)
class StateBatch(MicroBatch):
    """A micro-batch with what the value head reads: no token of it goes through a model."""

    states: Tensor
    """(M, H) f32, one a target of `packed`."""


class HeadCritic(Critic):
    """A value head over hidden states that the reference has computed: neither values nor updates run the base."""

    model: FrozenValueModel

    def __init__(self, model: FrozenValueModel, reader: ReadingReference, **options: Any) -> None:
        """`options` are those of Critic."""
        super().__init__(model, **options)
        self.reader = reader

    def take_flops(self) -> float:
        """See Trainable; the passes of `reader` count too, unless they have been taken from it."""
        return super().take_flops() + self.reader.take_flops()

    @torch.no_grad()
    def values(self, batch: Batch, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
        """See Critic. Every rank computes every row: the reader has the states of all."""
        states, mask = self.reader.states(batch), batch.trained_mask
        out = torch.zeros(batch.responses.shape, dtype=torch.float32)
        out[mask] = self._head(states.tokens[states.index[mask]]).cpu()
        return of_rows(out, cut), of_rows(self._head(states.final).cpu(), cut)

    def _head(self, states: Tensor) -> Tensor:
        found: Tensor = self.run(HeadValues(states.to(self.device))).values
        return found

    def _source(self, batch: Batch) -> States:
        return self.reader.states(batch)

    def _parts(self, batch: Batch, cut: Cut, source: Any) -> Iterator[MicroBatch]:
        states: States = source
        for part in super()._parts(batch, cut, source):
            place = states.index[part.rows][batch.loss_mask[part.rows]]
            yield StateBatch(part.rows, part.batch, part.packed, states.tokens[place])

    def _values(self, part: MicroBatch, *, with_final: bool) -> tuple[Tensor, Tensor | None]:
        assert isinstance(part, StateBatch) and not with_final
        return scatter(self._head(part.states), part.packed, part.shape), None
