"""Estimates, intervals and the paired test, by hand and against simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.trainer.run.statistics import Answered, compare, majority_at, mean_at, pass_at, summary


def groups(*rows: tuple[float, ...]) -> list[Answered]:
    return [Answered(row, tuple("right" if a >= 1 else f"wrong {i}" for i, a in enumerate(row))) for row in rows]


def test_wilsons_interval_of_greedy_answers():
    """8 of 10 right: the example of Wilson's interval in the textbooks, 0.4902 to 0.9433."""
    found = mean_at(groups(*[(1.0,)] * 8, *[(0.0,)] * 2))
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.8, 0.4902, 0.9433)
    none = mean_at(groups(*[(0.0,)] * 20))
    assert none.value == none.low == 0.0 and none.high == pytest.approx(0.1611, abs=1e-4)


def test_the_interval_is_over_prompts():
    """Eight equal answers to a prompt are one observation."""
    same = mean_at(groups((1.0,) * 8, (1.0,) * 8, (0.0,) * 8, (0.0,) * 8))
    assert (same.low, same.high) == pytest.approx((0.15, 0.85), abs=5e-3)  # Wilson's of 2 of 4
    mixed = mean_at(groups((1.0, 0.0), (0.0, 0.0), (1.0, 1.0)))
    # variance 1/6 between the three prompts: 3 * 0.25 / (1/6) = 4.5 observations of a right-or-wrong answer
    assert (mixed.value, mixed.low, mixed.high) == pytest.approx((0.5, 0.1607, 0.8393), abs=1e-4)
    scores = mean_at(groups((-1.0,), (3.0,)))  # no shares: mean +- 1.96 * 2 / sqrt(2)
    assert (scores.low, scores.high) == pytest.approx((1 - 2.7718, 1 + 2.7718), abs=1e-3)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(right, data):
    k = data.draw(st.integers(1, len(right)))
    chosen = list(itertools.combinations(right, k))
    want = sum(any(one) for one in chosen) / len(chosen)
    assert pass_at(groups(tuple(map(float, right))), k).value == pytest.approx(want)


def test_the_majority_counts_answers_not_accuracies():
    found = majority_at([Answered((0.0, 1.0, 0.0), ("7", "8", "7")), Answered((1.0, 0.0), ("8", "7"))])
    assert found.value == 0.5


def test_what_n_responses_allow():
    assert list(summary(groups((1.0,)))) == ["mean@1"]
    assert list(summary(groups((1.0,) * 6))) == ["mean@6", "pass@2", "pass@4", "pass@6", "maj@6"]


def test_mcnemars_test_by_hand():
    """6 better, 1 worse: 2 * (1 + 7) / 2^7."""
    before, after = [(0.0,)] * 6 + [(1.0,)] * 5, [(1.0,)] * 6 + [(0.0,)] + [(1.0,)] * 4
    found = compare(groups(*before), groups(*after))
    assert (found.better, found.worse, found.test) == (6, 1, "McNemar, exact")
    assert found.p_value == pytest.approx(16 / 128) and found.difference.value == pytest.approx(5 / 11)
    equal = compare(groups(*before), groups(*before))
    assert (equal.p_value, equal.better, equal.worse, equal.difference.value) == (1.0, 0, 0, 0.0)


def test_sign_flips_where_accuracies_are_shares():
    """Four prompts, each better by a half: 2 of 16 sign changes give as large a mean."""
    found = compare(groups(*[(0.0, 0.0)] * 4), groups(*[(1.0, 0.0)] * 4))
    assert found.test == "sign flips, 10,000 draws" and found.p_value == pytest.approx(2 / 16, abs=0.015)


def test_the_interval_covers_the_truth():
    """Of 400 evaluations of a model that is right on 30 % of the prompts, about 95 % have 0.3 inside."""
    draws = np.random.default_rng(1).random((400, 50)) < 0.3
    found = [mean_at(groups(*[(float(one),) for one in row])) for row in draws]
    assert 0.92 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.98
