"""Critics on the actor's frozen base: a second adapter with a value head, or a value head alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.core.batch import Batch
from steepest.learner.critic import Critic, ReturnsOf
from steepest.learner.metrics import Metrics
from steepest.learner.reference import ReadingReference, States
from steepest.learner.trainable import MicroBatch
from steepest.models.lora_models import FrozenValueModel
from steepest.models.packing import scatter


class AdapterCritic(Critic):
    """A critic whose adapter lies on the actor's base: it is switched on for values and updates only."""

    model: FrozenValueModel

    def values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Critic."""
        with self.model.switched():
            return super().values(batch)

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """See Critic."""
        with self.model.switched():
            return super().update(batch, step=step)

    def values_with_gradient(self, batch: Batch, returns_of: ReturnsOf) -> tuple[Tensor, Tensor]:
        """See Critic."""
        with self.model.switched():
            return super().values_with_gradient(batch, returns_of)


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
        self._states: States | None = None

    @torch.no_grad()
    def values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Critic."""
        states, mask = self.reader.states(batch), batch.trained_mask
        out = torch.zeros(batch.responses.shape, dtype=torch.float32)
        out[mask] = self._head(states.tokens[states.index[mask]]).cpu()
        return out, self._head(states.final).cpu()

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """See Critic."""
        self._states = self.reader.states(batch)
        try:
            return super().update(batch, step=step)
        finally:
            self._states = None

    def has_one_update(self, num_rows: int) -> bool:
        """Never: its passes run no model, so there is nothing to save."""
        return False

    def _head(self, states: Tensor) -> Tensor:
        return self.model.head_values(states.to(self.device))

    def _parts(self, mini: Batch, rows: Tensor) -> Iterator[MicroBatch]:
        assert self._states is not None
        for part in super()._parts(mini, rows):
            place = self._states.index[rows[part.rows]][part.batch.loss_mask.cpu()]
            yield StateBatch(part.rows, part.batch, part.packed, self._states.tokens[place])

    def _values(self, part: MicroBatch, *, with_final: bool) -> tuple[Tensor, Tensor | None]:
        assert isinstance(part, StateBatch) and not with_final
        return scatter(self._head(part.states), part.packed, part.shape), None
