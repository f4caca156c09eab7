"""Estimators that compare the total rewards of the responses to one prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.errors import ConfigError, setting


@dataclass(frozen=True)
class Groups:
    """The rows of a batch, grouped by prompt. A row without a true token (its reward failed) belongs to no group."""

    index: Tensor
    """(B,) int64, the group of each row, from 0."""
    counted: Tensor
    """(B,) bool, rows with a true token."""
    number: int
    count: Tensor
    """(groups,) f32, counted rows of each group."""

    @classmethod
    def of(cls, x: AdvantageInputs, reader: str) -> Groups:
        """Raises ConfigError for a group of one, ValueError when group_ids is None; `reader` is the estimator."""
        _, index, size = torch.unique(x.require("group_ids", reader), return_inverse=True, return_counts=True)
        refuse_groups_of_one(size, reader)
        counted, number = x.response_mask.any(1), len(size)
        return cls(index, counted, number, _group_sum(counted.to(x.token_level_rewards.dtype), index, number))

    def sum(self, per_row: Tensor) -> Tensor:
        """(groups,) the sum over each group of `per_row`, one number per row."""
        return _group_sum(per_row, self.index, self.number)

    def above_lowest(self, reward: Tensor) -> Tensor:
        """(B,) the reward of each row above the lowest of its group, 0 where not counted.

        Centring these numbers gives the same as centring the rewards, and equal rewards give exactly 0, of any size.
        """
        lowest = torch.full_like(self.count, torch.inf).scatter_reduce(
            0, self.index, torch.where(self.counted, reward, torch.inf), reduce="amin"
        )
        return torch.where(self.counted, reward - lowest[self.index], 0.0)

    def centred(self, reward: Tensor) -> Tensor:
        """(B,) the reward of each row less the mean of its group, 0 where not counted."""
        above = self.above_lowest(reward)
        mean = self.sum(above) / self.count.clamp(min=1)
        return torch.where(self.counted, above - mean[self.index], 0.0)

    def std(self, centred: Tensor) -> Tensor:
        """(groups,) sample standard deviation (n - 1) of the result of `centred`; 0 for a group of one counted row."""
        return (self.sum(centred**2) / (self.count - 1).clamp(min=1)).sqrt()

    def normalised(self, reward: Tensor, *, norm_by_std: bool, eps: float) -> Tensor:
        """(B,) `centred`, divided by its std + eps with `norm_by_std`."""
        centred = self.centred(reward)
        return centred / (self.std(centred)[self.index] + eps) if norm_by_std else centred


def _group_sum(per_row: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return torch.zeros(num_groups, dtype=per_row.dtype, device=per_row.device).index_add(0, group, per_row)


def refuse_groups_of_one(size: Tensor, reader: str) -> None:
    """Raise ConfigError if a group has only one row, which has no other row to compare with."""
    if bool((size == 1).any()):
        raise ConfigError(
            f"{setting('n')}=1 with {setting('adv_estimator')}={reader}: a group of one has no baseline, "
            f"so every advantage would be 0. Use {setting('n')} >= 2, or adv_estimator=gae."
        )


def total_rewards(x: AdvantageInputs) -> Tensor:
    """(B,) the sum of each row's token_level_rewards where response_mask is true."""
    return torch.where(x.response_mask, x.token_level_rewards, 0.0).sum(1)


def on_true_tokens(per_row: Tensor, x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T): one number for all true tokens of a row, 0 where masked. There is no critic
    to train, so the returns are the advantages."""
    advantages = torch.where(x.response_mask, per_row[:, None], 0.0)
    return advantages, advantages.clone()


@ADVANTAGE_ESTIMATORS.register("grpo")
@torch.no_grad()
def grpo(x: AdvantageInputs, *, norm_by_std: bool = True, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Group-relative advantage: a response's reward against the other responses to its prompt.

        R_i = sum of the row's token_level_rewards where response_mask is true
        A_i = (R_i - mean of its group) / (std of its group + eps)       on every true token

    std is the sample standard deviation (n - 1). Without `norm_by_std` the division is left out (Dr. GRPO). A group
    whose rewards are all equal gives exactly 0. A row without a true token belongs to no group.

    Reads token_level_rewards and response_mask, both (B, T), and group_ids (B,). Returns (advantages, returns), both
    (B, T), 0 where masked; there is no critic to teach, so returns are the advantages. Raises ConfigError for a group
    of one, ValueError when group_ids is None.

    Shao et al. 2024, https://arxiv.org/abs/2402.03300; without std: Liu et al. 2025, https://arxiv.org/abs/2503.20783.
    """
    groups = Groups.of(x, "grpo")
    return on_true_tokens(groups.normalised(total_rewards(x), norm_by_std=norm_by_std, eps=eps), x)


@ADVANTAGE_ESTIMATORS.register("rloo")
@torch.no_grad()
def rloo(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """REINFORCE, leave one out: a response's reward minus the mean reward of the other responses to its prompt.

        A_i = R_i - mean of R_j, j != i of its group = n / (n - 1) * (R_i - mean of its group)     on every true token

    R as in `grpo`, n the rows of the group that have a true token. The baseline does not depend on the response, so
    the gradient is unbiased, which grpo's is not. The last row that is left of a group has no others and gets 0, where
    verl gives it its raw reward.

    Reads, returns and raises as `grpo`. Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740.
    """
    groups = Groups.of(x, "rloo")
    others = (groups.count - 1).clamp(min=1)
    return on_true_tokens(groups.centred(total_rewards(x)) * (groups.count / others)[groups.index], x)


@ADVANTAGE_ESTIMATORS.register("opo")
@torch.no_grad()
def opo(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """On-policy RL with the optimal reward baseline: the group's mean, in which long responses count more.

        A_i = R_i - sum_j l_j R_j / sum_j l_j          j over the group, l the true tokens of a row, on every true token

    R as in `grpo`. The variance of the gradient is least for the mean weighted by squared gradient norms, and those
    grow with the length of a response: l stands for them.

    Reads, returns and raises as `grpo`. Hao et al. 2025, https://arxiv.org/abs/2505.23585.
    """
    groups = Groups.of(x, "opo")
    length = x.response_mask.sum(1).to(groups.count.dtype)
    above = groups.above_lowest(total_rewards(x))
    baseline = groups.sum(length * above) / groups.sum(length).clamp(min=1)
    return on_true_tokens(torch.where(groups.counted, above - baseline[groups.index], 0.0), x)


@ADVANTAGE_ESTIMATORS.register("gpg")
@torch.no_grad()
def gpg(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Group policy gradient: distance from the group's mean, times all rows over the rows that have a gradient.

        A_i = B / (B - M) * (R_i - mean of its group)          on every true token

    R as in `grpo`. B is the number of rows with a true token, M the number of these in groups whose rewards are all
    equal: their gradient is 0, and they would make the batch's mean smaller. If M = B, A is 0. F_norm of the paper is
    1.

    Reads, returns and raises as `grpo`. Chu et al. 2025, https://arxiv.org/abs/2504.02546. verl's factor is B over the
    rows whose reward is not 0, which depends on where the reward has its zero and not on what is learnt: with rewards
    of 1 and 0 it is 1 over the accuracy, with -1 and 1 it is 1.
    """
    groups = Groups.of(x, "gpg")
    above = groups.above_lowest(total_rewards(x))
    teaches = (groups.sum(above) > 0)[groups.index] & groups.counted
    scale = groups.counted.sum() / teaches.sum().clamp(min=1)
    return on_true_tokens(groups.centred(total_rewards(x)) * scale, x)


@ADVANTAGE_ESTIMATORS.register("grpo_passk")
@torch.no_grad()
def grpo_passk(x: AdvantageInputs, *, norm_by_std: bool = True, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Pass@k, where k is the size of the group: only the best response gets an advantage, its lead over the second
    best.

        A_best = (R_best - R_second) / (std of the group + eps)         on every true token; 0 for the others

    R, std and `norm_by_std` as in `grpo`. The group's objective is its largest reward, and R_second is that largest
    reward without the best response, so this is the leave-one-out advantage of it. Two best ones: 0 for both.

    Reads, returns and raises as `grpo`. Tang et al. 2025, https://arxiv.org/abs/2503.19595; the division is verl's.
    """
    groups = Groups.of(x, "grpo_passk")
    reward = total_rewards(x)
    above = groups.above_lowest(reward)
    order = torch.arange(len(above), device=above.device)
    best = _largest(above, groups, groups.counted)
    first = torch.full((groups.number,), len(above), device=above.device).scatter_reduce(
        0, groups.index, torch.where(groups.counted & (above == best[groups.index]), order, len(above)), reduce="amin"
    )
    is_first = (order == first[groups.index]) & groups.counted
    second = _largest(above, groups, groups.counted & ~is_first)
    lead = torch.where(is_first, above - second[groups.index], 0.0)  # 0 for a row alone: it is its group's lowest
    if norm_by_std:
        lead = lead / (groups.std(groups.centred(reward))[groups.index] + eps)
    return on_true_tokens(lead, x)


def _largest(above: Tensor, groups: Groups, among: Tensor) -> Tensor:
    """(groups,) the largest of numbers that are at least 0; 0 for a group without any."""
    return torch.zeros_like(groups.count).scatter_reduce(
        0, groups.index, torch.where(among, above, 0.0), reduce="amax", include_self=True
    )


@ADVANTAGE_ESTIMATORS.register("reinforce_plus_plus_baseline")
@torch.no_grad()
def reinforce_plus_plus_baseline(x: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """REINFORCE++ with the group's mean as baseline: distance from the mean, then scaled over the whole batch.

        A_i = R_i - mean of its group                   on every true token; to be whitened, see masked.whiten

    R as in `grpo`. One scale for all prompts: a group of nearly equal rewards is not blown up as grpo's std does. But
    whitening takes off the mean over tokens, which is not 0 where right answers are longer or shorter than wrong ones:
    a group of equal rewards then gets a small advantage of its own.

    Reads, returns and raises as `grpo`. Hu et al. 2025, https://arxiv.org/abs/2501.03262.
    """
    groups = Groups.of(x, "reinforce_plus_plus_baseline")
    return on_true_tokens(groups.centred(total_rewards(x)), x)
