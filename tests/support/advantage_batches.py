"""Batches for the tests of advantage estimators: ragged rows in groups, NaN wherever the mask is false."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from torch import Tensor

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
GROUPED = ("gpg", "grpo", "grpo_passk", "opo", "reinforce_plus_plus_baseline", "rloo")
"""Estimators of one number a row, from group_ids."""


@dataclass(frozen=True)
class Rows:
    """What a textbook works on: lists, of policy tokens only."""

    rewards: list[list[float]]
    ids: list[int]
    old: list[list[float]]
    squares: list[list[float]]

    @property
    def scores(self) -> list[float]:
        return [sum(row) for row in self.rewards]

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rewards]

    def members(self, i: int) -> list[int]:
        """Rows of row i's group that have a token."""
        return [j for j in range(len(self.ids)) if self.ids[j] == self.ids[i] and self.lengths[j] > 0]


def one_a_row(scores: list[float], ids: list[int] | None = None, lengths: list[int] | None = None) -> AdvantageInputs:
    """The score on a row's last true token, rows of two or `lengths` tokens, a last column of padding."""
    lengths = lengths or [2] * len(scores)
    width = max(lengths) + 1
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    rewards = torch.where(mask, 0.0, math.nan)
    for i, (score, length) in enumerate(zip(scores, lengths, strict=True)):
        rewards[i, length - 1] = score if length else math.nan
    return AdvantageInputs(rewards, mask, group_ids=torch.tensor(ids or [7] * len(scores)))


def random_rows(seed: int, width: int = 6) -> AdvantageInputs:
    """Three groups of 2, 3 and 4 rows in any order, with tool tokens inside; one row without a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([3, 3, 9, 9, 9, 1, 1, 1, 1])[torch.randperm(9, generator=generator)]
    lengths = torch.randint(1, width + 1, (9,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]) & (torch.rand(9, width, generator=generator) < 0.8)
    mask[:, 0] = True
    mask[int(torch.randint(9, (1,), generator=generator))] = False
    logits = torch.randn(9, width, 5, generator=generator) * 2
    p = logits.softmax(-1)
    old = p.log().gather(2, torch.randint(5, (9, width, 1), generator=generator))[:, :, 0]
    rewards = torch.randint(-2, 3, (9, width), generator=generator).float()
    return AdvantageInputs(
        rewards.masked_fill(~mask, math.nan),
        mask,
        group_ids=ids,
        old_log_probs=old.masked_fill(~mask, math.nan),
        extras={"sum_pi_squared": (p**2).sum(-1).masked_fill(~mask, math.nan)},
    )


def lists_of(x: AdvantageInputs) -> Rows:
    assert x.group_ids is not None and x.old_log_probs is not None

    def tokens(field: Tensor) -> list[list[float]]:
        return [row[mask].tolist() for row, mask in zip(field, x.response_mask, strict=True)]

    return Rows(
        tokens(x.token_level_rewards), x.group_ids.tolist(), tokens(x.old_log_probs), tokens(x.extras["sum_pi_squared"])
    )


def changed(x: AdvantageInputs, change: Callable[[Tensor], Tensor]) -> AdvantageInputs:
    """The inputs with `change` applied to every field that is there."""
    fields = {name: value for name, value in vars(x).items() if isinstance(value, Tensor)}
    extras = {name: change(value) for name, value in x.extras.items()}
    return replace(x, extras=extras, **{name: change(value) for name, value in fields.items()})


def reordered(x: AdvantageInputs, order: Tensor) -> AdvantageInputs:
    return changed(x, lambda field: field[order])


def padded(x: AdvantageInputs, num_pad: int) -> AdvantageInputs:
    """Columns of NaN added on the right."""

    def widen(field: Tensor) -> Tensor:
        if field.dim() == 1:
            return field
        more = torch.zeros(len(field), num_pad, dtype=field.dtype)
        return torch.cat([field, more if field.dtype == torch.bool else more.fill_(math.nan)], dim=1)

    return changed(x, widen)


def estimate(name: str, x: AdvantageInputs, **options: float) -> tuple[Tensor, Tensor]:
    advantages, returns = ADVANTAGE_ESTIMATORS.get(name).value(x, **options)
    return advantages, returns
