"""The frozen policy that the KL is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.batch import Batch
from steepest.learner.actor import PolicyPasses
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.trainable import ComputeSettings, MicroBatch
from steepest.learner.update_plan import Cut, of_rows
from steepest.models.causal_lm import CausalLM
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import scatter
from steepest.models.passes import Distributions, DistributionsFound, HiddenStates


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

    def log_probs(self, batch: Batch, cut: Cut | None = None) -> Tensor:
        """(B, T) f32 on the CPU, of the tokens of trained_mask; 0 elsewhere. The code path is the actor's, and `cut`
        is as in `Actor.log_probs`."""
        return self._batch_scores(batch, cut, with_entropy=False)[0]

    @torch.no_grad()
    def distributions(self, part: MicroBatch) -> DistributionsFound:
        """What the tokens of a micro-batch of the actor are predicted from."""
        with self.autocast():
            found: DistributionsFound = self.run(Distributions(part.packed))
            return found


class BaseReference(PolicyPasses):
    """The actor's own base with the adapter switched off: what a run with LoRA began with, without a second model.

    `model` is the actor's, which keeps its weights, its optimizer and its adapter.
    """

    role = "reference"
    model: LoraCausalLM

    def __init__(
        self,
        model: LoraCausalLM,
        *,
        compute: ComputeSettings,
        forward: MicroBatches | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, compute=compute, optim=None)
        self.forward, self.temperature = forward or MicroBatches(), temperature

    def log_probs(self, batch: Batch, cut: Cut | None = None) -> Tensor:
        """As `Reference.log_probs`."""
        with self.model.base_alone():
            return self._batch_scores(batch, cut, with_entropy=False)[0]

    @torch.no_grad()
    def distributions(self, part: MicroBatch) -> DistributionsFound:
        """As `Reference.distributions`."""
        with self.model.base_alone(), self.autocast():
            found: DistributionsFound = self.run(Distributions(part.packed))
            return found


@dataclass(frozen=True)
class States:
    """The base's last hidden states where a value is read, of one batch; f32, on the CPU."""

    batch: Batch
    tokens: Tensor
    """(M, H), before each token of trained_mask, row by row."""
    index: Tensor
    """(B, T) int64, where a token's state stands in `tokens`; meaningless where trained_mask was false."""
    final: Tensor
    """(B, H), after each sequence's last token."""

    @classmethod
    def empty(cls, batch: Batch, width: int) -> States:
        """Room for the states of a batch, at the tokens of its trained_mask."""
        mask = batch.trained_mask
        index = mask.flatten().cumsum(0).sub_(1).view(mask.shape)
        return cls(batch, torch.empty(int(mask.sum()), width), index, torch.empty(len(batch), width))


class ReadingReference(BaseReference):
    """A reference that hands its hidden states to a value head: log-probs and values come from one forward.

    The states of the last batch are kept until the next one's.
    """

    kept: States | None = None

    def log_probs(self, batch: Batch, cut: Cut | None = None) -> Tensor:
        """As `BaseReference.log_probs`; the states are kept for `states`. Every rank reads every row, since the update
        may give it rows that `cut` does not name; the log-probs are 0 in those."""
        out = torch.zeros(batch.responses.shape, dtype=torch.float32)
        self.kept = self._read(batch, out)
        return of_rows(out, cut)

    def states(self, batch: Batch) -> States:
        """The states of a batch: those kept if `log_probs` had this batch last, else from a pass of their own.

        They are those of trained_mask as it was when the pass was made: rows that were left out since still have some.
        """
        if self.kept is None or self.kept.batch is not batch:
            self.kept = self._read(batch, None)
        return self.kept

    @torch.no_grad()
    def _read(self, batch: Batch, log_probs: Tensor | None) -> States:
        states, mask = States.empty(batch, self.model.hf.get_output_embeddings().weight.shape[1]), batch.trained_mask
        with self.model.base_alone():
            for part in self.micro_batches(batch, self.cut(batch, self.forward, mask, every_row=True), mask):
                with self.memory("log-probs and hidden states", part, self.forward), self.autocast():
                    found = self.run(HiddenStates(part.packed, self.temperature, log_probs is not None))
                    if log_probs is not None:
                        part.write(scatter(found.log_probs, part.packed, part.shape), log_probs)
                    place = states.index[part.rows][mask[part.rows]]
                    states.tokens[place] = found.before.float().cpu()
                    part.write(found.final.float(), states.final)
        return states
