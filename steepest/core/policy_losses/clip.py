"""PPO's clipped loss, with a second clip for tokens of negative advantage."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.policy_losses.inputs import POLICY_LOSSES, LossInputs, ratio_stats
from steepest.errors import ConfigError, setting


@POLICY_LOSSES.register("vanilla")
def ppo_clip(
    x: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The negated PPO objective with clip, and a second clip for negative advantages with a large ratio (dual clip).

        ratio = exp(log_prob - old_log_prob)
        loss  = max(-A * ratio, -A * clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high))
        loss  = min(loss, -A * clip_ratio_c)                                        where A < 0

    Returns (loss, stats), everything (b, T) f32. stats carry no gradient; the caller takes their mean over the true
    tokens of the whole mini-batch: `pg_clipfrac` 1 where the first clip is the active side, `pg_clipfrac_lower` 1
    where the dual clip is, `ppo_kl` = old_log_prob - log_prob (k1), `ratio`. Masked positions hold 0, ratio 1.

    Raises ConfigError when clip_ratio_c is not above 1: the dual clip would then act on an unchanged policy.

    Schulman et al. 2017, https://arxiv.org/abs/1707.06347; dual clip: Ye et al. 2020, https://arxiv.org/abs/1912.09729;
    a higher upper side (clip-higher): DAPO, Yu et al. 2025, https://arxiv.org/abs/2503.14476.
    """
    if clip_ratio_c <= 1.0:
        raise ConfigError(
            f"{setting('clip_ratio_c')}={clip_ratio_c}: must be greater than 1 (default 3.0), "
            "else the dual clip cuts tokens of a policy that has not moved."
        )
    log_ratio, advantages = x.log_ratio(), x.true_advantages()
    ratio = log_ratio.exp()

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    pessimistic = torch.maximum(unclipped, clipped)
    ceiling = -advantages * clip_ratio_c
    loss = torch.where(advantages < 0, torch.minimum(pessimistic, ceiling), pessimistic)
    with torch.no_grad():
        stats = ratio_stats(log_ratio) | {
            "pg_clipfrac": (clipped > unclipped).to(ratio.dtype),
            "pg_clipfrac_lower": ((advantages < 0) & (pessimistic > ceiling)).to(ratio.dtype),
        }
    return loss, stats
