"""Estimators of groups: by hand, against loops over lists, and what must change nothing."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, grpo, grpo_passk, rloo
from steepest.errors import ConfigError
from tests.support.advantage_batches import (
    GROUPED,
    PROPERTY,
    Rows,
    estimate,
    lists_of,
    one_a_row,
    padded,
    random_rows,
    reordered,
)

every_estimator = pytest.mark.parametrize("name", GROUPED)


def first_column(name: str, x: AdvantageInputs, **options: float) -> list[float]:
    advantages, returns = estimate(name, x, **options)
    assert torch.equal(advantages, returns)
    return advantages[:, 0].tolist()


def test_rloo_by_hand() -> None:
    # 6 against (1 + 2) / 2 = 1.5 -> 4.5; 1 against (6 + 2) / 2 = 4 -> -3; 2 against (6 + 1) / 2 = 3.5 -> -1.5
    assert first_column("rloo", one_a_row([6.0, 1.0, 2.0])) == [4.5, -3.0, -1.5]


def test_opo_by_hand() -> None:
    # lengths 1, 3, 4: b = (1 * 8 + 3 * 0 + 4 * 2) / 8 = 2 -> 6, -2, 0; the plain mean would be 10 / 3
    x = one_a_row([8.0, 0.0, 2.0], lengths=[1, 3, 4])
    assert first_column("opo", x) == [6.0, -2.0, 0.0]


def test_opo_counts_policy_tokens_only() -> None:
    # the second row's five columns hold two policy tokens: b = (2 * 3 + 2 * 1) / 4 = 2 -> 1, -1
    t, f, n = True, False, math.nan
    x = AdvantageInputs(
        torch.tensor([[0.0, 3.0, n, n, n], [0.0, n, n, n, 1.0]]),
        torch.tensor([[t, t, f, f, f], [t, f, f, f, t]]),
        group_ids=torch.tensor([0, 0]),
    )
    assert estimate("opo", x)[0].tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0, -1.0]]


def test_gpg_by_hand() -> None:
    # groups 1: 0 and 1, mean 0.5; 2: both 1; 3: both 0. Two rows of six have a gradient: alpha = 6 / 2 = 3
    #   3 * -0.5 = -1.5, 3 * 0.5 = 1.5. By verl's count of rewards that are not 0, three, alpha were 2.
    x = one_a_row([0.0, 1.0, 1.0, 1.0, 0.0, 0.0], [1, 1, 2, 2, 3, 3])
    assert first_column("gpg", x) == [-1.5, 1.5, 0.0, 0.0, 0.0, 0.0]


def test_gpg_without_a_group_that_differs_is_zero() -> None:
    assert first_column("gpg", one_a_row([1.0, 1.0, 0.0, 0.0], [1, 1, 2, 2])) == [0.0] * 4


def test_gpg_rows_without_tokens_count_in_neither_number() -> None:
    # rows with tokens: 0, 2 | 1, 1. alpha = 4 / 2 = 2: 2 * -1, 2 * 1; with the fifth and sixth row it were 6 / 3
    x = one_a_row([0.0, 2.0, 1.0, 1.0, 9.0, 9.0], [1, 1, 2, 2, 2, 1], lengths=[1, 1, 1, 1, 0, 0])
    assert first_column("gpg", x) == [-2.0, 2.0, 0.0, 0.0, 0.0, 0.0]


def test_grpo_passk_by_hand() -> None:
    # the best leads by 5 - 3 = 2; without std that is all
    assert first_column("grpo_passk", one_a_row([3.0, 5.0, 1.0]), norm_by_std=False) == [0.0, 2.0, 0.0]
    # deviations 0, 2, -2; variance 8 / 2 = 4; std 2: 2 / 2 = 1; with eps 2: 2 / 4
    assert first_column("grpo_passk", one_a_row([3.0, 5.0, 1.0])) == pytest.approx([0.0, 1.0, 0.0], rel=1e-5)
    assert first_column("grpo_passk", one_a_row([3.0, 5.0, 1.0]), eps=2.0) == pytest.approx([0.0, 0.5, 0.0])


def test_grpo_passk_of_two_best_none_leads() -> None:
    assert first_column("grpo_passk", one_a_row([5.0, 5.0, 1.0])) == [0.0, 0.0, 0.0]


def test_grpo_passk_second_best_may_be_below_zero() -> None:
    assert first_column("grpo_passk", one_a_row([-7.0, -3.0, -4.0]), norm_by_std=False) == [0.0, 1.0, 0.0]


def test_grpo_passk_is_the_difference_that_the_best_makes_to_the_maximum() -> None:
    # the paper's idea: what the group's maximum would lose without this response
    scores = [0.25, 2.0, -1.0, 1.5]
    want = [max(scores) - max(scores[:i] + scores[i + 1 :]) for i in range(4)]
    assert first_column("grpo_passk", one_a_row(scores), norm_by_std=False) == want


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    # means 2 and 20; nothing is divided, the batch's scale comes with whitening
    x = one_a_row([1.0, 3.0, 10.0, 30.0], [1, 1, 2, 2])
    assert first_column("reinforce_plus_plus_baseline", x) == [-1.0, 1.0, -10.0, 10.0]


def _rloo(rows: Rows, i: int) -> float:
    others = [rows.scores[j] for j in rows.members(i) if j != i]
    return rows.scores[i] - sum(others) / len(others) if others else 0.0


def _opo(rows: Rows, i: int) -> float:
    drawn = [rows.scores[j] for j in rows.members(i) for _ in range(rows.lengths[j])]  # each reward once a token
    return rows.scores[i] - statistics.fmean(drawn)


def _centred(rows: Rows, i: int) -> float:
    return rows.scores[i] - statistics.fmean(rows.scores[j] for j in rows.members(i))


def _std(rows: Rows, i: int) -> float:
    scores = [rows.scores[j] for j in rows.members(i)]
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def _gpg(rows: Rows, i: int) -> float:
    counted = [j for j in range(len(rows.ids)) if rows.lengths[j]]
    taught = [j for j in counted if len({rows.scores[k] for k in rows.members(j)}) > 1]
    return len(counted) / max(len(taught), 1) * _centred(rows, i)


def _passk(rows: Rows, i: int) -> float:
    others = [rows.scores[j] for j in rows.members(i) if j != i]
    lead = max(0.0, rows.scores[i] - max(others)) if others else 0.0
    return lead / (_std(rows, i) + 1e-6)


TEXTBOOK: dict[str, Callable[[Rows, int], float]] = {
    "grpo": lambda rows, i: _centred(rows, i) / (_std(rows, i) + 1e-6),
    "rloo": _rloo,
    "opo": _opo,
    "gpg": _gpg,
    "grpo_passk": _passk,
    "reinforce_plus_plus_baseline": _centred,
}


@every_estimator
@given(seed=st.integers(0, 10_000))
@PROPERTY
def test_equals_the_textbook(name: str, seed: int) -> None:
    x = random_rows(seed)
    rows, (advantages, returns) = lists_of(x), estimate(name, x)
    for i, mask in enumerate(x.response_mask):
        want = torch.full((rows.lengths[i],), TEXTBOOK[name](rows, i) if rows.lengths[i] else 0.0)
        assert_close(advantages[i][mask], want, rtol=1e-5, atol=1e-5)
        assert not advantages[i][~mask].any()
    assert torch.equal(advantages, returns)


@every_estimator
@given(seed=st.integers(0, 10_000), num_pad=st.integers(0, 3))
@PROPERTY
def test_ignores_order_names_padding_and_a_constant_added_to_a_group(name: str, seed: int, num_pad: int) -> None:
    x = random_rows(seed)
    assert x.group_ids is not None
    want, _ = estimate(name, x)
    order = torch.randperm(len(want), generator=torch.Generator().manual_seed(seed))
    assert_close(estimate(name, reordered(x, order))[0], want[order], rtol=1e-5, atol=1e-5)
    renamed = AdvantageInputs(x.token_level_rewards, x.response_mask, group_ids=-5 * x.group_ids)
    assert_close(estimate(name, renamed)[0], want, rtol=1e-5, atol=1e-5)
    wider, _ = estimate(name, padded(x, num_pad))
    assert_close(wider[:, : want.shape[1]], want, rtol=1e-5, atol=1e-5)
    assert not wider[:, want.shape[1] :].any()
    raised = x.token_level_rewards.clone()
    first = x.response_mask.to(torch.uint8).argmax(1)
    raised[torch.arange(9), first] += torch.where(x.group_ids == 9, 16.0, 0.0)
    moved = AdvantageInputs(raised, x.response_mask, group_ids=x.group_ids)
    assert_close(estimate(name, moved)[0], want, rtol=1e-4, atol=1e-4)


@every_estimator
@pytest.mark.parametrize("reward", [0.1, -1e6 / 3, 1e-7])
def test_equal_rewards_give_exactly_zero(name: str, reward: float) -> None:
    advantages, _ = estimate(name, one_a_row([reward] * 7, lengths=[1, 2, 3, 4, 5, 6, 7]))
    assert torch.equal(advantages, torch.zeros_like(advantages))


@every_estimator
def test_a_group_of_one_is_refused(name: str) -> None:
    text = rf"^n=1 with adv_estimator={name}: a group of one has no baseline.*Use n >= 2"
    with pytest.raises(ConfigError, match=text):
        estimate(name, one_a_row([1.0, 0.0, 1.0], [0, 0, 1]))
    with pytest.raises(ValueError, match=rf"{name} needs AdvantageInputs\.group_ids"):
        estimate(name, AdvantageInputs(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)))


@every_estimator
def test_one_row_left_of_a_group_gives_zero(name: str) -> None:
    advantages, _ = estimate(name, one_a_row([3.0, 5.0], lengths=[2, 0]))
    assert torch.equal(advantages, torch.zeros_like(advantages))


@every_estimator
def test_carries_no_gradient(name: str) -> None:
    x = one_a_row([3.0, 5.0])
    x.token_level_rewards.requires_grad_()
    assert not estimate(name, x)[0].requires_grad


def expected_gradient(name: str, probs: list[float], rewards: list[float], n: int, **options: float) -> list[float]:
    """E of (1 / n) sum_i A_i * d log p(a_i) / d logits over all draws of n actions, written out."""
    total = [0.0] * len(probs)
    for draw in itertools.product(range(len(probs)), repeat=n):
        chance = math.prod(probs[a] for a in draw)
        advantages = first_column(name, one_a_row([rewards[a] for a in draw]), **options)
        for a, advantage in zip(draw, advantages, strict=True):
            for k, p in enumerate(probs):
                total[k] += chance * advantage * ((k == a) - p) / n
    return total


def test_rloo_is_unbiased_and_grpo_without_std_shrinks() -> None:
    # the gradient of J = sum p_a r_a with respect to logit k is p_k * (r_k - J)
    probs, rewards = [0.5, 0.3, 0.2], [1.0, 0.0, 4.0]
    value = sum(p * r for p, r in zip(probs, rewards, strict=True))
    true = [p * (r - value) for p, r in zip(probs, rewards, strict=True)]
    assert expected_gradient("rloo", probs, rewards, 3) == pytest.approx(true, abs=1e-6)
    # its mean holds the row itself, a third of which it takes away
    shrunk = [2 / 3 * g for g in true]
    assert expected_gradient("grpo", probs, rewards, 3, norm_by_std=False) == pytest.approx(shrunk, abs=1e-6)


def test_grpo_passk_is_the_gradient_of_the_best_of_k() -> None:
    # J_k = E of the maximum of k draws; its gradient by finite differences of the enumeration
    rewards, k = [1.0, 0.0, 4.0], 3

    def best_of_k(logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(0)
        draws = list(itertools.product(range(3), repeat=k))
        return torch.stack([p[list(d)].prod() * max(rewards[a] for a in d) for d in draws]).sum()

    logits = torch.tensor([0.5, 0.3, 0.2]).log().requires_grad_()
    best_of_k(logits).backward()
    assert logits.grad is not None
    found = expected_gradient("grpo_passk", [0.5, 0.3, 0.2], rewards, k, norm_by_std=False)
    assert [k * g for g in found] == pytest.approx(logits.grad.tolist(), abs=1e-6)  # the loss's mean divides by k


def test_opo_is_the_weighted_least_squares_baseline() -> None:
    scores, lengths = [8.0, 0.0, 2.0, 5.0], [1, 3, 4, 2]
    spread = [a**2 * n for a, n in zip(first_column("opo", one_a_row(scores, lengths=lengths)), lengths, strict=True)]
    for shift in (-0.1, 0.1):
        advantages = first_column("opo", one_a_row(scores, lengths=lengths))
        other = sum((a + shift) ** 2 * n for a, n in zip(advantages, lengths, strict=True))
        assert sum(spread) < other


def test_what_they_declare() -> None:
    for name in GROUPED:
        spec = ADVANTAGE_ESTIMATORS.get(name).spec
        assert spec.needs == ("group_ids",)
        assert spec.whitened == (name == "reinforce_plus_plus_baseline")
    assert [ADVANTAGE_ESTIMATORS.get(n).value for n in ("grpo", "grpo_passk", "rloo")] == [grpo, grpo_passk, rloo]
