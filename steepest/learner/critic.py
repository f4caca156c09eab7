"""The critic: values of a batch's states, and their regression on the returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steepest.core.advantages import EstimatorCall
from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.batch import Batch
from steepest.core.value_losses import clipped_value_loss, explained_variance
from steepest.learner.metrics import Means, Metrics, Sums
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.trainable import ComputeSettings, MicroBatch, Trainable
from steepest.learner.update_plan import Cut, UpdatePlan, plan_update
from steepest.models.packing import scatter
from steepest.models.passes import Values
from steepest.models.value_head import ValueModel


class ValuesAndGradient(NamedTuple):
    """What `Critic.values_and_gradient` found. The gradient itself lies in the parameters until the step is taken."""

    values: Tensor
    """(B, T) f32 on the CPU."""
    final_values: Tensor
    """(B,) f32 on the CPU."""
    metrics: Metrics
    """Metrics of the loss whose gradient was taken; empty where no row has a token of trained_mask."""


@dataclass(frozen=True)
class CriticLossSettings:
    """The clipped value loss and how it is aggregated."""

    cliprange_value: float = 0.5
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: float | None = None
    """Divisor of seq-mean-token-sum-norm."""


class Critic(Trainable[ValueModel]):
    """The value model in training. Values do not depend on the sampling temperature."""

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

    @torch.no_grad()
    def values(self, batch: Batch, cut: Cut | None = None) -> tuple[Tensor, Tensor]:
        """(values (B, T), final_values (B,)), f32 on the CPU, without gradient.

        values: V of the state before each token of trained_mask, 0 elsewhere. final_values: V after the last token of
        each sequence, rows without a token of trained_mask included. `cut` is this rank's plan of the passes
        (`plan_passes` by `forward` over trained_mask with every_row); 0 in rows that it does not name. None: one
        process.
        """
        out, final_out = _room(batch)
        cut = self.cut(batch, self.forward, batch.trained_mask, every_row=True) if cut is None else cut
        for part in self.micro_batches(batch, cut, batch.trained_mask):
            with self.memory("values", part, self.forward):
                values, final = self._values(part, with_final=True)
            assert final is not None
            part.write(values, out)
            part.write(final.float(), final_out)
        return out, final_out

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """`update_by` with the plan of one process for training step `step`."""
        (plan,) = plan_update(batch, self.settings, step, shares_prompts=self.compute.shares_prompts)
        return self.update_by(batch, plan)

    def update_by(self, batch: Batch, plan: UpdatePlan) -> Metrics:
        """One critic update: epochs x mini-batches, an optimizer step each, as the plan says.

        Reads tokens, loss_mask, values (before the update) and returns.

        Metrics: first the mean over a mini-batch, then over mini-batches. `vf_loss` is aggregated by loss_agg_mode;
        `vf_clipfrac` and `vpred_mean` (the present values) are means over the tokens of loss_mask. `grad_norm`,
        `skipped_steps` and `lr` as in `Actor.update`. `vf_explained_var` is that of the values before the update over
        the whole batch; it is left out when the returns do not vary, since there is nothing to explain.

        On several ranks each has the whole batch, its own plan, and gets the same metrics. A mini-batch without any
        token of loss_mask is in no plan. Raises ValueError when a field is None.
        """
        if batch.values is None or batch.returns is None:
            raise ValueError("critic update: batch.values and batch.returns are needed; one of them is None")
        means, source = Means(), self._source(batch)
        for mini in plan.mini_batches:
            loss = _MiniBatchLoss(self, mini.denominators)
            means.add(self.accumulate(self._parts(batch, mini.micro, source), loss, self.settings.micro))
            self.step("critic", means)
        return means.read() | self.finish_iteration("critic") | _explained(batch)

    def values_and_gradient(self, batch: Batch, estimator: EstimatorCall, cut: Cut | None = None) -> ValuesAndGradient:
        """As `values`, and the gradient of the one update that follows: one forward pass serves both.

        The returns of a row follow from its own values, so a micro-batch goes backward as soon as its values are
        known. The loss is that of `update`, whose clip cannot act on values that have not moved. Values are those of
        the tokens of trained_mask, the loss takes those of loss_mask. Rows without a token of trained_mask are left
        out: they have no loss, and their final value is 0. `step_on_gradient` takes the step.

        Reads tokens, both masks and what the estimator does. Allowed where the batch gives one optimizer step. `cut` is
        this rank's plan of the passes (`plan_passes` by `settings.micro` over trained_mask); None: one process.
        """
        assert self.settings.num_updates(len(batch)) == 1
        loss = _LossOfNewValues(self, LossDenominators.of(batch.loss_mask), batch, estimator)
        cut = self.cut(batch, self.settings.micro, batch.trained_mask) if cut is None else cut
        parts = self.micro_batches(batch, cut, batch.trained_mask)
        metrics = self.accumulate(parts, loss, self.settings.micro)
        return ValuesAndGradient(loss.values, loss.final_values, metrics)

    def step_on_gradient(self, batch: Batch, found: ValuesAndGradient) -> Metrics:
        """The optimizer step after `values_and_gradient`, which found `found` for this batch; the metrics of `update`.

        Reads loss_mask, values and returns. Where the batch has no token of loss_mask no step is taken.
        """
        assert batch.values is not None and batch.returns is not None
        means = Means()
        if found.metrics and batch.loss_mask.any():
            means.add(found.metrics)
            self.step("critic", means)
        return means.read() | self.finish_iteration("critic") | _explained(batch)

    def _source(self, batch: Batch) -> Any:
        """What `_parts` reads in addition to the batch, found once an update."""
        return None

    def _parts(self, batch: Batch, cut: Cut, source: Any) -> Iterator[MicroBatch]:
        """The micro-batches of a mini-batch."""
        return self.micro_batches(batch, cut, batch.loss_mask)

    def _values(self, part: MicroBatch, *, with_final: bool) -> tuple[Tensor, Tensor | None]:
        """(b, T) f32 values of one micro-batch, 0 where a token is no target of it, and (b,) final values."""
        with self.autocast():
            found = self.run(Values(part.packed, with_final))
        return scatter(found.values.float(), part.packed, part.shape), found.final


def _room(batch: Batch) -> tuple[Tensor, Tensor]:
    """Zeros for the values (B, T) and final values (B,) of a batch."""
    return torch.zeros(batch.responses.shape, dtype=torch.float32), torch.zeros(len(batch), dtype=torch.float32)


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

    def __init__(self, critic: Critic, denominators: LossDenominators, batch: Batch, estimator: EstimatorCall) -> None:
        super().__init__(critic, denominators)
        self._batch, self._estimator = batch, estimator
        self.values, self.final_values = _room(batch)

    def __call__(self, part: MicroBatch, sums: Sums) -> Tensor:
        values, final = self.critic._values(part, with_final=True)
        assert final is not None
        rows, old_values = part.rows, values.detach()
        part.write(old_values, self.values)
        part.write(final.detach().float(), self.final_values)
        returns = torch.zeros_like(old_values)
        if len(rows) > 0:
            known = self._batch.select(rows)
            known.values, known.final_values = self.values[rows], self.final_values[rows]
            returns = self._estimator.returns_of(known).to(values.device)
        return self._loss(values, old_values, returns, part.batch.loss_mask, sums)
