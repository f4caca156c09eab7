"""REINFORCE++: the sum of the later rewards, without a critic and without groups."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs


@ADVANTAGE_ESTIMATORS.register("reinforce_plus_plus")
@torch.no_grad()
def reinforce_plus_plus(x: AdvantageInputs, *, gamma: float) -> tuple[Tensor, Tensor]:
    """The discounted rewards from a token to the end of its response.

        G_t = r_t + gamma * G_next(t)       A_t = G_t

    The advantages are then whitened over the policy tokens of the whole batch, which is the only baseline. The caller
    does that, because the spec has `whitened=True` (see masked.whiten). next(t) is the next token with response_mask
    true; after the last one G is 0. Masked positions of both results are 0.

    Reads token_level_rewards and response_mask, both (B, T). Returns (advantages, returns), both (B, T), returns = G.

    Hu et al. 2025, https://arxiv.org/abs/2501.03262. Its KL penalty at every token is `algorithm.use_kl_in_reward`.
    Tool output is skipped, as in `gae` and in verl 0.9.1.
    """
    mask, rewards = x.response_mask, x.token_level_rewards
    returns = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    for t in range(mask.shape[1] - 1, -1, -1):
        carry = torch.where(mask[:, t], rewards[:, t] + gamma * carry, carry)
        returns[:, t] = torch.where(mask[:, t], carry, 0.0)
    return returns.clone(), returns
