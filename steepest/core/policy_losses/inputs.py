"""The inputs of a policy loss, and the table of losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.config.algorithms import LOSSES
from steepest.core.masked import masked_mean
from steepest.core.registration import Algorithms
from steepest.errors import setting

POLICY_LOSSES = Algorithms("policy loss", setting("loss_mode"), LOSSES)
"""Facts that an entry may declare: `choose`, the function that picks tokens over the whole mini-batch."""

MAX_LOG_RATIO = 20.0
"""Log-ratios are limited to +-20 before exp(), as in verl: far outside every clip range, so no gradient is lost."""


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a policy loss, for the b rows of a micro-batch. Masked positions are ignored."""

    log_probs: Tensor
    """(b, T) f32, by the policy being trained; the gradient flows through this field."""
    old_log_probs: Tensor
    """(b, T) f32, by the policy before the update."""
    advantages: Tensor
    """(b, T) f32."""
    response_mask: Tensor
    """(b, T) bool, true on tokens that the policy produced and the loss reads; in a run the batch's `loss_mask`."""
    chosen: Tensor | None = None
    """(b, T) bool, the tokens that the loss's `choose` picked over the whole mini-batch; None: these rows are the whole
    mini-batch, and a loss that needs a choice makes it itself."""
    seed: int = 0
    """Seed of random choices: the same for all micro-batches of a mini-batch, another one for the next mini-batch."""

    def __post_init__(self) -> None:
        for name in ("log_probs", "old_log_probs", "advantages", "chosen"):
            value = getattr(self, name)
            if value is not None and value.shape != self.response_mask.shape:
                raise ValueError(
                    f"LossInputs.{name} has shape {tuple(value.shape)}, expected {tuple(self.response_mask.shape)}"
                )

    def log_ratio(self) -> Tensor:
        """(b, T) log_prob - old_log_prob within +-MAX_LOG_RATIO; 0 where masked, without a gradient there."""
        # Padding is masked before exp(): an inf made from padding would give a NaN gradient.
        log_ratio = torch.where(self.response_mask, self.log_probs - self.old_log_probs, 0.0)
        return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def true_advantages(self) -> Tensor:
        """(b, T) the advantages; 0 where masked."""
        return torch.where(self.response_mask, self.advantages, 0.0)

    def row_mean(self, values: Tensor) -> Tensor:
        """(b, 1) the mean of (b, T) values over each row's true tokens; 0 for a row without one."""
        return masked_mean(values, self.response_mask, dim=1)[:, None]


def ratio_stats(log_ratio: Tensor) -> dict[str, Tensor]:
    """The statistics of every loss, (b, T), without gradient: `ppo_kl` = old_log_prob - log_prob (k1), `ratio`."""
    log_ratio = log_ratio.detach()
    return {"ppo_kl": -log_ratio, "ratio": log_ratio.exp()}
