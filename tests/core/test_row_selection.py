"""Length penalty, groups that differ, PF-PPO's draw and Monte-Carlo returns: by hand, by loops, by properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.core.advantages import AdvantageInputs, gae
from steepest.core.row_selection import (
    PF_PPO_METHODS,
    draw_rows,
    in_varied_groups,
    monte_carlo_returns,
    overlong_penalty,
    pf_ppo_weights,
)
from steepest.errors import ConfigError

NAN = math.nan


def test_the_length_penalty_by_hand():
    # limit 20, buffer 4: nothing up to 16, then a quarter more each token
    lengths = torch.tensor([1, 15, 16, 17, 18, 19, 20])
    assert overlong_penalty(lengths, max_length=20, buffer=4, factor=1.0).tolist() == [
        0, 0, 0, -0.25, -0.5, -0.75, -1.0,
    ]  # fmt: skip
    assert overlong_penalty(lengths, max_length=20, buffer=4, factor=0.5).tolist()[-2:] == [-0.375, -0.5]
    assert overlong_penalty(torch.tensor([30]), max_length=20, buffer=4, factor=1.0).tolist() == [-1.0], "never more"
    # a buffer of the whole length punishes each token
    assert overlong_penalty(torch.tensor([1, 10, 20]), max_length=20, buffer=20, factor=1.0).tolist() == pytest.approx(
        [-0.05, -0.5, -1.0]
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 50), st.integers(0, 49))
def test_the_length_penalty_is_the_papers_three_cases(length, max_length, before):
    buffer = max(1, max_length - before)
    length = min(length, max_length)
    expected = 0.0 if length <= max_length - buffer else ((max_length - buffer) - length) / buffer
    found = overlong_penalty(torch.tensor([length]), max_length=max_length, buffer=buffer, factor=1.0)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_groups_that_differ_by_hand():
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5, NAN, 1.0, 0.0])
    groups = torch.tensor([7, 7, 3, 3, 5, 5, 9, 9])
    counted = torch.tensor([True, True, True, True, True, False, False, False])
    # 7: 1 and 0. 3: equal. 5: one counted response. 9: none
    assert in_varied_groups(scores, groups, counted).tolist() == [True, True] + [False] * 6


def test_equal_scores_whose_deviation_is_no_zero_are_equal():
    # Trap 12: the standard deviation of three times 0.1 is 1e-9 in float32
    scores = torch.full((3,), 0.1)
    assert not bool(in_varied_groups(scores, torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)).any())
    assert in_varied_groups(
        torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
    ).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_groups_that_differ_are_the_textbook_sets_in_any_order(rows):
    scores, groups, counted = (torch.tensor([row[i] for row in rows]) for i in range(3))
    found = in_varied_groups(scores, groups, counted)
    for i, (_, group, _) in enumerate(rows):
        assert bool(found[i]) == (len({s for s, g, c in rows if g == group and c}) > 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
    assert torch.equal(in_varied_groups(scores[order], groups[order] * 10, counted[order]), found[order])
    assert torch.equal(in_varied_groups(scores + 4.0, groups, counted), found)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("pow", [9.0, 0.25, 0.0, 1.0, 0.0]),  # |3|^2, |1/2|^2, 0, |-1|^2
        ("max_min", [1.0, 0.0, 0.0, 1.0, 0.0]),
        ("max_random", [0.4, 0.1, 0.1, 0.1, 0.0]),
    ],
)
def test_pf_ppo_weights_by_hand(method, expected):
    scores, counted = torch.tensor([3.0, 0.5, 0.0, -1.0, NAN]), torch.tensor([True, True, True, True, False])
    found = pf_ppo_weights(scores, counted, method=method, weight_pow=2.0)
    assert found.tolist() == pytest.approx(expected)


def test_an_odd_power_takes_the_size_of_a_score_too():
    scores, counted = torch.tensor([3.0, -2.0]), torch.ones(2, dtype=torch.bool)
    assert pf_ppo_weights(scores, counted, method="pow", weight_pow=1.0).tolist() == [3.0, 2.0]
    assert pf_ppo_weights(scores, counted, method="pow", weight_pow=3.0).tolist() == [27.0, 8.0]


def test_pf_ppo_where_nothing_scored():
    zeros, counted = torch.zeros(3), torch.tensor([True, False, True])
    assert pf_ppo_weights(zeros, counted, method="pow").tolist() == [1.0, 0.0, 1.0]
    for method in PF_PPO_METHODS:
        assert pf_ppo_weights(zeros, torch.zeros(3, dtype=torch.bool), method=method).tolist() == [0.0] * 3
    with pytest.raises(ConfigError, match="reweight_method='max': no such method. Known: pow, max_min, max_random"):
        pf_ppo_weights(zeros, counted, method="max")


def test_rows_are_drawn_by_their_weights_and_by_the_seed_alone():
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0])
    counts = torch.zeros(4)
    for seed in range(1000):
        rows = draw_rows(weights, seed)
        assert len(rows) == 4 and rows.tolist() == sorted(rows.tolist())
        counts += torch.bincount(rows, minlength=4)
    # 4000 draws: expected 0, 1000, 3000, 0, standard deviation 27
    assert counts[0] == counts[3] == 0 and abs(float(counts[1]) - 1000) < 110
    assert torch.equal(draw_rows(weights, 5), draw_rows(weights, 5))
    draws = [draw_rows(torch.ones(8), seed).tolist() for seed in range(20)]
    assert len({tuple(draw) for draw in draws}) > 10
    torch.manual_seed(0)
    assert [draw_rows(torch.ones(8), seed).tolist() for seed in range(20)] == draws
    assert draw_rows(torch.zeros(3), 1).tolist() == [0, 1, 2]


def test_monte_carlo_returns_by_hand():
    # gamma 1/2, a tool token between: 1 + (2 + 4 / 2) / 2 = 3
    rewards = torch.tensor([[1.0, NAN, 2.0, 4.0, math.inf], [NAN, NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    assert monte_carlo_returns(rewards, mask, gamma=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0], [0.0] * 5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.9]))
def test_monte_carlo_returns_are_those_of_gae_at_lambda_1_whatever_the_critic_says(seed, gamma):
    draw = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 4, 7, generator=draw)
    mask = torch.rand(4, 7, generator=draw) < 0.7
    _, returns = gae(AdvantageInputs(rewards, mask, values=values), gamma=gamma, lam=1.0)
    found = monte_carlo_returns(rewards, mask, gamma=gamma)
    torch.testing.assert_close(found, torch.where(mask, returns, 0.0), atol=1e-5, rtol=1e-5)
