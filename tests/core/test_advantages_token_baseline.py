"""The optimal token baseline: by hand, against loops over places, and what its weight and its baseline are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, optimal_token_baseline
from steepest.errors import ConfigError
from tests.support.advantage_batches import PROPERTY, Rows, lists_of, padded, random_rows, reordered

T, F, N = True, False, math.nan


def inputs(rewards: Tensor, mask: Tensor, energy: Tensor, ids: list[int] | None = None) -> AdvantageInputs:
    """w_t as given: pi = 1/2 has 1 - 2 pi = 0, so the sum of squares is w itself."""
    old = torch.full_like(rewards, math.log(0.5)).masked_fill(~mask, N)
    group_ids = torch.tensor(ids or [4] * len(rewards))
    return AdvantageInputs(rewards, mask, group_ids=group_ids, old_log_probs=old, extras={"sum_pi_squared": energy})


def test_by_hand() -> None:
    # G: 4 4 | 0 0.   w: 0.5 0.5 | 1 0.5, so W: 0.5 1 | 1.5 would start at 1: 1 1.5
    #   t=0: b = (0.5 * 4 + 1 * 0) / 1.5 = 4/3 -> 8/3, -4/3       t=1: b = (1 * 4 + 1.5 * 0) / 2.5 = 1.6 -> 2.4, -1.6
    x = inputs(
        torch.tensor([[0.0, 4.0], [0.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool), torch.tensor([[0.5, 0.5], [1, 0.5]])
    )
    advantages, returns = optimal_token_baseline(x)
    assert_close(advantages, torch.tensor([[8 / 3, 2.4], [-4 / 3, -1.6]]))
    assert returns.tolist() == [[4.0, 4.0], [0.0, 0.0]]


def test_where_one_row_goes_on_alone_its_return_is_the_advantage() -> None:
    # t=0: W 1, 1 and G 6, 2 -> b = 4: 2 and -2.  t=1, 2: the first row alone: G = 6 and 5
    x = inputs(
        torch.tensor([[0.0, 1.0, 5.0], [2.0, N, N]]),
        torch.tensor([[T, T, T], [T, F, F]]),
        torch.tensor([[1.0, 1.0, 1.0], [1.0, N, N]]),
    )
    assert_close(optimal_token_baseline(x)[0], torch.tensor([[2.0, 6.0, 5.0], [-2.0, 0.0, 0.0]]))


def test_a_row_left_alone_in_its_group_gets_zero() -> None:
    x = inputs(torch.tensor([[0.0, 5.0], [N, N]]), torch.tensor([[T, T], [F, F]]), torch.tensor([[1.0, 1.0], [N, N]]))
    advantages, returns = optimal_token_baseline(x)
    assert not advantages.any() and returns.tolist() == [[5.0, 5.0], [0.0, 0.0]]


def test_places_count_policy_tokens() -> None:
    # as in the test by hand, the first row with tool output between its tokens
    x = inputs(
        torch.tensor([[0.0, N, 4.0], [0.0, 0.0, N]]),
        torch.tensor([[T, F, T], [T, T, F]]),
        torch.tensor([[0.5, N, 0.5], [1.0, 0.5, N]]),
    )
    advantages, returns = optimal_token_baseline(x)
    assert_close(advantages, torch.tensor([[8 / 3, 0.0, 2.4], [-4 / 3, -1.6, 0.0]]))
    assert returns.tolist() == [[4.0, 0.0, 4.0], [0.0, 0.0, 0.0]]


def test_importance_weights_enter_squared() -> None:
    # W 1 and 1, rho 1 and 2: b = (1 * 5 + 4 * 0) / 5 = 1
    x = inputs(torch.tensor([[5.0], [0.0]]), torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1))
    assert_close(optimal_token_baseline(x)[0], torch.tensor([[2.5], [-2.5]]))
    weighted = replace(x, rollout_is_weights=torch.tensor([[1.0], [2.0]]))
    assert_close(optimal_token_baseline(weighted)[0], torch.tensor([[4.0], [-1.0]]))


def test_certain_tokens_weigh_nothing_and_never_less() -> None:
    # pi = 1: w = 1 - 2 + 1 = 0. Rounding may leave less; then W would change sides. Without any weight b is 0.
    x = AdvantageInputs(
        torch.tensor([[5.0], [1.0]]),
        torch.ones(2, 1, dtype=torch.bool),
        group_ids=torch.tensor([0, 0]),
        old_log_probs=torch.zeros(2, 1),
        extras={"sum_pi_squared": torch.tensor([[1.0], [1.0 - 1e-3]])},
    )
    assert optimal_token_baseline(x)[0].tolist() == [[5.0], [1.0]]


def textbook(rows: Rows, i: int) -> list[float]:
    """Row i's advantages, each sum written out."""

    def to_go(j: int, t: int) -> float:
        return sum(rows.rewards[j][t:])

    def energy(j: int, t: int) -> float:
        return sum(1 - 2 * math.exp(rows.old[j][k]) + rows.squares[j][k] for k in range(t + 1))

    if len(rows.members(i)) < 2:
        return [0.0] * rows.lengths[i]
    out = []
    for t in range(rows.lengths[i]):
        there = [j for j in rows.members(i) if rows.lengths[j] > t]
        total = sum(energy(j, t) for j in there)
        baseline = sum(energy(j, t) * to_go(j, t) for j in there) / (total + 1e-8) if len(there) > 1 else 0.0
        out.append(to_go(i, t) - baseline)
    return out


@given(seed=st.integers(0, 10_000), num_pad=st.integers(0, 3))
@PROPERTY
def test_equals_the_textbook_whatever_padding_and_order(seed: int, num_pad: int) -> None:
    x = random_rows(seed)
    rows, (advantages, returns) = lists_of(x), optimal_token_baseline(x)
    for i, mask in enumerate(x.response_mask):
        assert_close(advantages[i][mask], torch.tensor(textbook(rows, i)), rtol=1e-4, atol=1e-4)
        assert not advantages[i][~mask].any() and not returns[i][~mask].any()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    assert_close(optimal_token_baseline(reordered(x, order))[0], advantages[order], rtol=1e-5, atol=1e-5)
    wider, _ = optimal_token_baseline(padded(x, num_pad))
    assert_close(wider[:, :6], advantages, rtol=1e-5, atol=1e-5)
    assert not wider[:, 6:].any()


def test_the_weight_is_the_squared_gradient_of_the_log_prob() -> None:
    # a fair start and a loaded second row: b = W-weighted mean, W from autograd on the logits
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    chosen = log_p[torch.arange(2), torch.tensor([1, 2])]
    (gradient,) = torch.autograd.grad(chosen.sum(), logits)
    weight = gradient.square().sum(-1)
    rewards = torch.tensor([[3.0], [-1.0]])
    x = AdvantageInputs(
        rewards,
        torch.ones(2, 1, dtype=torch.bool),
        group_ids=torch.tensor([0, 0]),
        old_log_probs=chosen.detach().float()[:, None],
        extras={"sum_pi_squared": log_p.detach().exp().square().sum(-1).float()[:, None]},
    )
    want = rewards - float((weight * rewards[:, 0]).sum() / weight.sum())
    assert_close(optimal_token_baseline(x)[0], want, rtol=1e-5, atol=1e-5)


def test_refusals_and_needs() -> None:
    x = random_rows(0)
    assert x.group_ids is not None
    with pytest.raises(ConfigError, match=r"^n=1 with adv_estimator=optimal_token_baseline: a group of one"):
        optimal_token_baseline(replace(x, group_ids=torch.arange(9)))
    needs = ADVANTAGE_ESTIMATORS.get("optimal_token_baseline").spec.needs
    assert needs == ("group_ids", "old_log_probs", "sum_pi_squared")
    for name in needs[:2]:
        with pytest.raises(ValueError, match=rf"optimal_token_baseline needs AdvantageInputs\.{name}"):
            optimal_token_baseline(replace(x, **{name: None}))
        with pytest.raises(ValueError, match=rf"AdvantageInputs\.{name} has shape \(9, 6, 1\)|\(9, 1\), expected \(9,"):
            replace(x, **{name: getattr(x, name)[..., None]})
    with pytest.raises(ValueError, match=r"optimal_token_baseline needs AdvantageInputs\.sum_pi_squared"):
        optimal_token_baseline(replace(x, extras={}))
    with pytest.raises(ValueError, match=r"AdvantageInputs\.sum_pi_squared has shape \(9, 6, 1\), expected \(9, 6\)"):
        replace(x, extras={"sum_pi_squared": x.extras["sum_pi_squared"][..., None]})


def test_carries_no_gradient() -> None:
    x = random_rows(0)
    assert x.old_log_probs is not None
    old = x.old_log_probs.clone().requires_grad_()
    assert not optimal_token_baseline(replace(x, old_log_probs=old))[0].requires_grad
