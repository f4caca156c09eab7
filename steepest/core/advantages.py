"""Advantage estimators: from rewards per token to advantages and returns per token.

Each estimator is one function: `AdvantageInputs` in, `(advantages, returns)` out, its options as keywords with types.
`needs` names the optional fields it reads; a critic exists because some estimator needs `values`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.errors import ConfigError
from steepest.registry import Registry

ADVANTAGE_ESTIMATORS = Registry("advantage estimator", "algorithm.adv_estimator")


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator may read. Fields that are None were not asked for by its `needs`.

    Rewards and values at masked positions are ignored, whatever they hold.
    """

    token_level_rewards: Tensor
    """(B, T) f32, the reward of producing token t; a sequence's reward lies on its last true token."""
    response_mask: Tensor
    """(B, T) bool, true on tokens that the policy produced."""
    values: Tensor | None = None
    """(B, T) f32, V of the state before token t is produced."""
    group_ids: Tensor | None = None
    """(B,) int64, which prompt a response belongs to."""
    final_values: Tensor | None = None
    """(B,) f32, V of the state after the last response token."""
    truncated: Tensor | None = None
    """(B,) bool, true when the response hit the length limit."""

    def __post_init__(self) -> None:
        full, rows = self.response_mask.shape, self.response_mask.shape[:1]
        wanted = {
            "token_level_rewards": full,
            "values": full,
            "group_ids": rows,
            "final_values": rows,
            "truncated": rows,
        }
        for name, shape in wanted.items():
            found = getattr(self, name)
            if found is not None and found.shape != shape:
                raise ValueError(f"AdvantageInputs.{name} has shape {tuple(found.shape)}, expected {tuple(shape)}")

    def require(self, name: str, reader: str) -> Tensor:
        """The optional field `name`, or ValueError saying that `reader` needs it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{reader} needs AdvantageInputs.{name}, which is None")
        return value


@ADVANTAGE_ESTIMATORS.register("gae", needs=("values",))
@torch.no_grad()
def gae(x: AdvantageInputs, *, gamma: float, lam: float, bootstrap_truncated: bool = False) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the policy's own tokens.

        delta_t = r_t + gamma * V_next(t) - V_t
        A_t     = delta_t + gamma * lam * A_next(t)

    next(t) is the next token with response_mask true: tool output and padding are stepped over, not treated as the
    end. Past the last such token A is 0 and so is V: the answer is over. With `bootstrap_truncated` V there is
    final_values for rows with truncated true, so that an answer cut by the length limit is not taken for one that
    ended. Masked positions of both results are 0.

    Reads token_level_rewards, values, response_mask, all (B, T); final_values and truncated, both (B,), only with
    `bootstrap_truncated`. Returns (advantages, returns), both (B, T); returns = advantages + values. Not whitened:
    see masked.whiten. Raises ValueError when a field it reads is None.

    Schulman et al. 2015, https://arxiv.org/abs/1506.02438. The paper has no mask; stepping over is ours.
    """
    mask = x.response_mask
    known_values = torch.where(mask, x.require("values", "gae"), 0.0)
    # True tokens first, in their order: the recursion then runs over neighbours and needs no mask of its own.
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
    packed = torch.zeros_like(delta)
    carry = torch.zeros_like(num_true, dtype=delta.dtype)
    for t in range(mask.shape[1] - 1, -1, -1):
        carry = torch.add(delta[t], carry, alpha=gamma * lam)
        packed[t] = carry

    advantages = torch.zeros_like(values).scatter(1, order, packed.T)
    return advantages, advantages + known_values


@ADVANTAGE_ESTIMATORS.register("grpo", needs=("group_ids",))
@torch.no_grad()
def grpo(x: AdvantageInputs, *, norm_by_std: bool = True, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Group-relative advantage: a response's reward against the other responses to its prompt.

        R_i = sum of the row's token_level_rewards where response_mask is true
        A_i = (R_i - mean of its group) / (std of its group + eps)       on every true token

    std is the sample standard deviation (n - 1). Without `norm_by_std` the division is left out (Dr. GRPO). A group
    whose rewards are all equal gives exactly 0. A row without a true token is outside every group.

    Reads token_level_rewards and response_mask, both (B, T), and group_ids (B,). Returns (advantages, returns), both
    (B, T), 0 where masked; there is no critic to teach, so returns are the advantages. Raises ConfigError for a group
    of one, ValueError when group_ids is None.

    Shao et al. 2024, https://arxiv.org/abs/2402.03300; without std: Liu et al. 2025, https://arxiv.org/abs/2503.20783.
    """
    _, group, size = torch.unique(x.require("group_ids", "grpo"), return_inverse=True, return_counts=True)
    if bool((size == 1).any()):
        raise ConfigError(
            "actor_rollout_ref.rollout.n=1 with algorithm.adv_estimator=grpo: a group of one has no baseline, "
            "so every advantage would be 0. Use actor_rollout_ref.rollout.n >= 2, or adv_estimator=gae."
        )
    num_groups = len(size)
    reward = torch.where(x.response_mask, x.token_level_rewards, 0.0).sum(1)
    counted = x.response_mask.any(1)
    count = _group_sum(counted.to(reward.dtype), group, num_groups)

    # Measured from the group's smallest reward: equal rewards give 0 exactly, whatever their size or number.
    lowest = torch.full_like(count, torch.inf).scatter_reduce(
        0, group, torch.where(counted, reward, torch.inf), reduce="amin"
    )
    above = torch.where(counted, reward - lowest[group], 0.0)
    mean = _group_sum(above, group, num_groups) / count.clamp(min=1)
    centred = torch.where(counted, above - mean[group], 0.0)
    if norm_by_std:
        variance = _group_sum(centred**2, group, num_groups) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[group] + eps)
    advantages = torch.where(x.response_mask, centred[:, None], 0.0)
    return advantages, advantages.clone()


def _group_sum(per_row: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return torch.zeros(num_groups, dtype=per_row.dtype, device=per_row.device).index_add(0, group, per_row)
