"""Selects and weighs the rows of a batch: length penalty, groups with different scores, rows drawn by their score.

All are pure functions of one number per response, for B responses. `counted` is False for responses that do not count,
because their reward failed or a mask left them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.errors import ConfigError, setting

PF_PPO_METHODS: tuple[str, ...] = ("pow", "max_min", "max_random")


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, factor: float) -> Tensor:
    """DAPO's soft penalty for length: 0 up to the buffer, then linearly down to -factor at max_length.

        -factor * clip((length - (max_length - buffer)) / buffer, 0, 1)

    lengths is (B,), response tokens; the result (B,) f32 must be added to the score. At max_length, where the answer
    was cut, it is -factor, and no more beyond.

    Yu et al. 2025, https://arxiv.org/abs/2503.14476, equation 13, where factor is 1.
    """
    over = (lengths.float() - (max_length - buffer)) / buffer
    return -factor * over.clamp(0.0, 1.0)


def in_varied_groups(scores: Tensor, group_ids: Tensor, counted: Tensor) -> Tensor:
    """(B,) bool: true if the response's group has two different scores, which a group-relative estimator needs.

    scores is (B,) f32, group_ids (B,) int64, counted (B,) bool. Scores are compared, not their standard deviation: that
    of equal numbers may be a rounding error. A group with one counted response or none has nothing to compare, so it is
    not varied; DAPO's reference code keeps groups of one.
    """
    _, group = torch.unique(group_ids, return_inverse=True)
    num_groups = int(group.max()) + 1 if len(group) else 0
    low, high = (torch.full((num_groups,), x, dtype=scores.dtype) for x in (torch.inf, -torch.inf))
    low.scatter_reduce_(0, group, torch.where(counted, scores, torch.inf), "amin")
    high.scatter_reduce_(0, group, torch.where(counted, scores, -torch.inf), "amax")
    return (high > low)[group]


def pf_ppo_weights(scores: Tensor, counted: Tensor, *, method: str, weight_pow: float = 2.0) -> Tensor:
    """(B,) f32, how likely each response is to be drawn by PF-PPO's filter; not normalised, 0 where not counted.

        pow         |score|^weight_pow
        max_min     1 for the batch's highest and lowest scores, 0 between
        max_random  0.4 for the highest score, 0.1 for the others

    Where no counted response has a weight, all of them have 1. Highest and lowest are of the whole batch, as in verl;
    the paper ranks the responses of a prompt. With scores 0 and 1 the two differ only in groups of equal scores. `pow`
    takes a score of -1 for as good as 1.

    Raises ConfigError for an unknown method. Shen & Zhang 2024, https://arxiv.org/abs/2409.06957.
    """
    if method not in PF_PPO_METHODS:
        raise ConfigError(
            f"{setting('reweight_method')}={method!r}: no such method. Known: {', '.join(PF_PPO_METHODS)}."
        )
    if not bool(counted.any()):
        return torch.zeros_like(scores)
    scores = torch.where(counted, scores, 0.0)
    high, low = scores[counted].max(), scores[counted].min()
    if method == "pow":
        weights = scores.abs() ** weight_pow
    elif method == "max_min":
        weights = ((scores == high) | (scores == low)).to(scores.dtype)
    else:
        weights = torch.where(scores == high, 0.4, 0.1)
    weights = torch.where(counted, weights, 0.0)
    return weights if bool((weights > 0).any()) else counted.to(scores.dtype)


def draw_rows(weights: Tensor, seed: int) -> Tensor:
    """(B,) int64, as many rows as there are weights, drawn with replacement and then put in ascending order.

    The draw depends on weights and seed alone. Ascending order keeps the responses to one prompt together; a loss does
    not depend on the order. If no weight is above 0, each row is taken once.
    """
    if not bool((weights > 0).any()):
        return torch.arange(len(weights))
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, len(weights), replacement=True, generator=generator).sort().values


def monte_carlo_returns(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """The observed return of each state: the discounted sum of the rewards that followed, without a critic.

        R_t = r_t + gamma * R_next(t)

    rewards and mask are (B, T); next(t) is the next token with mask true. The result is (B, T) f32, 0 where mask is
    false, whatever rewards hold there. It is GAE's return at lambda 1, computed without values.

    Value pretraining of VC-PPO, Yuan et al. 2025, https://arxiv.org/abs/2503.01491, and VAPO,
    https://arxiv.org/abs/2504.05118.
    """
    returns, carry = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        carry = torch.where(mask[:, t], rewards[:, t] + gamma * carry, carry)
        returns[:, t] = torch.where(mask[:, t], carry, 0.0)
    return returns
