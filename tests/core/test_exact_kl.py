"""The exact KL over a vocabulary: by hand, against loops, its gradient against autograd on whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.exact_kl import exact_kl
from steepest.core.kl import kl_estimate
from steepest.errors import ConfigError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
Side = tuple[Tensor, Tensor, Tensor | None]


def side(seed: int, tokens: int = 7, width: int = 4, vocabulary: int = 5, *, bias: bool = True) -> Side:
    g = torch.Generator().manual_seed(seed)
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    hidden, weight, offset = (torch.randn(shape, generator=g).requires_grad_() for shape in shapes)
    return hidden, weight, offset if bias else None


def whole_logits(x: Side, temperature: float, scale: float, softcap: float | None) -> Tensor:
    hidden, weight, bias = (None if value is None else value.double() for value in x)
    z = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def test_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2 = ln 2 - H(p) = 0.130812
    hidden = torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    found = exact_kl((hidden, torch.eye(2), None), (torch.zeros(1, 2), torch.eye(2), None))
    assert_close(found, torch.tensor([0.130812]), rtol=1e-5, atol=0)
    # gradient p_j * (log p_j - log q_j - KL): 3/4 * (ln 3/2 - 0.130812) = 0.205990, and its opposite
    found.sum().backward()
    assert_close(hidden.grad, torch.tensor([[0.205990, -0.205990]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("temperature", "scale", "softcap", "bias"),
    [(1.0, 1.0, None, False), (0.7, 1.0, None, True), (1.3, 0.5, None, False), (0.7, 2.0, 3.0, True)],
)
def test_value_and_gradient_are_those_of_whole_logits(
    chunk: int, temperature: float, scale: float, softcap: float | None, bias: bool
) -> None:
    policy, reference = side(1, bias=bias), side(2, bias=bias)
    found = exact_kl(policy, reference, temperature=temperature, logit_scale=scale, softcap=softcap, chunk_tokens=chunk)
    log_p, log_q = (whole_logits(x, temperature, scale, softcap).log_softmax(1) for x in (policy, reference))
    want = torch.stack(
        [sum(p.exp() * (p - q) for p, q in zip(*row, strict=True)) for row in zip(log_p, log_q, strict=True)]
    )
    assert found.dtype == torch.float32
    assert_close(found, want.float(), rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 2, 7)
    leaves = [value for value in policy if value is not None]
    gradients = torch.autograd.grad((found * weights).sum(), leaves)
    for mine, exact in zip(gradients, torch.autograd.grad((want * weights).sum(), leaves), strict=True):
        assert exact.abs().max() > 0.01
        assert_close(mine, exact, rtol=1e-4, atol=1e-5)


def test_nothing_flows_into_the_reference() -> None:
    policy, reference = side(1), side(2)
    exact_kl(policy, reference).sum().backward()
    assert all(value.grad is None for value in reference)
    assert all(value.grad is not None for value in policy)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, bias = side(1)
    frozen = (hidden, weight.detach(), bias.detach())
    exact_kl(frozen, side(2)).sum().backward()
    assert hidden.grad.abs().max() > 0.01 and frozen[1].grad is None


@given(st.integers(0, 10_000), st.floats(0.3, 2.0))
@PROPERTY
def test_it_is_what_the_estimators_estimate(seed: int, temperature: float) -> None:
    """Five tokens, enumerated: k1 and k3 have this value in expectation, and k2's gradient this gradient."""
    policy, reference = side(seed, tokens=1), side(seed + 1, tokens=1)
    found = exact_kl(policy, reference, temperature=temperature)
    log_p, log_q = (whole_logits(x, temperature, 1.0, None).log_softmax(1) for x in (policy, reference))
    p, k1 = log_p.exp().detach(), kl_estimate(log_p, log_q, "k1")
    assert (p * k1).sum().item() == pytest.approx(found.item(), rel=1e-4, abs=1e-6)
    unbounded = torch.expm1(log_q - log_p) - (log_q - log_p)
    assert (p * unbounded).sum().item() == pytest.approx(found.item(), rel=1e-4, abs=1e-5)
    (mine,) = torch.autograd.grad(found.sum(), policy[0])
    (expected,) = torch.autograd.grad((p * kl_estimate(log_p, log_q.detach(), "k2")).sum(), policy[0])
    assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_it_is_zero_at_the_reference_and_above_zero_elsewhere() -> None:
    policy = side(3, tokens=50)
    same = tuple(None if value is None else value.detach().clone() for value in policy)
    found = exact_kl(policy, same)
    assert not found.any()
    found.sum().backward()
    assert not policy[0].grad.any() and not policy[1].grad.any()
    assert (exact_kl(policy, side(4, tokens=50)) > 0).all()


def test_far_away_policies_stay_finite() -> None:
    policy, reference = side(5), side(6)
    far = (policy[0].detach() * 1e3).requires_grad_()
    found = exact_kl((far, policy[1], policy[2]), (reference[0] * 1e3, reference[1], reference[2]))
    found.sum().backward()
    assert torch.isfinite(found).all() and found.max() > 100 and torch.isfinite(far.grad).all()


def test_half_precision_computes_products_in_it_and_sums_in_float32() -> None:
    policy, reference = side(7, tokens=20, width=64, vocabulary=90), side(8, tokens=20, width=64, vocabulary=90)
    want = exact_kl(policy, reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = exact_kl(policy, reference, chunk_tokens=6)
    assert found.dtype == torch.float32 and not torch.equal(found, want)
    assert_close(found, want, rtol=0.1, atol=0.1)
    (gradient,) = torch.autograd.grad(found.sum(), policy[1])
    assert gradient.dtype == torch.float32


def test_no_token_is_no_kl() -> None:
    policy = side(1, tokens=0)
    found = exact_kl(policy, side(2, tokens=0))
    found.sum().backward()
    assert found.shape == (0,) and policy[1].grad.shape == policy[1].shape and not policy[1].grad.any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="7 states over 5 tokens against 7 over 6"):
        exact_kl(side(1), side(2, vocabulary=6))
    with pytest.raises(ValueError, match="7 states over 5 tokens against 3 over 5"):
        exact_kl(side(1), side(2, tokens=3))
    with pytest.raises(ConfigError, match="temperature=0"):
        exact_kl(side(1), side(2), temperature=0)
