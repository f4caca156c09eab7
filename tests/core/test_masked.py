"""Masked statistics: by hand, then that padding, order and NaN outside the mask change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.masked import masked_mean, masked_sum, masked_var, whiten

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)

X = torch.tensor([[1.0, 2.0, math.nan], [3.0, 10.0, math.inf]])
MASK = torch.tensor([[True, True, False], [True, True, False]])


def random_case(seed: int, num_rows: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, width, generator=generator) * 3 + 1
    mask = torch.rand(num_rows, width, generator=generator) < 0.6
    mask[0, :2] = True
    return x, mask


def test_by_hand() -> None:
    # 1 + 2 + 3 + 10 = 16, mean 4, squares 9 + 4 + 1 + 36 = 50, unbiased variance 50 / 3
    assert masked_sum(X, MASK).item() == 16.0
    assert masked_mean(X, MASK).item() == 4.0
    assert_close(masked_var(X, MASK), torch.tensor(50.0 / 3.0))
    assert masked_sum(X, MASK, dim=1).tolist() == [3.0, 13.0]
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 6.5]
    assert masked_mean(X, MASK, dim=0).tolist() == [2.0, 6.0, 0.0]


def test_whiten_by_hand() -> None:
    # mean 2, unbiased variance (1 + 0 + 1) / 2 = 1
    x = torch.tensor([[1.0, 2.0, 99.0, 3.0]])
    mask = torch.tensor([[True, True, False, True]])
    assert_close(whiten(x, mask), torch.tensor([[-1.0, 0.0, 0.0, 1.0]]))


def test_whiten_eps_stands_under_the_root() -> None:
    # variance (0.0001^2 + 0.0001^2) / 1 = 2e-8; 0.0001 / sqrt(2e-8 + 1e-8) = 0.57735
    x = torch.tensor([[-1e-4, 1e-4]])
    assert_close(whiten(x, torch.tensor([[True, True]])), torch.tensor([[-0.57735, 0.57735]]), rtol=1e-5, atol=1e-5)


def test_nothing_true_gives_zero() -> None:
    nothing = torch.zeros_like(MASK)
    for number in (masked_sum(X, nothing), masked_mean(X, nothing), masked_var(X, nothing)):
        assert number.item() == 0.0
    assert torch.equal(whiten(X, nothing), torch.zeros_like(X))


def test_one_true_position_is_finite() -> None:
    one = torch.tensor([[False, True, False], [False, False, False]])
    assert masked_var(X, one).item() == 0.0
    assert torch.equal(whiten(X, one), torch.zeros_like(X))


def cubed_whiten(x: Tensor, mask: Tensor) -> Tensor:
    return whiten(x, mask) ** 3  # the sum of squares of whitened numbers is constant: no gradient to look at


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, cubed_whiten])
def test_masked_nan_has_no_gradient(function: object) -> None:
    x = X.clone().requires_grad_()
    function(x, MASK).square().sum().backward()  # type: ignore[operator]
    assert x.grad is not None
    assert x.grad[MASK].any()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[~MASK], torch.zeros(2))


@given(st.integers(0, 10_000))
@PROPERTY
def test_whitening_equals_whitening_of_the_true_values(seed: int) -> None:
    x, mask = random_case(seed)
    flat = x[mask]
    want = (flat - flat.mean()) / (flat.var(unbiased=True) + 1e-8).sqrt()
    assert_close(whiten(x, mask)[mask], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(whiten(x, mask)[~mask], torch.zeros(int((~mask).sum())))


@given(st.integers(0, 10_000), st.sampled_from([0, 1, 50]))
@PROPERTY
def test_padding_and_row_order_change_nothing(seed: int, num_pad: int) -> None:
    x, mask = random_case(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    pad = torch.full((len(x), num_pad), math.nan)
    wide = torch.cat([pad, x.masked_fill(~mask, math.nan), pad], dim=1)[order]
    wide_mask = torch.cat([torch.zeros_like(pad, dtype=torch.bool), mask, torch.zeros_like(pad, dtype=torch.bool)], 1)
    wide_mask = wide_mask[order]
    back = torch.argsort(order)
    assert_close(
        whiten(wide, wide_mask)[back][:, num_pad : num_pad + x.shape[1]], whiten(x, mask), rtol=1e-5, atol=1e-5
    )
    assert_close(masked_mean(wide, wide_mask), masked_mean(x, mask), rtol=1e-5, atol=1e-5)
    assert_close(masked_var(wide, wide_mask), masked_var(x, mask), rtol=1e-5, atol=1e-5)
