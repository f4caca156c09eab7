"""Clip-Cov and KL-Cov: restrain the few tokens with the highest covariance of log-prob and advantage, which preserves
the policy's entropy.

The covariance of a token is its part of the covariance over the mini-batch, with means over all its true tokens:

    cov_t = (log_prob_t - mean(log_prob)) * (A_t - mean(A))

So the choice of tokens depends on the whole mini-batch. `choose_*` gets the whole mini-batch, and the loss of a
micro-batch gets its part of the choice in `LossInputs.chosen`. (verl chooses at least one token within each
micro-batch, with the means of that micro-batch, so its result depends on the micro-batch size,
verl-project/verl#7829.)

Cui et al. 2025, The Entropy Mechanism of RL for Reasoning Language Models, https://arxiv.org/abs/2505.22617.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.masked import masked_mean
from steepest.core.policy_losses.inputs import POLICY_LOSSES, LossInputs, ratio_stats

STANDS_STILL = 1e-4
"""A log-ratio nearer to 0 counts as rounding: float32 passes with different micro-batches differ by 1e-6."""


@torch.no_grad()
def covariances(x: LossInputs) -> Tensor:
    """(b, T) each true token's part of the covariance of log-prob and advantage over these rows; 0 where masked."""
    parts = (x.log_probs - masked_mean(x.log_probs, x.response_mask)) * (
        x.advantages - masked_mean(x.advantages, x.response_mask)
    )
    return torch.where(x.response_mask, parts, 0.0)


def _share(x: LossInputs, ratio: float) -> int:
    """The number of tokens in that share of the true tokens, rounded down, and at least one."""
    return max(1, int(ratio * int(x.response_mask.sum())))


@torch.no_grad()
def choose_clip_cov(
    x: LossInputs,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
) -> Tensor:
    """(b, T) bool, the tokens that Clip-Cov takes out: `x` is the whole mini-batch.

    At random, by `x.seed`, clip_cov_ratio of the true tokens (at least one) of those with clip_cov_lb < cov_t <
    clip_cov_ub; all of them when they are fewer. Tokens that PPO's clip has stopped already are not drawn.
    """
    found = covariances(x)
    unclipped, clipped = _clip_sides(x, clip_ratio_low, clip_ratio_high)
    candidates = (found > clip_cov_lb) & (found < clip_cov_ub) & x.response_mask & (clipped <= unclipped)
    places = candidates.flatten().nonzero()[:, 0]
    # Drawn on the CPU: a seed gives the same tokens on every device.
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(x.seed)).to(places.device)
    chosen = torch.zeros_like(x.response_mask).flatten()
    chosen[places[order[: _share(x, clip_cov_ratio)]]] = True
    return chosen.view(x.response_mask.shape)


@POLICY_LOSSES.register("clip_cov", choose=choose_clip_cov)
def clip_by_covariance(
    x: LossInputs,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip-Cov: PPO's clip; in addition a few tokens of high covariance are left out of the update.

        loss = max(-A * ratio, -A * clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high))
        loss = 0                                                            where chosen, see `choose_clip_cov`

    The chosen tokens stay in the denominator. There is no dual clip, as in the paper.

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `pg_clipfrac` 1
    where PPO's clip acts, `cov_clipfrac` 1 on the chosen tokens (verl calls this one pg_clipfrac), `ppo_kl`, `ratio`.

    Cui et al. 2025, https://arxiv.org/abs/2505.22617. Departures: the choice is the whole mini-batch's.
    """
    chosen = x.chosen
    if chosen is None:
        chosen = choose_clip_cov(
            x,
            clip_ratio_low=clip_ratio_low,
            clip_ratio_high=clip_ratio_high,
            clip_cov_ratio=clip_cov_ratio,
            clip_cov_lb=clip_cov_lb,
            clip_cov_ub=clip_cov_ub,
        )
    unclipped, clipped = _clip_sides(x, clip_ratio_low, clip_ratio_high)
    with torch.no_grad():
        stats = ratio_stats(x.log_ratio()) | {
            "pg_clipfrac": (clipped > unclipped).to(clipped.dtype),
            "cov_clipfrac": chosen.to(clipped.dtype),
        }
    return torch.where(chosen, 0.0, torch.maximum(unclipped, clipped)), stats


@torch.no_grad()
def choose_kl_cov(x: LossInputs, *, kl_cov_ratio: float) -> Tensor:
    """(b, T) bool, the tokens that KL-Cov penalises: `x` is the whole mini-batch.

    The kl_cov_ratio of the true tokens (at least one) with the largest covariance, the first of equal ones.
    """
    found = torch.where(x.response_mask, covariances(x), -torch.inf).flatten()
    chosen = torch.zeros_like(x.response_mask).flatten()
    chosen[torch.argsort(found, descending=True, stable=True)[: _share(x, kl_cov_ratio)]] = True
    return chosen.view(x.response_mask.shape) & x.response_mask


@POLICY_LOSSES.register("kl_cov", choose=choose_kl_cov)
def penalise_by_covariance(
    x: LossInputs, *, kl_cov_ratio: float, ppo_kl_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """KL-Cov: no clip; the tokens of highest covariance are held near the policy before the update.

        loss = -A * ratio
        loss = -A * ratio + ppo_kl_coef * |log_prob - old_log_prob|          where chosen, see `choose_kl_cov`

    The penalty has a kink at ratio 1, and its gradient is +-ppo_kl_coef however near the ratio is. So a distance of
    less than STANDS_STILL, which two passes over the same weights may have by rounding alone, has a value and no
    gradient: on the first update of a batch this is the plain policy gradient, and with one update a step the penalty
    never acts.

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `cov_klfrac` 1 on
    the chosen tokens, `ppo_kl` (k1 as everywhere; verl logs its absolute value here), `ratio`.

    Cui et al. 2025, https://arxiv.org/abs/2505.22617. Departures: the choice is the whole mini-batch's; the gradient of
    a token that stands still.
    """
    chosen = choose_kl_cov(x, kl_cov_ratio=kl_cov_ratio) if x.chosen is None else x.chosen
    log_ratio = x.log_ratio()
    loss = -x.true_advantages() * log_ratio.exp()
    stats = ratio_stats(log_ratio) | {"cov_klfrac": chosen.to(log_ratio.dtype)}
    distance = log_ratio.abs()
    distance = torch.where(distance < STANDS_STILL, distance.detach(), distance)
    return torch.where(chosen, loss + ppo_kl_coef * distance, loss), stats


def _clip_sides(x: LossInputs, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(unclipped, clipped) loss per token."""
    ratio, advantages = x.log_ratio().exp(), x.true_advantages()
    return -advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high)
