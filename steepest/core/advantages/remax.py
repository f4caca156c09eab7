"""ReMax: the reward of the greedy response as baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs


@ADVANTAGE_ESTIMATORS.register("remax")
@torch.no_grad()
def remax(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """ReMax: the sum of the later rewards, minus the reward of the greedy response to the prompt.

        A_t = G_t - b           G_t = sum of token_level_rewards from t on, b = reward_baselines, on every true token

    b does not depend on the response, so the gradient is unbiased. One response per prompt is enough, in addition to
    the greedy one. A KL penalty in the rewards is part of G and not of b.

    Reads token_level_rewards and response_mask, both (B, T), and reward_baselines (B,). Returns (advantages, returns),
    both (B, T), 0 where masked; returns are G. Raises ValueError when reward_baselines is None.

    Li et al. 2023, https://arxiv.org/abs/2310.10505. Undiscounted, as there.
    """
    rewards = torch.where(x.response_mask, x.token_level_rewards, 0.0)
    returns = torch.where(x.response_mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    baselines = x.require("reward_baselines", "remax")
    return torch.where(x.response_mask, returns - baselines[:, None], 0.0), returns
