"""REINFORCE++: by hand, against a double sum on each unpadded row, and what must change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, reinforce_plus_plus
from tests.support.advantage_batches import PROPERTY, lists_of, padded, random_rows, reordered

T, F, N = True, False, math.nan


def test_by_hand() -> None:
    # gamma 0.5, rewards 1 0 8: 8; 0 + 0.5 * 8 = 4; 1 + 0.5 * 4 = 3
    x = AdvantageInputs(torch.tensor([[1.0, 0.0, 8.0]]), torch.tensor([[T, T, T]]))
    advantages, returns = reinforce_plus_plus(x, gamma=0.5)
    assert advantages.tolist() == [[3.0, 4.0, 8.0]]
    assert torch.equal(advantages, returns) and advantages is not returns


def test_tool_tokens_are_stepped_over() -> None:
    # the row above with tool output inside and padding after: neither cuts the return, nor discounts it
    x = AdvantageInputs(torch.tensor([[1.0, N, 0.0, N, N, 8.0, N]]), torch.tensor([[T, F, T, F, F, T, F]]))
    advantages, returns = reinforce_plus_plus(x, gamma=0.5)
    assert advantages.tolist() == [[3.0, 0.0, 4.0, 0.0, 0.0, 8.0, 0.0]]
    assert torch.equal(advantages, returns)


def test_without_discount_it_is_the_reward_to_come() -> None:
    x = AdvantageInputs(torch.tensor([[0.5, -0.25, 1.0]]), torch.tensor([[T, T, T]]))
    assert reinforce_plus_plus(x, gamma=1.0)[0].tolist() == [[1.25, 0.75, 1.0]]


@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([1.0, 0.9, 0.0]), num_pad=st.integers(0, 3))
@PROPERTY
def test_equals_the_double_sum_whatever_padding_and_order(seed: int, gamma: float, num_pad: int) -> None:
    x = random_rows(seed)
    advantages, _ = reinforce_plus_plus(x, gamma=gamma)
    for i, rewards in enumerate(lists_of(x).rewards):
        want = [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
        assert_close(advantages[i][x.response_mask[i]], torch.tensor(want), rtol=1e-5, atol=1e-5)
        assert not advantages[i][~x.response_mask[i]].any()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(reinforce_plus_plus(reordered(x, order), gamma=gamma)[0], advantages[order])
    wider, _ = reinforce_plus_plus(padded(x, num_pad), gamma=gamma)
    assert torch.equal(wider[:, :6], advantages) and not wider[:, 6:].any()


def test_carries_no_gradient_and_leaves_its_inputs() -> None:
    rewards = torch.ones(2, 3, requires_grad=True)
    advantages, returns = reinforce_plus_plus(AdvantageInputs(rewards, torch.ones(2, 3, dtype=torch.bool)), gamma=1.0)
    assert not advantages.requires_grad and not returns.requires_grad
    assert torch.equal(rewards, torch.ones(2, 3))


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae"])
def test_who_is_whitened_over_the_batch(name: str) -> None:
    assert ADVANTAGE_ESTIMATORS.get(name).spec.whitened is True
