"""The optimal token baseline: one baseline for each token position in the responses to a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.advantages.groups import Groups
from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs

_OTB = "optimal_token_baseline"


@ADVANTAGE_ESTIMATORS.register(_OTB)
@torch.no_grad()
def optimal_token_baseline(x: AdvantageInputs, *, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """The sum of the later rewards, minus at each place the baseline with the least variance of the gradient.

        G_t = r_t + G_next(t)                                       rewards from token t on
        w_t = 1 - 2 * pi_t + sum over the vocabulary of pi^2        squared norm of the gradient of log pi_t
                                                                    with respect to the logits
        W_t = w_t + W_before(t)                                     the sum of w up to token t
        B_t = sum of W_t * G_t over the group / (sum of W_t + eps)
        A_t = G_t - B_t

    The t-th place of a row is its t-th true token: tool output is skipped. The group at place t is the rows with at
    least t true tokens. Where only one row is that long there is nothing to compare it with: B is 0 and A_t = G_t, as
    in verl. (The formula would give B = G_t, and the end of the longest response would never be trained.) A row that is
    alone in its group because the others have no true token gets 0 (verl: G_t). With rollout_is_weights rho, w_t is
    multiplied by rho_t^2. pi_t = exp(old_log_probs); a w that rounding makes negative is set to 0.

    Reads token_level_rewards, response_mask, old_log_probs and sum_pi_squared, all (B, T), group_ids (B,), and
    rollout_is_weights (B, T) where there are any. Returns (advantages, returns), both (B, T), 0 where masked;
    returns = G. Not discounted, not whitened. Raises ConfigError for a group of one (verl: B = 0), ValueError when a
    field it reads is None.

    Li et al. 2026, https://arxiv.org/abs/2602.07078. verl's optimal_token_baseline counts places by column, tool output
    included, and its tir_optimal_token_baseline counts them as we do: without tool output all three agree.
    """
    groups, mask = Groups.of(x, _OTB), x.response_mask
    # True tokens are moved to the front in their order, so that a place is a column.
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    here = mask.gather(1, order)
    rewards = torch.where(mask, x.token_level_rewards, 0.0).gather(1, order)
    to_go = torch.where(here, rewards.flip(1).cumsum(1).flip(1), 0.0)
    weight = torch.where(here, _energy(x).gather(1, order).cumsum(1), 0.0)

    def over_group(per_place: Tensor) -> Tensor:
        return per_place.new_zeros(groups.number, mask.shape[1]).index_add(0, groups.index, per_place)

    baseline = over_group(weight * to_go) / (over_group(weight) + eps)
    baseline = torch.where(over_group(here.to(to_go.dtype)) > 1, baseline, 0.0)
    has_others = (groups.count > 1)[groups.index]
    advantages = torch.where(here & has_others[:, None], to_go - baseline[groups.index], 0.0)
    zeros = torch.zeros_like(to_go)
    return zeros.scatter(1, order, advantages), zeros.scatter(1, order, to_go)


def _energy(x: AdvantageInputs) -> Tensor:
    """(B, T) w_t, 0 where masked."""
    old, squares = x.require("old_log_probs", _OTB), x.require("sum_pi_squared", _OTB)
    w = torch.where(x.response_mask, 1.0 - 2.0 * old.exp() + squares, 0.0).clamp(min=0.0)
    if x.rollout_is_weights is None:
        return w
    return w * torch.where(x.response_mask, x.rollout_is_weights, 0.0) ** 2
