"""The critic: values of a batch's states, and their regression on the returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.batch import Batch
from steepest.core.value_losses import clipped_value_loss, explained_variance
from steepest.learner.metrics import Means, Metrics, Sums
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings, iterate_mini_batches
from steepest.learner.optim import OptimSettings
from steepest.learner.trainable import ComputeSettings, MicroBatch, Trainable
from steepest.models.packing import scatter
from steepest.models.value_head import ValueModel

ReturnsOf = Callable[[Batch], Tensor]
"""Returns (b, T) of rows whose values are known, each from its own row alone."""


@dataclass(frozen=True)
class CriticLossSettings:
    """The clipped value loss and how it is aggregated."""

    cliprange_value: float = 0.5
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    """Divisor of seq-mean-token-sum-norm."""


class Critic(Trainable[ValueModel]):
    """The value model in training. Values know no sampling temperature."""

    role = "critic"

    def __init__(
        self,
        model: ValueModel,
        *,
        compute: ComputeSettings,
        optim: OptimSettings,
        update: UpdateSettings,
        loss: CriticLossSettings | None = None,
        forward: MicroBatches | None = None,
    ) -> None:
        super().__init__(model, compute=compute, optim=optim)
        self.settings, self.loss = update, loss or CriticLossSettings()
        self.forward = forward or update.micro
        self._found: Metrics | None = None

    @torch.no_grad()
    def values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(values (B, T), final_values (B,)), f32 on the CPU, without gradient.

        values: V of the state before each token of trained_mask, 0 elsewhere. final_values: V after the last token of
        each sequence, rows without a token of trained_mask included.
        """
        out = torch.zeros(batch.responses.shape, dtype=torch.float32)
        final_out = torch.zeros(len(batch), dtype=torch.float32)
        for part in self.micro_batches(batch, self.forward, batch.trained_mask, every_row=True):
            with self.memory("values", part, self.forward):
                values, final = self._values(part, with_final=True)
            assert final is not None
            out[part.rows], final_out[part.rows] = values.cpu(), final.float().cpu()
        return out, final_out

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """One critic update: epochs x mini-batches, an optimizer step each. `step` is the training step.

        Reads tokens, loss_mask, values (before the update) and returns.

        Metrics: first the mean over a mini-batch, then over mini-batches. `vf_loss` is aggregated by loss_agg_mode;
        `vf_clipfrac` and `vpred_mean` (the present values) are means over the tokens of loss_mask. `grad_norm`,
        `skipped_steps` and `lr` as in `Actor.update`. `vf_explained_var` is that of the values before the update over
        the whole batch; it is left out when the returns do not vary, since there is nothing to explain.

        A mini-batch without any token of loss_mask is passed over. Raises ValueError when a field is None.
        """
        if batch.values is None or batch.returns is None:
            raise ValueError("critic update: batch.values and batch.returns are needed; one of them is None")
        means = Means()
        for rows in iterate_mini_batches(len(batch), self.settings, step):
            mini = batch.select(rows)
            if not mini.loss_mask.any():
                continue
            loss = _MiniBatchLoss(self, LossDenominators.of(mini.loss_mask))
            means.add(self.accumulate(self._parts(mini, rows), loss, self.settings.micro))
            self.step("critic", means)
        return means.read() | self.finish_iteration("critic") | _explained(batch)

    def has_one_update(self, num_rows: int) -> bool:
        """Whether a batch of so many rows gives one optimizer step: its values are then those of the update itself."""
        return self.settings.num_updates(num_rows) == 1

    def values_with_gradient(self, batch: Batch, returns_of: ReturnsOf) -> tuple[Tensor, Tensor]:
        """As `values`, and the gradient of the one update that follows: one forward pass serves both.

        The returns of a row follow from its own values, so a micro-batch goes backward as soon as its values are
        known. The loss is that of `update`, whose clip cannot act on values that have not moved. Values are those of
        the tokens of trained_mask, the loss takes those of loss_mask. Rows without a token of trained_mask are left
        out: they have no loss, and their final value is 0. `step_on_gradient` takes the step.

        Reads tokens, both masks and what `returns_of` does. Allowed where `has_one_update`.
        """
        assert self.has_one_update(len(batch))
        loss = _LossOfNewValues(self, LossDenominators.of(batch.loss_mask), batch, returns_of)
        parts = self.micro_batches(batch, self.settings.micro, batch.trained_mask)
        self._found = self.accumulate(parts, loss, self.settings.micro)
        return loss.values, loss.final_values

    def step_on_gradient(self, batch: Batch) -> Metrics:
        """The optimizer step after `values_with_gradient`, with the metrics of `update`."""
        assert batch.values is not None and batch.returns is not None
        means, found = Means(), self._found
        self._found = None
        if found and batch.loss_mask.any():
            means.add(found)
            self.step("critic", means)
        return means.read() | self.finish_iteration("critic") | _explained(batch)

    def _parts(self, mini: Batch, rows: Tensor) -> Iterator[MicroBatch]:
        """The micro-batches of a mini-batch, which is these rows of the batch."""
        return self.micro_batches(mini, self.settings.micro, mini.loss_mask)

    def _values(self, part: MicroBatch, *, with_final: bool) -> tuple[Tensor, Tensor | None]:
        """(b, T) f32 values of one micro-batch, 0 where a token is no target of it, and (b,) final values."""
        with self.autocast():
            found, final = self.model.values(part.packed, with_final=with_final)
        return scatter(found.float(), part.packed, part.shape), final


def _explained(batch: Batch) -> Metrics:
    assert batch.values is not None and batch.returns is not None
    explained = explained_variance(batch.values, batch.returns, batch.loss_mask)
    return {} if explained is None else {"critic/vf_explained_var": explained}


@dataclass
class _MiniBatchLoss:
    """The loss of one micro-batch, scaled so that the sum over micro-batches is the mini-batch's loss."""

    critic: Critic
    denominators: LossDenominators

    def __call__(self, part: MicroBatch, sums: Sums) -> Tensor:
        batch = part.batch
        assert batch.values is not None and batch.returns is not None
        values, _ = self.critic._values(part, with_final=False)
        return self._loss(values, batch.values, batch.returns, batch.loss_mask, sums)

    def _loss(self, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, sums: Sums) -> Tensor:
        settings = self.critic.loss
        per_token, stats = clipped_value_loss(
            values, old_values, returns, cliprange_value=settings.cliprange_value, response_mask=mask
        )
        loss = aggregate(
            per_token, mask, settings.loss_agg_mode, self.denominators, scale_factor=settings.loss_scale_factor
        )
        sums.add("critic/vf_loss", loss)
        for name, tokens in {**stats, "vpred_mean": values}.items():
            sums.add_token_mean(f"critic/{name}", tokens, mask, self.denominators.num_tokens)
        return loss


class _LossOfNewValues(_MiniBatchLoss):
    """The same for values that nobody has read yet: they are kept, and the returns follow from them."""

    def __init__(self, critic: Critic, denominators: LossDenominators, batch: Batch, returns_of: ReturnsOf) -> None:
        super().__init__(critic, denominators)
        self._batch, self._returns_of = batch, returns_of
        self.values = torch.zeros(batch.responses.shape, dtype=torch.float32)
        self.final_values = torch.zeros(len(batch), dtype=torch.float32)

    def __call__(self, part: MicroBatch, sums: Sums) -> Tensor:
        values, final = self.critic._values(part, with_final=True)
        assert final is not None
        rows, old_values = part.rows, values.detach()
        self.values[rows], self.final_values[rows] = old_values.cpu(), final.detach().float().cpu()
        known = self._batch.select(rows)
        known.values, known.final_values = self.values[rows], self.final_values[rows]
        returns = self._returns_of(known).to(values.device)
        return self._loss(values, old_values, returns, part.batch.loss_mask, sums)
