"""The frozen policy that the KL is measured against."""

from __future__ import annotations

from torch import Tensor

from steepest.core.batch import Batch
from steepest.models.causal_lm import CausalLM
from steepest.training.actor import PolicyPasses
from steepest.training.micro_batches import MicroBatches
from steepest.training.trainable import ComputeSettings


class Reference(PolicyPasses):
    """A model that is only read. It owns its weights: give it a model of its own.

    `temperature` is the actor's, since a KL compares two distributions at one temperature.
    """

    role = "reference"

    def __init__(
        self,
        model: CausalLM,
        *,
        compute: ComputeSettings,
        forward: MicroBatches | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model.requires_grad_(False), compute=compute, optim=None)
        self.forward, self.temperature = forward or MicroBatches(), temperature

    def log_probs(self, batch: Batch) -> Tensor:
        """(B, T) f32 on the CPU; 0 where response_mask is false. The code path is the actor's."""
        return self._batch_log_probs(batch, with_entropy=False)[0]
