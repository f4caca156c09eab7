"""Policy losses: from log-probs and advantages to a loss per token.

Each loss is one function: `LossInputs` in, `(loss per token, stats per token)` out, its options as keywords. It knows
neither micro-batches nor ranks; `aggregation.aggregate` turns the loss per token into a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.errors import ConfigError
from steepest.registry import Registry

POLICY_LOSSES = Registry("policy loss", "actor_rollout_ref.actor.policy_loss.loss_mode")

MAX_LOG_RATIO = 20.0
"""exp() of a log-ratio is taken within +-20, as verl does: far outside every clip range, so no gradient is lost."""


@dataclass(frozen=True)
class LossInputs:
    """What a policy loss may read, for the b rows of a micro-batch. Masked positions are ignored."""

    log_probs: Tensor
    """(b, T) f32, by the policy being trained; the gradient flows through this field."""
    old_log_probs: Tensor
    """(b, T) f32, by the policy before the update."""
    advantages: Tensor
    """(b, T) f32."""
    response_mask: Tensor
    """(b, T) bool, true on tokens that the policy produced."""

    def __post_init__(self) -> None:
        for name in ("log_probs", "old_log_probs", "advantages"):
            found = getattr(self, name).shape
            if found != self.response_mask.shape:
                raise ValueError(
                    f"LossInputs.{name} has shape {tuple(found)}, expected {tuple(self.response_mask.shape)}"
                )


@POLICY_LOSSES.register("vanilla")
def ppo_clip(
    x: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped PPO objective, negated, with a second clip for bad tokens whose ratio explodes (dual clip).

        ratio = exp(log_prob - old_log_prob)
        loss  = max(-A * ratio, -A * clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high))
        loss  = min(loss, -A * clip_ratio_c)                                        where A < 0

    Returns (loss, stats), everything (b, T) f32. stats carry no gradient; the caller takes their mean over the true
    tokens of the whole mini-batch: `pg_clipfrac` 1 where the first clip is the active side, `pg_clipfrac_lower` 1
    where the dual clip is, `ppo_kl` = old_log_prob - log_prob (k1), `ratio`. Masked positions hold 0, ratio 1.

    Raises ConfigError when clip_ratio_c is not above 1: the dual clip would then act on an unchanged policy.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347; dual clip: Ye et al. 2020, https://arxiv.org/abs/1912.09729.
    """
    if clip_ratio_c <= 1.0:
        raise ConfigError(
            f"actor_rollout_ref.actor.clip_ratio_c={clip_ratio_c}: must be greater than 1 (default 3.0), "
            "else the dual clip cuts tokens of a policy that has not moved."
        )
    # Selected before exp(): an inf made from padding would come back as a NaN gradient.
    log_ratio = torch.where(x.response_mask, x.log_probs - x.old_log_probs, 0.0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = torch.where(x.response_mask, x.advantages, 0.0)
    ratio = log_ratio.exp()

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    pessimistic = torch.maximum(unclipped, clipped)
    ceiling = -advantages * clip_ratio_c
    loss = torch.where(advantages < 0, torch.minimum(pessimistic, ceiling), pessimistic)
    with torch.no_grad():
        stats = {
            "pg_clipfrac": (clipped > unclipped).to(ratio.dtype),
            "pg_clipfrac_lower": ((advantages < 0) & (pessimistic > ceiling)).to(ratio.dtype),
            "ppo_kl": -log_ratio.detach(),
            "ratio": ratio.detach(),
        }
    return loss, stats
