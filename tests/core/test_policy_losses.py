"""The clipped policy loss: each side of each clip by hand, its gradient, and that padding stays outside."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.mismatch import mismatch_metrics
from steepest.core.policy_losses import POLICY_LOSSES, LossInputs, ppo_clip
from steepest.errors import ConfigError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}


def one_token(ratio: float, advantage: float) -> LossInputs:
    log_probs = torch.tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    return LossInputs(log_probs, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), torch.tensor([[True]]))


# (ratio, A, loss, d loss / d log_prob, clipfrac, clipfrac_lower); inside, the gradient is -A * ratio
SIDES = [
    (1.0, 2.0, -2.0, -2.0, 0, 0),  # not moved
    (1.1, 1.0, -1.1, -1.1, 0, 0),  # inside
    (1.5, 1.0, -1.2, 0.0, 1, 0),  # a gain above 1.2 stops counting
    (1.5, -1.0, 1.5, 1.5, 0, 0),  # a bad token grown likelier is pushed down with all its weight
    (0.5, 1.0, -0.5, -0.5, 0, 0),  # a good token grown rarer is pulled up
    (0.5, -1.0, 0.8, 0.0, 1, 0),  # a bad token below 0.8 is left alone
    (5.0, -1.0, 3.0, 0.0, 0, 1),  # dual clip: -A * 3
    (5.0, -2.0, 6.0, 0.0, 0, 1),
    (5.0, 1.0, -1.2, 0.0, 1, 0),  # dual clip only where A < 0
    (2.9, -1.0, 2.9, 2.9, 0, 0),  # just below the dual clip
]


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped, lower", SIDES)
def test_each_side_of_each_clip(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: int, lower: int
) -> None:
    x = one_token(ratio, advantage)
    per_token, stats = ppo_clip(x, **CLIP)
    assert_close(per_token.detach(), torch.tensor([[loss]]))
    per_token.sum().backward()
    assert x.log_probs.grad is not None
    assert_close(x.log_probs.grad, torch.tensor([[gradient]]))
    assert stats["pg_clipfrac"].item() == clipped
    assert stats["pg_clipfrac_lower"].item() == lower
    assert_close(stats["ratio"], torch.tensor([[ratio]]))
    assert_close(stats["ppo_kl"], torch.tensor([[-math.log(ratio)]]), rtol=1e-5, atol=1e-6)
    assert not any(value.requires_grad for value in stats.values())


def test_low_and_high_bounds_are_their_own() -> None:
    bounds = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4, "clip_ratio_c": 3.0}
    # 1.3 is inside with high 0.4; 1.5 is held at 1.4; 0.85 with A < 0 is held at 0.9
    for ratio, advantage, loss in [(1.3, 1.0, -1.3), (1.5, 1.0, -1.4), (0.85, -1.0, 0.9), (0.95, -1.0, 0.95)]:
        per_token, _ = ppo_clip(one_token(ratio, advantage), **bounds)
        assert_close(per_token.detach(), torch.tensor([[loss]]))


def test_dual_clip_constant() -> None:
    per_token, stats = ppo_clip(one_token(5.0, -1.0), clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=1.5)
    assert_close(per_token.detach(), torch.tensor([[1.5]]))
    assert stats["pg_clipfrac_lower"].item() == 1


@pytest.mark.parametrize("constant", [1.0, 0.5, 0.0, -3.0])
def test_a_dual_clip_that_cuts_an_unmoved_policy_is_refused(constant: float) -> None:
    with pytest.raises(ConfigError, match=r"clip_ratio_c=.*must be greater than 1"):
        ppo_clip(one_token(1.0, 1.0), clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=constant)


@pytest.mark.parametrize("log_ratio, kl", [(500.0, -20.0), (-500.0, 20.0)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_stay_finite(log_ratio: float, kl: float, advantage: float) -> None:
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    x = LossInputs(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.tensor([[True]]))
    per_token, stats = ppo_clip(x, **CLIP)
    per_token.sum().backward()
    assert log_probs.grad is not None
    assert torch.isfinite(per_token).all() and torch.isfinite(log_probs.grad).all()
    assert stats["ppo_kl"].item() == kl


def random_inputs(seed: int) -> LossInputs:
    """NaN, inf and numbers whose exp() overflows at every masked position; the last row fully masked."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    mask[0, 0], mask[-1] = True, False
    junk = torch.tensor([math.nan, math.inf, 1e4])[torch.randint(0, 3, (4, 5), generator=generator)]
    fields = [torch.randn(4, 5, generator=generator) for _ in range(3)]
    log_probs, old, advantages = (torch.where(mask, value, junk) for value in fields)
    return LossInputs(log_probs.requires_grad_(), old, advantages, mask)


@given(st.integers(0, 10_000))
@PROPERTY
def test_masked_positions_never_leak(seed: int) -> None:
    x = random_inputs(seed)
    per_token, stats = ppo_clip(x, **CLIP)
    loss = aggregate(per_token, x.response_mask, "token-mean", LossDenominators.of(x.response_mask))
    loss.backward()
    assert x.log_probs.grad is not None
    assert torch.isfinite(loss)
    assert not per_token[~x.response_mask].any()
    assert not x.log_probs.grad[~x.response_mask].any()
    for name in ("pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"):
        assert not stats[name][~x.response_mask].any(), name
    assert (stats["ratio"][~x.response_mask] == 1).all()
    # and the true positions are those of a run with zeros in the padding
    clean = [
        torch.where(x.response_mask, value.detach(), 0.0) for value in (x.log_probs, x.old_log_probs, x.advantages)
    ]
    want, _ = ppo_clip(LossInputs(clean[0], clean[1], clean[2], x.response_mask), **CLIP)
    assert torch.equal(per_token.detach(), want)


@given(st.integers(0, 10_000))
@PROPERTY
def test_at_ratio_one_the_gradient_is_the_policy_gradient(seed: int) -> None:
    x = random_inputs(seed)
    on_policy = LossInputs(x.log_probs, x.log_probs.detach(), x.advantages, x.response_mask)
    per_token, _ = ppo_clip(on_policy, **CLIP)
    aggregate(per_token, x.response_mask, "token-mean", LossDenominators.of(x.response_mask)).backward()
    want = torch.where(x.response_mask, -x.advantages, 0.0) / x.response_mask.sum()
    assert x.log_probs.grad is not None
    assert_close(x.log_probs.grad, want, rtol=1e-5, atol=1e-6)


def test_three_policies_keep_their_ratios_apart() -> None:
    # Trap 20. One token with probability 1/2 in the engine, 1/4 in the trainer before the update, 3/8 now. The loss
    # weighs by now / before = 1.5, once; engine against trainer is 1/4 : 1/2 = 0.5 and stays out of the loss.
    rollout, old, now = (torch.tensor([[math.log(p)]]) for p in (0.5, 0.25, 0.375))
    mask = torch.tensor([[True]])
    per_token, stats = ppo_clip(
        LossInputs(now, old, torch.tensor([[1.0]]), mask), clip_ratio_low=0.9, clip_ratio_high=0.9, clip_ratio_c=3.0
    )
    assert_close(stats["ratio"], torch.tensor([[1.5]]))
    assert_close(per_token, torch.tensor([[-1.5]]))
    assert mismatch_metrics(rollout, old, mask)["mismatch/max_ratio"] == pytest.approx(0.5, abs=1e-6)


def test_registry_and_shapes() -> None:
    assert POLICY_LOSSES.get("vanilla").value is ppo_clip
    with pytest.raises(ConfigError, match=r"^loss_mode='vanila'.*Did you mean 'vanilla'"):
        POLICY_LOSSES.get("vanila")
    wrong: Tensor = torch.zeros(2, 1)
    right = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"LossInputs\.advantages has shape \(2, 1\), expected \(2, 3\)"):
        LossInputs(right, right, wrong, right.bool())
