"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs


@ADVANTAGE_ESTIMATORS.register("gae")
@torch.no_grad()
def gae(
    x: AdvantageInputs,
    *,
    gamma: float,
    lam: float,
    lam_critic: float | None = None,
    length_adaptive_alpha: float | None = None,
    bootstrap_truncated: bool = False,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the policy's own tokens.

        delta_t = r_t + gamma * V_next(t) - V_t
        A_t(l)  = delta_t + gamma * l * A_next(t)(l)

        advantages_t = A_t(lam)                  returns_t = A_t(lam) + V_t
        advantages_t = A_t(lam_actor)            returns_t = A_t(lam_critic) + V_t        with the options below

    next(t) is the next token with response_mask true: tool output and padding are skipped; they do not end the row.
    After the last such token A and V are 0, because the answer has ended. With `bootstrap_truncated`, V is final_values
    there for rows with truncated true, so that an answer cut by the length limit does not count as one that ended.
    Masked positions of both results are 0.

    `lam_critic` gives the returns a lambda of their own (decoupled GAE). `length_adaptive_alpha` gives the advantages
    of each row lam_actor = 1 - 1 / (alpha * n), n the row's true tokens, and at least 0: in long answers the rewards
    that followed count more, in short ones the critic's values. The returns use `lam_critic`, or `lam`.

    Reads token_level_rewards, values, response_mask, all (B, T); final_values and truncated, both (B,), only with
    `bootstrap_truncated`. Returns (advantages, returns), both (B, T). Not whitened: see masked.whiten. Raises
    ValueError when a field it reads is None, or for an alpha that is not above 0.

    Schulman et al. 2015, https://arxiv.org/abs/1506.02438. The paper has no mask; skipping masked tokens is ours.
    Decoupled lambda: Yuan et al. 2025 (VC-PPO), https://arxiv.org/abs/2503.01491; length-adaptive: Yue et al. 2025
    (VAPO), https://arxiv.org/abs/2504.05118, whose formula is negative where alpha * n < 1: 0 there is ours.
    """
    mask = x.response_mask
    known_values = torch.where(mask, x.require("values", "gae"), 0.0)
    # True tokens are moved to the front in their order, so the recursion runs over neighbours and needs no mask.
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    num_true = mask.sum(1)
    rewards = torch.where(mask, x.token_level_rewards, 0.0).gather(1, order)
    values = known_values.gather(1, order)

    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if bootstrap_truncated:
        final = torch.where(x.require("truncated", "gae"), x.require("final_values", "gae"), 0.0)
        is_last = torch.arange(mask.shape[1], device=mask.device) == num_true[:, None] - 1
        next_values = torch.where(is_last, final[:, None], next_values)

    # After a row's last true token rewards and values are 0, so delta and A stay 0 until the row begins.
    delta = (rewards + gamma * next_values - values).T.contiguous()
    lam_rows = torch.full_like(values[:, 0], lam)
    critic_rows = lam_rows if lam_critic is None else torch.full_like(lam_rows, lam_critic)
    if length_adaptive_alpha is not None:
        lam_rows = length_adaptive_lambda(num_true, length_adaptive_alpha).to(lam_rows.dtype)

    advantages = torch.zeros_like(values).scatter(1, order, _discounted_sums(delta, gamma * lam_rows).T)
    if critic_rows is lam_rows:
        return advantages, advantages + known_values
    of_critic = torch.zeros_like(values).scatter(1, order, _discounted_sums(delta, gamma * critic_rows).T)
    return advantages, of_critic + known_values


def length_adaptive_lambda(num_tokens: Tensor, alpha: float) -> Tensor:
    """(B,) f32, 1 - 1 / (alpha * num_tokens), at least 0; a row without tokens has 0.

    The weights of GAE's sum, lambda^k, then add up to alpha * num_tokens: a share of the response, whatever its length.
    Raises ValueError for an alpha that is not above 0. See `gae`.
    """
    if not alpha > 0:
        raise ValueError(f"length_adaptive_alpha={alpha}: must be above 0")
    return (1.0 - 1.0 / (alpha * num_tokens.clamp(min=1).float())).clamp(min=0.0)


def _discounted_sums(delta: Tensor, decay: Tensor) -> Tensor:
    """(T, B): sum_k decay^k delta[t + k] for a decay (B,) of each row; `delta` is (T, B)."""
    sums = torch.zeros_like(delta)
    carry = torch.zeros_like(decay)
    for t in range(len(delta) - 1, -1, -1):
        carry = torch.addcmul(delta[t], decay, carry)
        sums[t] = carry
    return sums
