"""Advantages from several rewards, each normalised in its group before they are added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.core.advantages.groups import grpo, refuse_groups_of_one
from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs

_ROUNDING = 1e-5
"""A sum of normalised rewards with weights of 1 that is below this number counts as 0."""


@ADVANTAGE_ESTIMATORS.register("gdpo")
@torch.no_grad()
def gdpo(
    x: AdvantageInputs, *, weights: Sequence[float] | None = None, norm_by_std: bool = True, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Group reward-decoupled normalisation: each reward is normalised within its group before they are added up.

        A_ik = (r_ik - mean of the group's r_k) / (std of the group's r_k + eps)        reward k of response i
        S_i  = sum over k of w_k * A_ik
        A_i  = S_i / (std of S over the batch's rows + eps)                             on every true token

    grpo sees only the sum of the rewards: mixtures with the same sum are equal to it, and a reward with large
    differences dominates the others. Here each reward has the same influence, times its weight (1 without `weights`).
    Stds are sample stds (n - 1); without `norm_by_std` the division by the first std is left out. A row without a true
    token belongs to no group and does not count in the batch.

    Reads named_rewards (B, K), response_mask (B, T) and group_ids (B,), not token_level_rewards. Returns (advantages,
    returns), both (B, T), 0 where masked; returns are the advantages. Raises ConfigError for a group of one, ValueError
    for a field that is None and for weights of another number than K.

    Liu et al. 2026, https://arxiv.org/abs/2601.05242. S has the mean 0 over responses, so no mean is subtracted. verl
    whitens over tokens instead: their mean is not 0 where lengths differ, and a group of equal rewards then gets an
    advantage; here it gets exactly 0.
    """
    group_ids, rewards = x.require("group_ids", "gdpo"), x.require("named_rewards", "gdpo")
    refuse_groups_of_one(torch.unique(group_ids, return_counts=True)[1], "gdpo")
    factors = [1.0] * rewards.shape[1] if weights is None else [*weights]
    if len(factors) != rewards.shape[1]:
        raise ValueError(f"gdpo: {len(factors)} weights for {rewards.shape[1]} rewards")
    counted = x.response_mask.any(1, keepdim=True)
    total = torch.zeros_like(rewards[:, :1])
    for factor, reward in zip(factors, rewards.split(1, dim=1), strict=True):
        one = AdvantageInputs(reward, counted, group_ids=group_ids)  # a response is one token here
        total += factor * grpo(one, norm_by_std=norm_by_std, eps=eps)[0]
    # Rewards that cancel leave a rounding error, which the division would enlarge.
    total = torch.where(total.abs() > _ROUNDING * sum(map(abs, factors)), total, 0.0)
    variance = (total**2).sum() / (counted.sum() - 1).clamp(min=1)
    advantages = torch.where(x.response_mask, total / (variance.sqrt() + eps), 0.0)
    return advantages, advantages.clone()
