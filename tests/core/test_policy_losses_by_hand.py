"""Each policy loss on a few tokens whose numbers are worked out in the comments: value, gradient, statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.policy_losses import LossInputs
from tests.support.policy_losses import NAMES, gradient, loss_of, tokens


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def test_gpg_is_the_plain_policy_gradient() -> None:
    # log-probs -1 + ln 2 and -1 + ln 0.5; loss -A * log_prob, gradient -A whatever the ratio is
    x = tokens([2.0, 0.5], [3.0, -1.0])
    loss, stats = loss_of("gpg")(x)
    assert_close(loss, rows([-3.0 * (math.log(2) - 1), math.log(0.5) - 1]))
    assert_close(gradient(loss.sum(), x), rows([-3.0, 1.0]))
    assert_close(stats["ppo_kl"], rows([-math.log(2), math.log(2)]))
    assert_close(stats["ratio"], rows([2.0, 0.5]))


def test_cispo_clips_the_weight_and_loses_no_token() -> None:
    # range 0.7 .. 1.2. weights: 1.1 inside; 1.5 -> 1.2; 0.5 -> 0.7; 5 with a bad token -> 1.2
    x = tokens([1.1, 1.5, 0.5, 5.0], [2.0, 1.0, 1.0, -1.0])
    loss, stats = loss_of("cispo")(x)
    assert_close(gradient(loss.sum(), x), rows([-2.2, -1.2, -0.7, 1.2]))
    # value: -weight * A * log_prob, the first with log_prob ln 1.1 - 1
    assert_close(loss[0, 0], rows([-2.2 * (math.log(1.1) - 1)])[0, 0])
    assert stats["pg_clipfrac"].tolist() == [[0, 1, 1, 1]]
    only_above = loss_of("cispo", clip_ratio_low=1.0)
    assert_close(gradient(only_above(x)[0].sum(), x), rows([-2.2, -1.2, -0.5, 1.2]))


def test_sapo_fades_where_ppo_cuts() -> None:
    # loss -A * 4 / tau * sigmoid(tau * (r - 1)), gradient -A * r * 4 * s * (1 - s); tau 1 for good, 1.5 for bad tokens
    x = tokens([1.0, 2.0, 1.0, 3.0], [1.0, 1.0, -1.0, -1.0])
    loss, stats = loss_of("sapo")(x)
    # sigmoid(1) = 0.7310586, s * (1 - s) = 0.1966119; sigmoid(3) = 0.9525741, s * (1 - s) = 0.0451767
    assert_close(loss, rows([-2.0, -2.9242343, 4 / 1.5 * 0.5, 4 / 1.5 * 0.9525741]), rtol=1e-6, atol=0)
    want = rows([-1.0, -2 * 4 * 0.1966119, 1.0, 3 * 4 * 0.0451767])
    assert_close(gradient(loss.sum(), x), want, rtol=1e-5, atol=0)
    assert set(stats) == {"ppo_kl", "ratio"}


def test_sapos_gradient_fades_to_nothing_far_away() -> None:
    x = tokens([12.0, 12.0], [1.0, -1.0])
    found = gradient(loss_of("sapo")(x)[0].sum(), x)
    # 12 * 4 * e^-11 = 8e-4, and 12 * 4 * e^-16.5 = 3e-6 for the bad one, which fades faster
    assert_close(found, rows([-48 * math.exp(-11), 48 * math.exp(-16.5)]), rtol=1e-3, atol=0)


def test_gspo_clips_rows_by_their_geometric_mean() -> None:
    # row 0: ratios 2 and 0.5, s = 1: inside although each token is far out. loss -A, gradient -A * s
    x = tokens([2.0, 0.5], [3.0, 3.0])
    loss, stats = loss_of("gspo")(x)
    assert_close(loss, rows([-3.0, -3.0]))
    assert_close(gradient(loss.sum(), x), rows([-3.0, -3.0]))
    assert stats["pg_clipfrac"].tolist() == [[0, 0]]
    # ratios 4 and 1, s = 2: above 1.2, a good row stops counting, both tokens
    x = tokens([4.0, 1.0], [1.0, 1.0])
    loss, stats = loss_of("gspo")(x)
    assert_close(loss, rows([-1.2, -1.2]))
    assert not gradient(loss.sum(), x).any() and stats["pg_clipfrac"].tolist() == [[1, 1]]
    # a bad row grown likelier is pushed down with s = 2; one grown rarer, s = 0.5, is left at 0.9
    x = tokens([4.0, 1.0], [-1.0, -1.0])
    loss, stats = loss_of("gspo")(x)
    assert_close(loss, rows([2.0, 2.0]))
    assert_close(gradient(loss.sum(), x), rows([2.0, 2.0]))
    x = tokens([0.25, 1.0], [-1.0, -1.0])
    loss, stats = loss_of("gspo")(x)
    assert_close(loss, rows([0.9, 0.9]))
    assert not gradient(loss.sum(), x).any() and stats["pg_clipfrac"].tolist() == [[1, 1]]


def test_gspo_by_token_with_advantages_that_differ() -> None:
    # s = 1.1 for both; each token has its own advantage: gradient -A_t * s
    x = tokens([1.21, 1.0], [2.0, -1.0])
    loss, _ = loss_of("gspo")(x)
    assert_close(loss, rows([-2.2, 1.1]))
    assert_close(gradient(loss.sum(), x), rows([-2.2, 1.1]))


def test_gspo_weighs_rows_alike_whatever_their_length() -> None:
    # rows of 3 and 1 tokens, ratio 1, A = 1: each row has half of the gradient, a token of the long one a third of that
    mask = torch.tensor([[True, True, True], [True, False, False]])
    log_probs = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    x = LossInputs(log_probs, torch.zeros(2, 3), torch.ones(2, 3), mask)
    loss = aggregate(loss_of("gspo")(x)[0], mask, "seq-mean-token-mean", LossDenominators.of(mask))
    assert_close(gradient(loss, x), rows([-1 / 6, -1 / 6, -1 / 6], [-1 / 2, 0, 0]))


def test_geo_mean_clips_tokens_on_the_side_they_are_pushed_to() -> None:
    # A = 2, log-ratios 0.9 -> held at 0.4, -0.5 (free: it may come back), 0.1; their mean is 0. loss -2 * e^0
    x = tokens([math.exp(0.9), math.exp(-0.5), math.exp(0.1)], [2.0, 2.0, 2.0])
    loss, stats = loss_of("geo_mean")(x)
    assert_close(loss, rows([-2.0, -2.0, -2.0]))
    # the row's value is the mean, so its gradient at a free token is -2 / 3
    assert_close(gradient(loss.mean(), x), rows([0.0, -2 / 3, -2 / 3]))
    assert stats["pg_clipfrac"].tolist() == [[1, 0, 0]]
    # A = -1: 0.9 is free, -0.5 held at -0.3, mean of 0.9, -0.3, 0.0 is 0.2
    x = tokens([math.exp(0.9), math.exp(-0.5), 1.0], [-1.0, -1.0, -1.0])
    loss, stats = loss_of("geo_mean")(x)
    assert_close(loss, torch.full((1, 3), math.exp(0.2), dtype=torch.float64))
    assert_close(gradient(loss.mean(), x), rows([1.0, 0.0, 1.0]) * math.exp(0.2) / 3)
    assert stats["pg_clipfrac"].tolist() == [[0, 1, 0]]


def test_geo_mean_takes_the_mean_of_advantages_that_differ() -> None:
    # mean of 3 and -1 is 1: both tokens count as good, so 0.9 is held at 0.4 and -0.9 is free; e^-0.25
    x = tokens([math.exp(0.9), math.exp(-0.9)], [3.0, -1.0])
    loss, stats = loss_of("geo_mean")(x)
    assert_close(loss, torch.full((1, 2), -math.exp(-0.25), dtype=torch.float64))
    assert stats["pg_clipfrac"].tolist() == [[1, 0]]


def test_a_row_without_advantage_has_no_loss_and_counts_as_no_clip() -> None:
    x = tokens([5.0, 0.1], [0.0, 0.0])
    loss, stats = loss_of("geo_mean")(x)
    assert not loss.any() and not stats["pg_clipfrac"].any() and not gradient(loss.sum(), x).any()


# old probability 0.1 unless said otherwise; ranges: -0.1 and +0.15 of the probability, ratio at most 2
TV = [
    # (old, ratio, A, weight, clipped, held)
    (0.1, 1.5, 1.0, 1.5, 0, 0),  # 0.10 -> 0.15
    (0.1, 2.4, 1.0, 2.0, 0, 1),  # 0.10 -> 0.24: +0.14 is inside, but the ratio is held at 2
    (0.1, 2.6, 1.0, 0.0, 1, 0),  # +0.16
    (0.1, 2.6, -1.0, 2.0, 0, 1),  # a bad token grown likelier is pushed down
    (0.001, 50.0, 1.0, 2.0, 0, 1),  # a rare token: 0.001 -> 0.05 is no distance
    (0.8, 0.9, -1.0, 0.9, 0, 0),  # -0.08
    (0.8, 0.8, -1.0, 0.0, 1, 0),  # -0.16, where PPO's 0.2 would still train
    (0.8, 0.8, 1.0, 0.8, 0, 0),  # a good token grown rarer is pulled up
]


@pytest.mark.parametrize(("old", "ratio", "advantage", "weight", "clipped", "held"), TV)
def test_dppo_tv_bounds_probabilities(
    old: float, ratio: float, advantage: float, weight: float, clipped: int, held: int
) -> None:
    x = tokens([ratio], [advantage], old=math.log(old))
    loss, stats = loss_of("dppo_tv")(x)
    assert_close(gradient(loss.sum(), x), rows([-weight * advantage]))
    assert_close(loss, rows([-weight * advantage * math.log(old * ratio)]))
    assert stats["pg_clipfrac"].item() == clipped and stats["pg_clipfrac_lower"].item() == held


# D = q ln(q/p) + (1-q) ln((1-q)/(1-p)); ranges 0.03 and 0.05 nats
KL = [
    (0.5, 1.2, 1.0, 1.2, 0),  # 0.5 -> 0.6: 0.5 ln(5/6) + 0.5 ln(5/4) = 0.0204
    (0.5, 1.4, 1.0, 0.0, 1),  # 0.5 -> 0.7: 0.5 ln(5/7) + 0.5 ln(5/3) = 0.0872
    (0.5, 1.3, 1.0, 1.3, 0),  # 0.5 -> 0.65: 0.0472
    (0.5, 1.4, -1.0, 1.4, 0),  # going back is free
    (0.5, 0.75, -1.0, 0.0, 1),  # 0.5 -> 0.375: 0.0323 > 0.03
    (0.5, 0.8, -1.0, 0.8, 0),  # 0.5 -> 0.4: 0.0204
    (0.5, 0.6, 1.0, 0.6, 0),
    (0.001, 8.0, 1.0, 2.0, 0),  # 0.001 -> 0.008: 0.0049, the ratio is held at 2
]


@pytest.mark.parametrize(("old", "ratio", "advantage", "weight", "clipped"), KL)
def test_dppo_kl_bounds_the_divergence(old: float, ratio: float, advantage: float, weight: float, clipped: int) -> None:
    x = tokens([ratio], [advantage], old=math.log(old))
    loss, stats = loss_of("dppo_kl")(x)
    assert_close(gradient(loss.sum(), x), rows([-weight * advantage]))
    assert stats["pg_clipfrac"].item() == clipped


def test_dppo_stays_finite_for_a_certain_token() -> None:
    # probability 1 now and 0.5 before: 1 - p is 1e-8, D = 0.5 ln 0.5 + 0.5 ln(0.5 / 1e-8) = 8.5; and the reverse
    for new, old, advantage in ((0.0, math.log(0.5), 1.0), (math.log(0.5), 0.0, -1.0)):
        log_probs = torch.tensor([[new]], requires_grad=True)
        x = LossInputs(log_probs, torch.tensor([[old]]), torch.tensor([[advantage]]), torch.tensor([[True]]))
        for name in ("dppo_kl", "dppo_tv"):
            loss, stats = loss_of(name)(x)
            assert stats["pg_clipfrac"].item() == 1 and loss.item() == 0 and gradient(loss.sum(), x).item() == 0


def test_stats_carry_no_gradient_and_have_the_shape_of_the_tokens() -> None:
    for name in NAMES:
        x = tokens([1.5, 0.5, 1.0], [1.0, -1.0, 2.0])
        loss, stats = loss_of(name)(x)
        assert loss.shape == (1, 3) and {"ppo_kl", "ratio"} <= stats.keys()
        assert all(value.shape == (1, 3) and not value.requires_grad for value in stats.values()), name
