"""Random batches with ragged masks, as every comparison sees them. In float64, so that a difference is one of formula.

What lies at masked positions is finite noise: verl multiplies by the mask, so a NaN there would reach its sums (which
`test_core.py::test_a_nan_in_padding_reaches_verl_and_stays_out_here` holds it to).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

GROUPS, ROLLOUTS, WIDTH = 4, 4, 12
SEEDS = 20


@dataclass(frozen=True)
class Rows:
    """What a step knows of its responses: (B, T) tensors, and a group a row."""

    mask: Tensor
    groups: Tensor
    log_probs: Tensor
    old_log_probs: Tensor
    rollout_log_probs: Tensor
    ref_log_probs: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    advantages: Tensor
    outcome_rewards: Tensor
    """A reward on the last true token of each row, 0 elsewhere."""
    token_rewards: Tensor
    """A reward on every true token, 0 elsewhere."""
    sum_pi_squared: Tensor
    """A possible one beside old_log_probs."""

    @property
    def ones(self) -> Tensor:
        """The mask as verl wants it: numbers."""
        return self.mask.to(torch.float64)


def ragged_mask(generator: torch.Generator, holes: bool) -> Tensor:
    """Rows of 1 to WIDTH tokens, padded right; with `holes` some of them are a tool's, as in a multi-turn answer."""
    lengths = torch.randint(1, WIDTH + 1, (GROUPS * ROLLOUTS,), generator=generator)
    mask = torch.arange(WIDTH) < lengths[:, None]
    if holes:
        mask &= torch.rand(mask.shape, generator=generator) < 0.7
        mask[:, 0] = True  # no row is empty
    return mask


def rows(seed: int, *, holes: bool = False) -> Rows:
    """One random batch. Groups are shuffled: a group's rows do not stand together."""
    g = torch.Generator().manual_seed(seed)
    mask = ragged_mask(g, holes)
    shape = mask.shape

    def noise(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    groups = torch.arange(GROUPS).repeat_interleave(ROLLOUTS)[torch.randperm(len(mask), generator=g)]
    old = -noise().abs() - 0.05
    last = mask.to(torch.int64).cumsum(1).argmax(1)
    outcome = torch.zeros(shape, dtype=torch.float64)
    outcome[torch.arange(len(mask)), last] = torch.rand(len(mask), generator=g, dtype=torch.float64)
    values = noise()
    return Rows(
        mask=mask,
        groups=groups,
        log_probs=(old + noise(0.3)).clamp(max=-0.01),
        old_log_probs=old,
        rollout_log_probs=(old + noise(0.4)).clamp(max=-0.01),
        ref_log_probs=old + noise(0.5),
        values=values,
        old_values=values + noise(0.5),
        returns=values + noise(),
        advantages=noise(),
        outcome_rewards=outcome,
        token_rewards=torch.where(mask, noise(), 0.0),
        sum_pi_squared=old.exp() ** 2 + 0.5 * (1 - old.exp()) ** 2,
    )


def every_batch() -> Iterator[Rows]:
    """SEEDS batches, half of them with tool tokens inside the answer."""
    for seed in range(SEEDS):
        yield rows(seed, holes=seed % 2 == 1)


def padded_batches() -> Iterator[Rows]:
    """The same, without tool tokens: for what verl defines by position in the row."""
    for seed in range(SEEDS):
        yield rows(seed)


both = pytest.mark.parametrize("seed", range(SEEDS))
