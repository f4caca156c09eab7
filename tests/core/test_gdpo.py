"""GDPO: by hand, against loops over groups and rewards, its properties, and what it tells apart that grpo cannot."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, gdpo, grpo
from steepest.errors import ConfigError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def inputs(rewards: Tensor, groups: list[int], mask: Tensor | None = None) -> AdvantageInputs:
    """Two tokens a response; the rewards of the tokens hold what gdpo must not read."""
    mask = torch.ones(len(groups), 2, dtype=torch.bool) if mask is None else mask
    return AdvantageInputs(
        torch.full(mask.shape, math.nan), mask, group_ids=torch.tensor(groups), extras={"named_rewards": rewards}
    )


def textbook(rewards: list[list[float]], groups: list[int], weights: list[float], scales: bool = True) -> list[float]:
    """Loops over responses and rewards, with the standard library's sample standard deviation."""
    total = [0.0] * len(groups)
    for k, weight in enumerate(weights):
        for i, group in enumerate(groups):
            own = [rewards[j][k] for j in range(len(groups)) if groups[j] == group]
            spread = statistics.stdev(own) + 1e-6 if scales else 1.0
            total[i] += weight * (rewards[i][k] - statistics.mean(own)) / spread
    return [one / (statistics.stdev(total) + 1e-6) for one in total]


def test_by_hand() -> None:
    # Two prompts of two responses; rewards right and form, weights 2 and 1. In a group of two that differ, the sample
    # std of a and b is |a - b| / sqrt 2, so their normalised rewards are +-1 / sqrt 2 = +-0.70711, whatever |a - b| is.
    #   prompt 0: right 1, 0      form 0, 10     S = 2 * 0.70711 - 0.70711 = 0.70711, and -0.70711
    #   prompt 1: right 0, 0      form 3, 1      S = 0 + 0.70711 = 0.70711, and -0.70711
    # std of S over the four: sqrt(4 * 0.5 / 3) = 0.81650; A = +-0.70711 / 0.81650 = +-0.86603
    rewards = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.0, 3.0], [0.0, 1.0]])
    advantages, returns = gdpo(inputs(rewards, [0, 0, 1, 1]), weights=(2.0, 1.0))
    assert_close(advantages[:, 0], torch.tensor([0.86603, -0.86603, 0.86603, -0.86603]), rtol=0, atol=1e-4)
    assert torch.equal(advantages[:, 0], advantages[:, 1]) and torch.equal(returns, advantages)


def test_the_first_scale_can_be_left_out() -> None:
    # centred only: right +-0.5, form -+5 and +-1: S = -4.5, 4.5, 1, -1; std sqrt((2 * 20.25 + 2) / 3) = 3.76386
    rewards = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.0, 3.0], [0.0, 1.0]])
    advantages, _ = gdpo(inputs(rewards, [0, 0, 1, 1]), norm_by_std=False)
    assert_close(advantages[:, 0], torch.tensor([-4.5, 4.5, 1.0, -1.0]) / 3.763863, rtol=1e-4, atol=1e-4)


def test_it_tells_apart_what_is_equal_in_sum() -> None:
    """Rewards (1, 0), (0, 1), (1, 0), (0, 0): the first two have one sum, and so grpo's advantages are equal. With
    another spread of one reward gdpo's are not, and it does not matter how large that reward is."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    sums = AdvantageInputs(rewards.sum(1, keepdim=True), torch.ones(4, 1, dtype=torch.bool),
                           group_ids=torch.zeros(4, dtype=torch.int64))  # fmt: skip
    summed, _ = grpo(sums)
    assert float(summed[0, 0]) == float(summed[1, 0])
    apart, _ = gdpo(inputs(rewards, [0] * 4))
    assert float(apart[1, 0]) - float(apart[0, 0]) > 0.1, "form is the rarer of the two"
    louder, _ = gdpo(inputs(rewards * torch.tensor([1.0, 100.0]), [0] * 4))
    assert_close(louder, apart, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10_000), st.booleans())
@PROPERTY
def test_equals_the_textbook(seed: int, scales: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(9, 3, generator=generator)
    groups, weights = [4, 4, 1, 1, 1, 7, 4, 7, 7], [1.0, 0.5, -2.0]
    advantages, _ = gdpo(inputs(rewards, groups), weights=weights, norm_by_std=scales)
    wanted = textbook(rewards.tolist(), groups, weights, scales)
    assert_close(advantages[:, 0], torch.tensor(wanted), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10_000), st.floats(-5, 5))
@PROPERTY
def test_order_padding_and_constants_of_a_group_change_nothing(seed: int, constant: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (8, 2), generator=generator).float()
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    want, _ = gdpo(inputs(rewards, groups.tolist()))
    order = torch.randperm(8, generator=generator)
    moved, _ = gdpo(inputs(rewards[order], groups[order].tolist()))
    assert_close(moved, want[order], rtol=1e-4, atol=1e-4)
    higher = rewards + constant * (groups == 1)[:, None] * torch.tensor([0.0, 1.0])
    found, _ = gdpo(inputs(higher, groups.tolist()))
    assert_close(found, want, rtol=1e-3, atol=1e-3)
    mask = torch.nn.functional.pad(torch.ones(8, 2, dtype=torch.bool), (0, 3))
    wide, _ = gdpo(inputs(rewards, groups.tolist(), mask))
    assert_close(wide[:, :2], want, rtol=0, atol=0)
    assert wide[:, 2:].eq(0).all()


def test_a_response_without_a_token_is_outside_groups_and_batch() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 2.0], [math.nan, math.nan], [3.0, 3.0], [4.0, 3.0]])
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[2] = False
    advantages, _ = gdpo(inputs(rewards, [0, 0, 0, 1, 1], mask), weights=[1.0, 0.25])
    kept = [0, 1, 3, 4]
    wanted = textbook([rewards[i].tolist() for i in kept], [0, 0, 1, 1], [1.0, 0.25])
    assert_close(advantages[kept, 0], torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert advantages[2].eq(0).all()


def test_a_group_of_equal_rewards_gets_exactly_nothing_whatever_the_lengths() -> None:
    mask = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
    rewards = torch.tensor([[0.1, 0.7], [0.1, 0.7], [1.0, 0.0], [0.0, 0.0]])
    advantages, _ = gdpo(inputs(rewards, [0, 0, 1, 1], mask))
    assert advantages[:2].eq(0).all() and float(advantages[2, 0]) > 0 > float(advantages[3, 0])
    nothing, _ = gdpo(inputs(torch.full((4, 2), 0.3), [0, 0, 1, 1], mask))
    assert nothing.eq(0).all()


def test_what_it_refuses() -> None:
    entry = ADVANTAGE_ESTIMATORS.get("gdpo")
    assert entry.spec.needs == ("group_ids", "named_rewards") and not entry.spec.whitened
    with pytest.raises(ConfigError, match=r"^n=1 with adv_estimator=gdpo: a group of one"):
        gdpo(inputs(torch.zeros(3, 2), [0, 0, 1]))
    with pytest.raises(ValueError, match="gdpo: 3 weights for 2 rewards"):
        gdpo(inputs(torch.zeros(2, 2), [0, 0]), weights=(1.0, 1.0, 1.0))
    mask = torch.ones(2, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gdpo needs AdvantageInputs\.named_rewards"):
        gdpo(AdvantageInputs(torch.zeros(2, 1), mask, group_ids=torch.zeros(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"named_rewards has shape \(3, 2\), expected \(2, K\)"):
        AdvantageInputs(torch.zeros(2, 1), mask, extras={"named_rewards": torch.zeros(3, 2)})


def test_rewards_that_cancel_leave_nothing_to_blow_up() -> None:
    rewards = torch.tensor([[0.3, -0.3], [0.1, -0.1], [0.7, -0.7]])
    x = AdvantageInputs(
        torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), group_ids=torch.zeros(3, dtype=torch.int64),
        extras={"named_rewards": rewards},
    )  # fmt: skip
    assert torch.equal(gdpo(x)[0], torch.zeros(3, 2))
