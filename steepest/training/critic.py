"""The critic: values of a batch's states, and their regression on the returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.batch import Batch
from steepest.core.value_losses import clipped_value_loss, explained_variance
from steepest.models.packing import scatter
from steepest.models.value_head import ValueModel
from steepest.training.meters import Means, Metrics, Sums
from steepest.training.micro_batches import MicroBatches
from steepest.training.mini_batches import UpdateSettings, iterate_mini_batches
from steepest.training.optim import OptimSettings
from steepest.training.trainable import ComputeSettings, MicroBatch, Trainable


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

    @torch.no_grad()
    def values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(values (B, T), final_values (B,)), f32 on the CPU, without gradient.

        values: V of the state before each policy token, 0 where response_mask is false. final_values: V after the
        last token of each sequence, rows without a policy token included.
        """
        out = torch.zeros(batch.responses.shape, dtype=torch.float32)
        final_out = torch.zeros(len(batch), dtype=torch.float32)
        for part in self.micro_batches(batch, self.forward, every_row=True):
            with self.memory("values", part, self.forward):
                values, final = self._values(part, with_final=True)
            assert final is not None
            out[part.rows], final_out[part.rows] = values.cpu(), final.float().cpu()
        return out, final_out

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """One critic update: epochs x mini-batches, an optimizer step each. `step` is the training step.

        Reads tokens, response_mask, values (before the update) and returns.

        Metrics: first the mean over a mini-batch, then over mini-batches. `vf_loss` is aggregated by loss_agg_mode;
        `vf_clipfrac` and `vpred_mean` (the present values) are means over policy tokens. `grad_norm`, `skipped_steps`
        and `lr` as in `Actor.update`. `vf_explained_var` is that of the values before the update over the whole
        batch; it is left out when the returns do not vary, since there is nothing to explain.

        A mini-batch without any policy token is passed over. Raises ValueError when a field is None.
        """
        if batch.values is None or batch.returns is None:
            raise ValueError("critic update: batch.values and batch.returns are needed; one of them is None")
        means = Means()
        for rows in iterate_mini_batches(len(batch), self.settings, step):
            mini = batch.select(rows)
            if not mini.response_mask.any():
                continue
            loss = _MiniBatchLoss(self, LossDenominators.of(mini.response_mask))
            means.add(self.accumulate(self._parts(mini, rows), loss, self.settings.micro))
            self.step("critic", means)
        explained = explained_variance(batch.values, batch.returns, batch.response_mask)
        named = {} if explained is None else {"critic/vf_explained_var": explained}
        return means.read() | self.finish_iteration("critic") | named

    def _parts(self, mini: Batch, rows: Tensor) -> Iterator[MicroBatch]:
        """The micro-batches of a mini-batch, which is these rows of the batch."""
        return self.micro_batches(mini, self.settings.micro)

    def _values(self, part: MicroBatch, *, with_final: bool) -> tuple[Tensor, Tensor | None]:
        """(b, T) f32 values of one micro-batch, 0 where response_mask is false, and (b,) final values."""
        with self.autocast():
            found, final = self.model.values(part.packed, with_final=with_final)
        return scatter(found.float(), part.packed, part.shape), final


@dataclass
class _MiniBatchLoss:
    """The loss of one micro-batch, scaled so that the sum over micro-batches is the mini-batch's loss."""

    critic: Critic
    denominators: LossDenominators

    def __call__(self, part: MicroBatch, sums: Sums) -> Tensor:
        batch, mask, settings = part.batch, part.batch.response_mask, self.critic.loss
        assert batch.values is not None and batch.returns is not None
        values, _ = self.critic._values(part, with_final=False)
        per_token, stats = clipped_value_loss(
            values, batch.values, batch.returns, cliprange_value=settings.cliprange_value, response_mask=mask
        )
        loss = aggregate(
            per_token, mask, settings.loss_agg_mode, self.denominators, scale_factor=settings.loss_scale_factor
        )
        sums.add("critic/vf_loss", loss)
        for name, tokens in {**stats, "vpred_mean": values}.items():
            sums.add_token_mean(f"critic/{name}", tokens, mask, self.denominators.num_tokens)
        return loss
