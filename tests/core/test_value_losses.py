"""The clipped value loss on each side of the clip, and explained variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from steepest.core.masked import masked_var
from steepest.core.value_losses import clipped_value_loss, explained_variance

# Trap 24. cliprange 0.5, old value 0: the values are held within -0.5 .. 0.5.
# (value, return, loss, d loss / d value, clipped side active)
SIDES = [
    (0.2, 1.0, 0.32, -0.8, 0),  # inside: 0.5 * 0.8^2
    (0.9, 1.0, 0.125, 0.0, 1),  # went far toward the return: counted at 0.5, 0.5 * 0.5^2, no gradient
    (-0.9, 1.0, 1.805, -1.9, 0),  # went far away from it: counted in full, 0.5 * 1.9^2, and pulled back
    (0.9, 0.69, 0.02205, 0.21, 0),  # overshot: 0.21 above the return, the clipped side only 0.19 below it
    (1.5, 0.7, 0.32, 0.8, 0),  # overshot by more, 0.8 against 0.2: 0.5 * 0.8^2
    (-0.9, -1.0, 0.125, 0.0, 1),  # the mirror image of the second
]


@pytest.mark.parametrize("value, target, loss, gradient, clipped", SIDES)
def test_each_side_of_the_clip(value: float, target: float, loss: float, gradient: float, clipped: int) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    per_token, stats = clipped_value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), cliprange_value=0.5)
    assert_close(per_token.detach(), torch.tensor([[loss]]), rtol=1e-5, atol=1e-6)
    per_token.sum().backward()
    assert values.grad is not None
    assert_close(values.grad, torch.tensor([[gradient]]), rtol=1e-5, atol=1e-6)
    assert stats["vf_clipfrac"].item() == clipped
    assert not stats["vf_clipfrac"].requires_grad


def test_the_clip_is_around_the_old_value() -> None:
    # old 2, range 0.5: 3 is held at 2.5, the return is 4: 0.5 * 1.5^2 = 1.125
    per_token, _ = clipped_value_loss(
        torch.tensor([[3.0]]), torch.tensor([[2.0]]), torch.tensor([[4.0]]), cliprange_value=0.5
    )
    assert_close(per_token, torch.tensor([[1.125]]))


def test_masked_positions_never_leak() -> None:
    n = math.nan
    values = torch.tensor([[0.2, n, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    per_token, stats = clipped_value_loss(
        values, torch.tensor([[0.0, n, n]]), torch.tensor([[1.0, n, 0.0]]), cliprange_value=0.5, response_mask=mask
    )
    assert_close(per_token.detach(), torch.tensor([[0.32, 0.0, 0.0]]))
    assert stats["vf_clipfrac"].tolist() == [[0.0, 0.0, 0.0]]
    per_token.sum().backward()
    assert values.grad is not None
    assert_close(values.grad, torch.tensor([[-0.8, 0.0, 0.0]]))


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full_like(returns, 5.0), returns, mask) == 0.0
    # errors R - V = 1, 0, 1: variance 1/3 against 1
    assert explained_variance(torch.tensor([[0.0, 2.0, 2.0, 9.0]]), returns, mask) == pytest.approx(2 / 3, abs=1e-6)
    # the wrong way round: errors -2, 0, 2, variance 4 against 1
    assert explained_variance(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), returns, mask) == pytest.approx(-3.0, abs=1e-6)


def test_explained_variance_without_anything_to_explain_is_none() -> None:
    same = torch.tensor([[2.0, 2.0]])
    tenths = torch.full((1, 7), 0.1)  # their mean rounds: a variance of 1e-17, which is nothing to divide by
    everywhere = torch.ones(1, 7, dtype=torch.bool)
    assert masked_var(tenths, everywhere) != 0
    assert explained_variance(torch.arange(7.0)[None], tenths, everywhere) is None
    assert explained_variance(torch.zeros(1, 7), tenths, ~everywhere) is None
    assert explained_variance(torch.zeros(1, 2), same, torch.tensor([[True, True]])) is None
    assert explained_variance(torch.zeros(1, 2), same, torch.tensor([[True, False]])) is None
