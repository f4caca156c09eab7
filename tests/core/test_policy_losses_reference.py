"""Every policy loss against the formula of its paper written as loops, the exact policy gradient of a small bandit, and
what must change nothing: padding, row order, what lies in masked positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.policy_losses import LossInputs
from tests.support.policy_losses import NAMES, OPTIONS, gradient, loss_of, random_inputs

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
ROW_MEANS = ("gspo", "geo_mean", "sapo")
Row = list[tuple[float, float, float]]
"""(log_prob, old_log_prob, A) of each true token."""


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


# Objectives to be maximised, as the papers write them: a row -> the sum or mean of its tokens.


def vanilla(row: Row, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float) -> float:
    total = 0.0
    for new, old, a in row:
        ratio = math.exp(new - old)
        value = min(ratio * a, clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high) * a)
        total += max(value, clip_ratio_c * a) if a < 0 else value
    return total


def gspo(row: Row, clip_ratio_low: float, clip_ratio_high: float) -> float:
    if not row:
        return 0.0
    new, old = (sum(token[i] for token in row) for i in (0, 1))
    ratio = math.exp(new - old) ** (1 / len(row))
    return min(ratio * row[0][2], clip(ratio, 1 - clip_ratio_low, 1 + clip_ratio_high) * row[0][2])


def geo_mean(row: Row, clip_ratio_low: float, clip_ratio_high: float) -> float:
    if not row:
        return 0.0
    a, sign, total = row[0][2], math.copysign(1.0, row[0][2]), 1.0
    for new, old, _ in row:
        ratio, bounds = math.exp(new - old), (math.exp(-clip_ratio_low), math.exp(clip_ratio_high))
        # the paper's min of sign-powers: the smaller of r^sign and clip(r)^sign, to the power of sign
        total *= min(ratio**sign, clip(ratio, *bounds) ** sign) ** sign
    return total ** (1 / len(row)) * a


def sapo(row: Row, tau_pos: float, tau_neg: float) -> float:
    values = []
    for new, old, a in row:
        tau = tau_pos if a > 0 else tau_neg
        values.append(4 / tau / (1 + math.exp(-tau * (math.exp(new - old) - 1))) * a)
    return fmean(values) if values else 0.0


SURROGATES: dict[str, Callable[..., float]] = {"vanilla": vanilla, "gspo": gspo, "geo_mean": geo_mean, "sapo": sapo}


# Weights of losses whose weight has no gradient: a token -> the factor of A * grad log_prob.


def gpg(new: float, old: float, a: float) -> float:
    return 1.0


def cispo(new: float, old: float, a: float, clip_ratio_low: float, clip_ratio_high: float) -> float:
    return clip(math.exp(new - old), 1 - clip_ratio_low, 1 + clip_ratio_high)


def dppo_tv(
    new: float, old: float, a: float, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float
) -> float:
    moved = math.exp(new) - math.exp(old)
    if (a > 0 and moved > clip_ratio_high) or (a < 0 and -moved > clip_ratio_low):
        return 0.0
    return min(math.exp(new - old), clip_ratio_c)


def dppo_kl(
    new: float, old: float, a: float, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float
) -> float:
    p, q = math.exp(new), math.exp(old)
    distance = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    if (a > 0 and p > q and distance > clip_ratio_high) or (a < 0 and p < q and distance > clip_ratio_low):
        return 0.0
    return min(p / q, clip_ratio_c)


WEIGHTS: dict[str, Callable[..., float]] = {"gpg": gpg, "cispo": cispo, "dppo_tv": dppo_tv, "dppo_kl": dppo_kl}


def true_rows(x: LossInputs) -> list[Row]:
    rows: list[Row] = []
    for i, mask in enumerate(x.response_mask):
        at = mask.nonzero()[:, 0].tolist()
        rows.append([(x.log_probs[i, t].item(), x.old_log_probs[i, t].item(), x.advantages[i, t].item()) for t in at])
    return rows


def total_of(name: str, x: LossInputs) -> Tensor:
    """The loss of a mini-batch as the paper of the loss sums it up."""
    mode = "seq-mean-token-mean" if name in ROW_MEANS else "token-mean"
    return aggregate(loss_of(name)(x)[0], x.response_mask, mode, LossDenominators.of(x.response_mask))


@pytest.mark.parametrize("name", SURROGATES)
@given(seed=st.integers(0, 10_000))
@PROPERTY
def test_value_and_gradient_are_those_of_the_papers_objective(name: str, seed: int) -> None:
    x = random_inputs(seed)
    rows = true_rows(x)
    count = sum(1 for row in rows if row) if name in ROW_MEANS else sum(map(len, rows))

    def objective(rows: list[Row]) -> float:
        return sum(SURROGATES[name](row, **OPTIONS[name]) for row in rows) / count

    loss = total_of(name, x)
    assert loss.item() == pytest.approx(-objective(rows), rel=1e-9, abs=1e-12)
    found, step = gradient(loss, x), 1e-6
    for i, mask in enumerate(x.response_mask):
        for k, t in enumerate(mask.nonzero()[:, 0].tolist()):
            sides = []
            for moved in (step, -step):
                new, old, a = rows[i][k]
                other = [*rows]
                other[i] = [*rows[i][:k], (new + moved, old, a), *rows[i][k + 1 :]]
                sides.append(objective(other))
            # central differences; a kink of a clip within the step would show, and none of these seeds has one
            assert found[i, t].item() == pytest.approx(-(sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", WEIGHTS)
@given(seed=st.integers(0, 10_000))
@PROPERTY
def test_the_gradient_is_the_weight_of_the_paper_times_the_advantage(name: str, seed: int) -> None:
    x = random_inputs(seed)
    loss = total_of(name, x)
    found, count = gradient(loss, x), int(x.response_mask.sum())
    value = 0.0
    for i, row in enumerate(true_rows(x)):
        for t, (new, old, a) in zip(x.response_mask[i].nonzero()[:, 0].tolist(), row, strict=True):
            weight = WEIGHTS[name](new, old, a, **OPTIONS[name])
            assert found[i, t].item() == pytest.approx(-weight * a / count, rel=1e-6, abs=1e-12)
            value -= weight * a * new / count
    assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-9)


# ------------------------------------------------------------------------------------------- on-policy limit


def bandit() -> tuple[list[Tensor], list[list[int]], list[float]]:
    """Two steps of three actions; action 0 ends the episode at once. (logits, episodes, rewards)."""
    g = torch.Generator().manual_seed(5)
    first = torch.randn(3, generator=g).double().requires_grad_()
    second = torch.randn(3, 3, generator=g).double().requires_grad_()
    episodes = [[0], *([a, b] for a, b in product((1, 2), (0, 1, 2)))]
    rewards = torch.randn(len(episodes), generator=g).tolist()
    return [first, second], episodes, rewards


def log_probs_of(logits: list[Tensor], episodes: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(n, 2) log-probs, NaN where an episode has ended, and the mask."""
    first, second = logits[0].log_softmax(0), logits[1].log_softmax(1)
    ended = torch.tensor(math.nan, dtype=torch.float64)
    rows = [torch.stack([first[e[0]], second[e[0], e[1]] if len(e) > 1 else ended]) for e in episodes]
    return torch.stack(rows), torch.tensor([[True, len(e) > 1] for e in episodes])


def exact_policy_gradient(baseline: float) -> tuple[Tensor, ...]:
    """d E[reward] / d logits by enumeration of all episodes; the baseline changes nothing."""
    logits, episodes, rewards = bandit()
    log_probs, mask = log_probs_of(logits, episodes)
    chance = torch.where(mask, log_probs, 0.0).sum(1).exp()
    assert chance.sum().item() == pytest.approx(1.0)
    return torch.autograd.grad((chance * (torch.tensor(rewards).double() - baseline)).sum(), logits)


@pytest.mark.parametrize("baseline", [0.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_the_expected_gradient_on_policy_is_the_exact_policy_gradient(name: str, baseline: float) -> None:
    """Rows weighed by their chances, each the sum of its tokens: minus the gradient of the expected reward."""
    logits, episodes, rewards = bandit()
    log_probs, mask = log_probs_of(logits, episodes)
    advantages = (torch.tensor(rewards).double() - baseline)[:, None].expand_as(log_probs)
    none = torch.zeros_like(mask)  # clip_cov takes tokens out of the gradient by design: see the next test
    x = LossInputs(log_probs, log_probs.detach(), advantages, mask, chosen=none if name == "clip_cov" else None)
    loss, _ = loss_of(name)(x)
    chance = torch.where(mask, log_probs.detach(), 0.0).sum(1).exp()
    expected = (chance[:, None] * torch.where(mask, loss, 0.0)).sum()
    found = torch.autograd.grad(expected, logits)
    for mine, exact in zip(found, exact_policy_gradient(baseline), strict=True):
        assert exact.abs().max() > 1e-2
        assert_close(mine, -exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000))
@PROPERTY
def test_at_ratio_one_the_gradient_is_minus_the_advantage_over_the_denominator(name: str, seed: int) -> None:
    """By design Clip-Cov's is 0 at the tokens it takes out; of no other loss does anything differ."""
    x = random_inputs(seed)
    x = LossInputs(x.log_probs, x.log_probs.detach(), x.advantages, x.response_mask, seed=seed)
    stats = loss_of(name)(x)[1]
    kept = x.response_mask & (stats["cov_clipfrac"] == 0 if name == "clip_cov" else True)
    counts = LossDenominators.of(x.response_mask)
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        found = gradient(aggregate(loss_of(name)(x)[0], x.response_mask, mode, counts), x)
        divisor = torch.full_like(found, counts.num_tokens if mode == "token-mean" else counts.num_sequences)
        if mode == "seq-mean-token-mean":
            divisor = divisor * x.response_mask.sum(1, keepdim=True)
        want = torch.where(kept, -x.advantages / divisor, 0.0)
        assert_close(found, want, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10_000))
@PROPERTY
def test_masked_positions_never_leak(name: str, seed: int) -> None:
    x = random_inputs(seed)
    loss, stats = loss_of(name)(x)
    total = total_of(name, x)
    found = gradient(total, x)
    assert torch.isfinite(total) and torch.isfinite(found).all()
    assert not loss[~x.response_mask].any() and not found[~x.response_mask].any()
    for key, values in stats.items():
        assert (values[~x.response_mask] == (1 if key == "ratio" else 0)).all(), key
    zeros = [torch.where(x.response_mask, v.detach(), 0.0) for v in (x.log_probs, x.old_log_probs, x.advantages)]
    clean = LossInputs(zeros[0].requires_grad_(), zeros[1], zeros[2], x.response_mask)
    assert torch.equal(total_of(name, clean), total)
    assert torch.equal(gradient(total_of(name, clean), clean), found)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "clip_cov"])  # which draws: see its own tests
@given(seed=st.integers(0, 10_000), num_pad=st.sampled_from([0, 1, 20]))
@PROPERTY
def test_padding_and_row_order_change_nothing(name: str, seed: int, num_pad: int) -> None:
    x = random_inputs(seed)
    loss, _ = loss_of(name)(x)
    order = torch.randperm(len(loss), generator=torch.Generator().manual_seed(seed))
    pad = torch.full((len(loss), num_pad), math.nan, dtype=torch.float64)
    fields = [torch.cat([v.detach(), pad], 1)[order] for v in (x.log_probs, x.old_log_probs, x.advantages)]
    mask = torch.cat([x.response_mask, torch.zeros_like(pad, dtype=torch.bool)], 1)[order]
    wide = LossInputs(fields[0].requires_grad_(), fields[1], fields[2], mask)
    found, _ = loss_of(name)(wide)
    assert_close(found[:, : loss.shape[1]], loss[order], rtol=1e-12, atol=1e-12)
    assert not found[:, loss.shape[1] :].any()
    want = gradient(total_of(name, x), x)
    assert_close(gradient(total_of(name, wide), wide)[:, : loss.shape[1]], want[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("clip_cov", "kl_cov")])
@given(seed=st.integers(0, 10_000))
@PROPERTY
def test_a_row_does_not_depend_on_the_rows_beside_it(name: str, seed: int) -> None:
    x = random_inputs(seed)
    loss, _ = loss_of(name)(x)
    for i in range(len(loss)):
        fields = (v[i : i + 1] for v in (x.log_probs, x.old_log_probs, x.advantages, x.response_mask))
        assert_close(loss_of(name)(LossInputs(*fields))[0], loss[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("log_ratio", [300.0, -300.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_stay_finite(name: str, log_ratio: float, advantage: float) -> None:
    new, old = (-300.5, -0.5) if log_ratio < 0 else (-0.5, -300.5)
    log_probs = torch.tensor([[new, new]], requires_grad=True)
    mask = torch.tensor([[True, True]])
    x = LossInputs(log_probs, torch.full((1, 2), old), torch.full((1, 2), advantage), mask)
    loss, _ = loss_of(name)(x)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient(loss.sum(), x)).all()
