"""Loss aggregation: the modes by hand, and that the cut into micro-batches changes neither loss nor gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.aggregation import LOSS_AGG_MODES, LossDenominators, aggregate
from steepest.core.policy_losses import LossInputs, ppo_clip
from steepest.core.value_losses import clipped_value_loss
from steepest.errors import ConfigError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
T, F = True, False

LOSS = torch.tensor([[1.0, 2.0, 3.0], [10.0, math.nan, math.nan], [math.nan, math.inf, math.nan]])
MASK = torch.tensor([[T, T, T], [T, F, F], [F, F, F]])

# 6 and 10 over 3 and 1 tokens, row means 2 and 10; the third row has no token and is no sequence
BY_HAND = {
    "token-mean": 16 / 4,
    "token-sum": 16.0,
    "seq-mean-token-sum": 16 / 2,
    "seq-mean-token-mean": (2 + 10) / 2,
    "seq-mean-token-sum-norm": 16 / 2 / 8,
}


def test_every_mode_has_an_example() -> None:
    assert tuple(BY_HAND) == LOSS_AGG_MODES


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_by_hand(mode: str) -> None:
    denominators = LossDenominators.of(MASK)
    assert denominators == LossDenominators(num_tokens=4.0, num_sequences=2.0)
    assert aggregate(LOSS, MASK, mode, denominators, scale_factor=8.0).item() == pytest.approx(BY_HAND[mode], abs=1e-6)


def test_the_denominator_is_the_callers_number() -> None:
    # half of a mini-batch of 8 tokens and 4 sequences
    whole = LossDenominators(num_tokens=8.0, num_sequences=4.0)
    assert aggregate(LOSS, MASK, "token-mean", whole).item() == 2.0
    assert aggregate(LOSS, MASK, "seq-mean-token-sum", whole).item() == 4.0
    assert aggregate(LOSS, MASK, "seq-mean-token-mean", whole).item() == 3.0


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_a_masked_long_row_is_as_good_as_absent(mode: str) -> None:
    # Trap 10
    generator = torch.Generator().manual_seed(0)
    per_token = torch.randn(3, 50, generator=generator)
    mask = torch.arange(50) < torch.tensor([[4], [50], [9]])
    mask[1] = False
    kept = torch.tensor([0, 2])
    got = aggregate(per_token, mask, mode, LossDenominators.of(mask), scale_factor=50.0)
    want = aggregate(per_token[kept], mask[kept], mode, LossDenominators.of(mask[kept]), scale_factor=50.0)
    assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "mode, share",
    [
        ("token-mean", 10 / 1010),  # every token weighs the same: 1 to 99
        ("seq-mean-token-mean", 0.5),  # every row weighs the same
        ("seq-mean-token-sum", 10 / 2),
        ("seq-mean-token-sum-norm", 10 / 2 / 1000),
        ("token-sum", 10.0),
    ],
)
def test_the_weight_of_a_short_answer_beside_a_long_one(mode: str, share: float) -> None:
    # Trap 11. Lengths 10 and 1000; loss 1 on the short row's tokens, 0 on the long row's: the result is its weight.
    mask = torch.arange(1000) < torch.tensor([[10], [1000]])
    per_token = torch.zeros(2, 1000)
    per_token[0] = 1.0
    got = aggregate(per_token, mask, mode, LossDenominators.of(mask), scale_factor=1000.0)
    assert got.item() == pytest.approx(share, rel=1e-6)


def actor_loss(
    parameter: Tensor, rows: Tensor, mask: Tensor, data: Tensor, mode: str, whole: LossDenominators
) -> Tensor:
    log_probs = (parameter * data[0])[rows]
    x = LossInputs(log_probs, data[1][rows], data[2][rows], mask[rows])
    per_token, _ = ppo_clip(x, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0)
    return aggregate(per_token, mask[rows], mode, whole, scale_factor=7.0)


def critic_loss(
    parameter: Tensor, rows: Tensor, mask: Tensor, data: Tensor, mode: str, whole: LossDenominators
) -> Tensor:
    values = (parameter * data[0])[rows]
    per_token, _ = clipped_value_loss(values, data[1][rows], data[2][rows], cliprange_value=0.5)
    return aggregate(per_token, mask[rows], mode, whole, scale_factor=7.0)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None, derandomize=True)
@pytest.mark.parametrize("loss_of", [actor_loss, critic_loss])
@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_micro_batches_change_neither_loss_nor_gradient(mode: str, loss_of: object, seed: int) -> None:
    # Trap 9, at the level of the loss: unequal lengths, one row fully masked, tool tokens inside.
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 9, generator=generator) < torch.rand(6, 1, generator=generator)
    mask[0, 0], mask[3] = True, False
    data = torch.randn(3, 6, 9, generator=generator)
    whole = LossDenominators.of(mask)
    results = []
    for micro in (6, 4, 2, 1):
        parameter = torch.full((9,), 0.8, requires_grad=True)
        total = 0.0
        for rows in torch.arange(6).split(micro):
            loss = loss_of(parameter, rows, mask, data, mode, whole)  # type: ignore[operator]
            loss.backward()
            total += loss.item()
        assert parameter.grad is not None
        results.append((total, parameter.grad))
    assert results[0][1].abs().sum() > 0
    for total, gradient in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
        assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@given(seed=st.integers(0, 10_000), num_pad=st.sampled_from([0, 1, 50]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_padding_order_and_nan_change_nothing(mode: str, seed: int, num_pad: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 6, generator=generator) < 0.6
    per_token = torch.randn(4, 6, generator=generator)
    want = aggregate(per_token, mask, mode, LossDenominators.of(mask), scale_factor=7.0)
    order = torch.randperm(4, generator=generator)
    pad = torch.full((4, num_pad), math.nan)
    wide = torch.cat([per_token.masked_fill(~mask, math.nan), pad], 1)[order].requires_grad_()
    wide_mask = torch.cat([mask, torch.zeros_like(pad, dtype=torch.bool)], 1)[order]
    got = aggregate(wide, wide_mask, mode, LossDenominators.of(wide_mask), scale_factor=7.0)
    assert_close(got.detach(), want, rtol=1e-5, atol=1e-6)
    got.backward()
    assert wide.grad is not None
    assert torch.isfinite(wide.grad).all()
    assert not wide.grad[~wide_mask].any()


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_a_mini_batch_without_tokens_gives_zero(mode: str) -> None:
    nothing = torch.zeros_like(MASK)
    loss = LOSS.clone().requires_grad_()
    total = aggregate(loss, nothing, mode, LossDenominators.of(nothing), scale_factor=3.0)
    total.backward()
    assert total.item() == 0.0
    assert loss.grad is not None
    assert not loss.grad.any()


def test_unknown_mode_and_missing_scale_factor() -> None:
    whole = LossDenominators.of(MASK)
    with pytest.raises(ConfigError, match=r"loss_agg_mode='token-men'.*Did you mean 'token-mean'\? Known: token-mean,"):
        aggregate(LOSS, MASK, "token-men", whole)
    for factor in (None, 0.0, -1.0):
        with pytest.raises(ConfigError, match="loss_scale_factor"):
            aggregate(LOSS, MASK, "seq-mean-token-sum-norm", whole, scale_factor=factor)
