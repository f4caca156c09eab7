"""Clip-Cov and KL-Cov: which tokens are chosen, by loops over the whole mini-batch, and that parts of it agree."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.policy_losses import POLICY_LOSSES, LossInputs, choose_clip_cov, choose_kl_cov, covariances
from tests.support.policy_losses import OPTIONS, gradient, loss_of, random_inputs, tokens

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def choice(name: str, x: LossInputs, **options: float) -> Tensor:
    if name == "kl_cov":
        return choose_kl_cov(x, kl_cov_ratio=options.get("kl_cov_ratio", OPTIONS[name]["kl_cov_ratio"]))
    return choose_clip_cov(x, **{**OPTIONS[name], **options})


def four_tokens() -> LossInputs:
    """log-probs -1, -2, -3, -2 (mean -2) and A 3, 1, -1, -3 (mean 0); ratio 1. Covariances 3, 0, 1, 0."""
    log_probs = torch.tensor([[-1.0, -2.0], [-3.0, -2.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[3.0, 1.0], [-1.0, -3.0]], dtype=torch.float64)
    return LossInputs(log_probs, log_probs.detach(), advantages, torch.ones(2, 2, dtype=torch.bool))


def test_covariances_by_hand() -> None:
    found = covariances(four_tokens())
    assert_close(found, torch.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
    assert not found.requires_grad


@given(st.integers(0, 10_000))
@PROPERTY
def test_covariances_are_those_of_the_true_tokens(seed: int) -> None:
    x = random_inputs(seed)
    at = [(i, t) for i in range(5) for t in range(6) if x.response_mask[i, t]]
    mean_log_prob = fmean(x.log_probs[i, t].item() for i, t in at)
    mean_advantage = fmean(x.advantages[i, t].item() for i, t in at)
    found = covariances(x)
    for i, t in at:
        want = (x.log_probs[i, t].item() - mean_log_prob) * (x.advantages[i, t].item() - mean_advantage)
        assert found[i, t].item() == pytest.approx(want)
    assert not found[~x.response_mask].any()


def test_kl_cov_penalises_the_largest_by_hand() -> None:
    x = four_tokens()
    # 0.5 of four tokens: the covariances 3 and 1; 0.2 of four is less than one token, and one is taken
    assert choice("kl_cov", x, kl_cov_ratio=0.5).tolist() == [[True, False], [True, False]]
    assert choice("kl_cov", x, kl_cov_ratio=0.2).tolist() == [[True, False], [False, False]]
    # old log-probs such that the ratios are 2, 1, 0.5, 1; penalty 0.7 * ln 2 on the first and the third
    log2 = torch.tensor(2.0).double().log()
    moved = replace(x, old_log_probs=x.log_probs.detach() - torch.tensor([[1.0, 0.0], [-1.0, 0.0]]) * log2)
    loss, stats = loss_of("kl_cov", kl_cov_ratio=0.5)(moved)
    assert_close(
        loss, torch.tensor([[-6.0, -1.0], [0.5, 3.0]], dtype=torch.float64) + 0.7 * log2 * torch.tensor([[1, 0]] * 2)
    )
    # gradient -A * ratio, and 0.7 toward the old policy: down for the token that grew, up for the one that shrank
    want = torch.tensor([[-6.0 + 0.7, -1.0], [0.5 - 0.7, 3.0]], dtype=torch.float64)
    assert_close(gradient(loss.sum(), moved), want)
    assert stats["cov_klfrac"].tolist() == [[1, 0], [1, 0]]


def test_kl_covs_penalty_does_not_push_at_rounding() -> None:
    x = tokens([math.exp(9e-5), math.exp(-2e-4)], [1.0, 1.0])
    loss, _ = loss_of("kl_cov", kl_cov_ratio=1.0)(x)
    assert_close(loss, torch.tensor([[-math.exp(9e-5) + 0.7 * 9e-5, -math.exp(-2e-4) + 0.7 * 2e-4]]).double())
    # the second has moved: it is pushed up to where it was, on top of its advantage
    want = torch.tensor([[-math.exp(9e-5), -math.exp(-2e-4) - 0.7]]).double()
    assert_close(gradient(loss.sum(), x), want)


def test_clip_cov_takes_tokens_between_its_bounds_out_by_hand() -> None:
    x = four_tokens()
    both = {"clip_cov_lb": 0.5, "clip_cov_ub": 4.0, "clip_cov_ratio": 0.5}
    assert choice("clip_cov", x, **both).tolist() == [[True, False], [True, False]]
    assert choice("clip_cov", x, **{**both, "clip_cov_ub": 3.0}).tolist() == [[False, False], [True, False]]
    assert choice("clip_cov", x, **{**both, "clip_cov_lb": 1.0}).tolist() == [[True, False], [False, False]]
    assert not choice("clip_cov", x, **{**both, "clip_cov_lb": 3.0}).any()
    loss, stats = loss_of("clip_cov", **both)(x)
    assert loss.tolist() == [[0.0, -1.0], [0.0, 3.0]]
    assert gradient(loss.sum(), x).tolist() == [[0.0, -1.0], [0.0, 3.0]]
    assert stats["cov_clipfrac"].tolist() == [[1, 0], [1, 0]] and not stats["pg_clipfrac"].any()


def test_clip_cov_draws_no_token_that_ppos_clip_has_stopped() -> None:
    x = four_tokens()
    # the token of covariance 3 has grown 2 times likelier with a good advantage: stopped at 1.3 already
    moved = replace(x, old_log_probs=x.log_probs.detach() - torch.tensor([[0.7, 0.0], [0.0, 0.0]]))
    options = {"clip_cov_lb": 0.5, "clip_cov_ub": 4.0, "clip_cov_ratio": 0.5}
    assert choice("clip_cov", moved, **options).tolist() == [[False, False], [True, False]]
    loss, stats = loss_of("clip_cov", **options)(moved)
    assert_close(loss[0, 0].item(), -3 * 1.3)
    assert stats["pg_clipfrac"].tolist() == [[1, 0], [0, 0]]


def test_clip_covs_clip_is_ppos_without_the_dual_clip() -> None:
    x = tokens([1.5, 0.5, 5.0, 0.5], [1.0, 1.0, -1.0, -1.0])
    loss, _ = loss_of("clip_cov", clip_cov_lb=99.0, clip_cov_ub=100.0)(x)
    assert_close(loss, torch.tensor([[-1.3, -0.5, 5.0, 0.8]], dtype=torch.float64))


def test_the_draw_follows_its_seed_and_reaches_every_token() -> None:
    x = tokens([1.0] * 6, [1.0] * 6)
    x = replace(
        x,
        log_probs=torch.tensor([[-1.0, -1.0, -1.0, -1.0, -9.0, -9.0]]),
        advantages=torch.tensor([[2.0] * 4 + [0.0] * 2]),
    )
    x = replace(x, old_log_probs=x.log_probs)
    # four candidates of one covariance, a third of six tokens is two: six pairs
    options = {"clip_cov_ratio": 0.34, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0}
    draws = [
        tuple(choice("clip_cov", replace(x, seed=seed), **options)[0].nonzero()[:, 0].tolist()) for seed in range(60)
    ]
    assert draws[3] == tuple(choice("clip_cov", replace(x, seed=3), **options)[0].nonzero()[:, 0].tolist())
    assert {*draws} == {*combinations(range(4), 2)}


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.2, 0.9]))
@PROPERTY
def test_the_choice_is_a_share_of_the_true_tokens(name: str, seed: int, ratio: float) -> None:
    x = random_inputs(seed)
    chosen, found = choice(name, x, **{f"{name}_ratio": ratio}), covariances(x)
    share = max(1, int(ratio * int(x.response_mask.sum())))
    assert not chosen[~x.response_mask].any()
    if name == "kl_cov":
        assert int(chosen.sum()) == share
        rest = found[x.response_mask & ~chosen]
        assert not len(rest) or found[chosen].min() >= rest.max()
    else:
        assert int(chosen.sum()) <= share
        assert ((found[chosen] > 0.1) & (found[chosen] < 2.0)).all()


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@given(seed=st.integers(0, 10_000))
@PROPERTY
def test_parts_with_their_piece_of_the_choice_add_up_to_the_whole(name: str, seed: int) -> None:
    """Against verl #7829: row by row, with the choice over all rows, the loss is that of all rows at once."""
    x = replace(random_inputs(seed), seed=seed)
    whole, _ = loss_of(name)(x)
    chosen = choice(name, x)
    for i in range(len(whole)):
        rows = slice(i, i + 1)
        fields = (v[rows] for v in (x.log_probs, x.old_log_probs, x.advantages, x.response_mask, chosen))
        assert torch.equal(loss_of(name)(LossInputs(*fields, seed=seed))[0], whole[rows])


def test_a_choice_by_row_would_be_another_one() -> None:
    x = random_inputs(3)
    by_row = []
    for i in range(4):
        fields = (v[i : i + 1] for v in (x.log_probs, x.old_log_probs, x.advantages, x.response_mask))
        by_row.append(choice("kl_cov", LossInputs(*fields)))
    assert not torch.equal(torch.cat(by_row), choice("kl_cov", x)[:4])


def test_a_mini_batch_without_true_tokens_has_no_choice_and_no_loss() -> None:
    x = random_inputs(0)
    empty = replace(x, response_mask=torch.zeros_like(x.response_mask))
    for name in ("clip_cov", "kl_cov"):
        assert not choice(name, empty).any()
        assert not loss_of(name)(empty)[0].any()


def test_the_registry_knows_who_chooses() -> None:
    choosers = {name: POLICY_LOSSES.get(name).facts.get("choose") for name in POLICY_LOSSES.names()}
    assert {name for name, choose in choosers.items() if choose} == {"clip_cov", "kl_cov"}
    assert choosers["clip_cov"] is choose_clip_cov and choosers["kl_cov"] is choose_kl_cov


def test_a_choice_of_another_shape_is_refused() -> None:
    x = four_tokens()
    with pytest.raises(ValueError, match=r"LossInputs\.chosen has shape \(1, 2\), expected \(2, 2\)"):
        replace(x, chosen=torch.zeros(1, 2, dtype=torch.bool))
