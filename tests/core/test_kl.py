"""KL estimators: values by hand, exact expected gradients by enumeration, the penalty, the controllers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.kl import KL_KINDS, AdaptiveKLController, FixedKLController, apply_kl_penalty, kl_estimate
from steepest.errors import ConfigError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
LN2 = math.log(2.0)
PAGE = Path(__file__).parents[2] / "docs" / "kl.md"


@pytest.mark.parametrize(
    "kinds, value",
    [
        # l = log_prob - ref = ln 2, then -ln 2
        (("kl", "k1", "kl+", "k1+"), (LN2, -LN2)),
        (("abs", "abs+"), (LN2, LN2)),
        (("mse", "k2", "mse+", "k2+"), (LN2**2 / 2, LN2**2 / 2)),
        # exp(-l) - 1 + l: 1/2 - 1 + ln 2, and 2 - 1 - ln 2
        (("low_var_kl", "k3", "low_var_kl+", "k3+"), (LN2 - 0.5, 1 - LN2)),
    ],
)
def test_values_by_hand(kinds: tuple[str, ...], value: tuple[float, float]) -> None:
    log_probs = torch.tensor([[-1.0, -1.0 - LN2]])
    reference = torch.tensor([[-1.0 - LN2, -1.0]])
    for kind in kinds:
        assert_close(kl_estimate(log_probs, reference, kind), torch.tensor([value]), rtol=1e-5, atol=1e-6)


def test_every_kind_is_covered() -> None:
    assert set(KL_KINDS) == {
        name + plus for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3") for plus in ("", "+")
    }


@pytest.mark.parametrize("kind", KL_KINDS)
def test_equal_log_probs_give_exactly_zero(kind: str) -> None:
    log_probs = torch.tensor([[-0.1, -3.0, -11.7]])
    got = kl_estimate(log_probs, log_probs.clone(), kind)
    assert torch.equal(got, torch.zeros_like(got))


def gradient_at(log_ratio: float, kind: str) -> tuple[float, float]:
    log_probs = torch.tensor([[log_ratio]], requires_grad=True)
    value = kl_estimate(log_probs, torch.zeros(1, 1), kind)
    value.sum().backward()
    assert log_probs.grad is not None
    return value.item(), log_probs.grad.item()


@pytest.mark.parametrize(
    "log_ratio, value, gradient",
    [
        # d k3 / dl = 1 - exp(-l); the value is held at 10 and the gradient is not
        (-1.0, math.e - 2, 1 - math.e),
        (-5.0, 10.0, 1 - math.exp(5.0)),  # exp(5) - 6 = 142 would be the value
        (-19.0, 10.0, 1 - math.exp(19.0)),
        (-25.0, 10.0, 1 - math.exp(20.0)),  # past 20 exp goes on as its tangent
        (-1000.0, 10.0, 1 - math.exp(20.0)),
        (5.0, math.exp(-5.0) + 4.0, 1 - math.exp(-5.0)),
        (25.0, 10.0, 1.0),  # 24 would be the value
        (1000.0, 10.0, 1.0),
    ],
)
def test_clamping_the_value_of_k3_keeps_its_gradient(log_ratio: float, value: float, gradient: float) -> None:
    # Trap 15
    for kind in ("k3", "low_var_kl"):
        got = gradient_at(log_ratio, kind)
        assert got == (pytest.approx(value, rel=1e-5), pytest.approx(gradient, rel=1e-5))
    # straight-through: the same value to the bit, the gradient l of k2
    assert gradient_at(log_ratio, "k3+") == (gradient_at(log_ratio, "k3")[0], pytest.approx(log_ratio))


@pytest.mark.parametrize("log_ratio", [-1000.0, -30.0, 0.5, 30.0, 1000.0])
def test_gradients_of_the_other_kinds(log_ratio: float) -> None:
    assert gradient_at(log_ratio, "k1") == (pytest.approx(log_ratio), 1.0)
    assert gradient_at(log_ratio, "abs") == (pytest.approx(abs(log_ratio)), math.copysign(1.0, log_ratio))
    assert gradient_at(log_ratio, "k2") == (pytest.approx(log_ratio**2 / 2), pytest.approx(log_ratio))
    assert gradient_at(log_ratio, "k1+") == (pytest.approx(log_ratio), pytest.approx(log_ratio))
    assert gradient_at(log_ratio, "abs+") == (pytest.approx(abs(log_ratio)), pytest.approx(log_ratio))


# Trap 13: a policy over five tokens and a reference, every expectation summed exactly, in fp64.
LOGITS = torch.tensor([0.3, -1.1, 0.8, 0.0, 1.7], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([1.0, 0.2, -0.4, 0.5, 0.1], dtype=torch.float64), 0)


def gradient_of(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """d objective / d logits, where objective reads the policy's five log-probs."""
    logits = LOGITS.clone().requires_grad_()
    objective(torch.log_softmax(logits, 0)).backward()
    assert logits.grad is not None
    return logits.grad


def in_loss(kind: str) -> Tensor:
    """Expected gradient of the estimate as a loss: autograd through each token, weighted by its probability."""
    return gradient_of(lambda lp: (lp.exp().detach() * kl_estimate(lp[None], REFERENCE[None], kind)[0]).sum())


def in_reward(kind: str) -> Tensor:
    """Expected policy gradient when the estimate is taken off the reward: E[k * d log_prob], k being a number."""
    return gradient_of(
        lambda lp: (lp.exp().detach() * kl_estimate(lp.detach()[None], REFERENCE[None], kind)[0] * lp).sum()
    )


TRUE = gradient_of(lambda lp: (lp.exp() * (lp - REFERENCE)).sum())
REVERSED = gradient_of(lambda lp: (REFERENCE.exp() * (REFERENCE - lp)).sum())
TOTAL_VARIATION = gradient_of(lambda lp: (lp.exp() - REFERENCE.exp()).abs().sum() / 2)

FINDINGS = {
    "zero": torch.zeros(5, dtype=torch.float64),
    "KL(policy, ref)": TRUE,
    "KL(ref, policy)": REVERSED,
    "2 TV": 2 * TOTAL_VARIATION,
    "KL(policy, ref) - KL(ref, policy)": TRUE - REVERSED,
}


def finding(gradient: Tensor) -> str:
    """The name of the divergence whose gradient this is; "of no divergence" for none of the list."""
    same = [name for name, want in FINDINGS.items() if torch.allclose(gradient, want, rtol=1e-9, atol=1e-12)]
    assert len(same) <= 1
    return same[0] if same else "of no divergence"


def test_the_divergences_compared_are_different_ones() -> None:
    for name, gradient in FINDINGS.items():
        assert finding(gradient) == name
    # the closed form of the gradient of KL(policy, ref): p * (log(p / q) - KL)
    p = torch.log_softmax(LOGITS, 0)
    kl = (p.exp() * (p - REFERENCE)).sum()
    assert_close(TRUE, p.exp() * (p - REFERENCE - kl))


@pytest.mark.parametrize(
    "kind, loss, reward",
    [
        ("k1", "zero", "KL(policy, ref)"),
        ("abs", "2 TV", "of no divergence"),
        ("k2", "KL(policy, ref)", "of no divergence"),
        ("k3", "KL(ref, policy)", "KL(policy, ref) - KL(ref, policy)"),
        ("k1+", "KL(policy, ref)", "KL(policy, ref)"),
        ("abs+", "KL(policy, ref)", "of no divergence"),
        ("k2+", "KL(policy, ref)", "of no divergence"),
        ("k3+", "KL(policy, ref)", "KL(policy, ref) - KL(ref, policy)"),
    ],
)
def test_expected_gradient_of_each_estimator_in_each_place(kind: str, loss: str, reward: str) -> None:
    assert finding(in_loss(kind)) == loss
    assert finding(in_reward(kind)) == reward


@pytest.mark.parametrize("kind, alias", [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_aliases_have_the_same_gradient(kind: str, alias: str) -> None:
    for plus in ("", "+"):
        assert torch.equal(in_loss(kind + plus), in_loss(alias + plus))
        assert torch.equal(in_reward(kind + plus), in_reward(alias + plus))


def test_expected_values_are_the_divergence_where_the_page_says_so() -> None:
    p = torch.log_softmax(LOGITS, 0)
    kl = (p.exp() * (p - REFERENCE)).sum()
    mean = {
        kind: (p.exp() * kl_estimate(p[None], REFERENCE[None], kind)[0]).sum() for kind in ("k1", "k2", "k3", "abs")
    }
    assert_close(mean["k1"], kl)
    assert_close(mean["k3"], kl)
    assert abs(float(mean["k2"] / kl) - 1) > 0.01
    assert abs(float(mean["abs"] / kl) - 1) > 0.01


def test_the_page_says_what_the_enumeration_finds() -> None:
    rows = dict(re.findall(r"^\| `(\S+?)`[^|]*\|([^|]*\|[^|]*)\|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    for kind in ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"):
        loss, reward = (cell.strip() for cell in rows[kind].split("|"))
        assert (loss, reward) == (finding(in_loss(kind)), finding(in_reward(kind))), kind


def test_only_the_reward_placement_sees_later_tokens() -> None:
    # Two tokens in a row; the second one's distribution depends on the first through a table. The true gradient of
    # the sequence's KL has two parts: each token's own KL, and the way the first token chooses where the second starts.
    generator = torch.Generator().manual_seed(0)
    first, ref_first = (torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2))
    second, ref_second = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    first.requires_grad_()
    p, q = torch.log_softmax(first, 0), torch.log_softmax(ref_first, 0)
    p2, q2 = torch.log_softmax(second, 1), torch.log_softmax(ref_second, 1)
    later = (p2.exp() * (p2 - q2)).sum(1)
    (true,) = torch.autograd.grad((p.exp() * (p - q + later)).sum(), first, retain_graph=True)
    joint = (p[:, None] + p2).exp().detach()
    k1 = kl_estimate(p.detach(), q, "k1")[:, None] + kl_estimate(p2, q2, "k1")
    (reward,) = torch.autograd.grad((joint * k1 * p[:, None]).sum(), first, retain_graph=True)
    assert_close(reward, true)
    k2 = kl_estimate(p, q, "k2")[:, None] + kl_estimate(p2, q2, "k2")
    (loss,) = torch.autograd.grad((joint * k2).sum(), first, retain_graph=True)
    (own,) = torch.autograd.grad((p.exp() * (p - q)).sum(), first)
    assert_close(loss, own)
    assert (loss - true).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["k2", "k3", "k1+", "abs+", "k3+", "abs"])
def test_a_kl_loss_alone_pulls_toward_the_reference(kind: str) -> None:
    # Trap 14: coefficient 1, no reward. The gradient is not zero, and a step along it lowers the KL.
    p = torch.log_softmax(LOGITS, 0)
    gradient = in_loss(kind)
    assert gradient.abs().max() > 1e-3
    moved = torch.log_softmax(LOGITS - 0.1 * gradient, 0)
    assert (moved.exp() * (moved - REFERENCE)).sum() < (p.exp() * (p - REFERENCE)).sum()


@pytest.mark.parametrize("kind", KL_KINDS)
def test_masked_positions_never_leak(kind: str) -> None:
    mask = torch.tensor([[True, False, False, False]])
    junk = [math.nan, math.inf, -1e4]
    log_probs = torch.tensor([[-1.0, *junk]], requires_grad=True)
    reference = torch.tensor([[-1.5, 0.0, 0.0, 0.0]])
    kl = kl_estimate(log_probs, reference, kind, response_mask=mask)
    assert kl[0, 0].item() == pytest.approx(float(kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind)))
    assert not kl[0, 1:].any()
    aggregate(kl, mask, "token-mean", LossDenominators.of(mask)).backward()
    assert log_probs.grad is not None
    assert log_probs.grad[0, 0] != 0
    assert not log_probs.grad[0, 1:].any()
    # without a mask the caller's aggregation keeps the value clean
    assert torch.isfinite(aggregate(kl_estimate(log_probs, reference, kind), mask, "token-sum", LossDenominators(1, 1)))


def test_unknown_kinds_are_refused_by_name() -> None:
    one = torch.zeros(1, 1)
    for kind in ("full", "k4", "k3++", ""):
        with pytest.raises(ConfigError, match=r"kl_loss_type='.*no such KL estimator.*Known: kl, k1, abs"):
            kl_estimate(one, one, kind)
    with pytest.raises(ConfigError, match=r"Did you mean 'low_var_kl'"):
        kl_estimate(one, one, "low_var_k")


def test_penalty_by_hand() -> None:
    n = math.nan
    old = torch.tensor([[-1.0, -2.0, n], [-1.0, n, n], [n, n, n]])
    reference = torch.tensor([[-1.5, -1.0, n], [-4.0, n, n], [n, n, n]])
    scores = torch.tensor([[0.0, 1.0, n], [2.0, n, n], [n, n, n]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    rewards, mean_kl = apply_kl_penalty(scores, old, reference, mask, coef=0.1, kind="k1")
    # k1: 0.5 and -1.0, then 3.0.  0 - 0.05, 1 + 0.1; 2 - 0.3
    assert_close(rewards, torch.tensor([[-0.05, 1.1, 0.0], [1.7, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    # row means -0.25 and 3.0; the third row has no token and does not count: 2.75 / 2
    assert_close(mean_kl, torch.tensor(1.375))
    assert mean_kl.ndim == 0
    squared, _ = apply_kl_penalty(scores, old, reference, mask, coef=0.1, kind="k2")
    # k2: 0.125, 0.5, 4.5
    assert_close(squared, torch.tensor([[-0.0125, 0.95, 0.0], [1.55, 0.0, 0.0], [0.0, 0.0, 0.0]]))


@given(st.integers(0, 10_000), st.sampled_from([0, 1, 50]))
@PROPERTY
def test_penalty_ignores_padding_and_row_order(seed: int, num_pad: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    mask[3] = False
    scores, old, reference = (torch.randn(4, 5, generator=generator) for _ in range(3))
    rewards, mean_kl = apply_kl_penalty(scores, old, reference, mask, coef=0.3, kind="k3")
    order = torch.randperm(4, generator=generator)
    pad = torch.full((4, num_pad), math.nan)
    wide = [torch.cat([x.masked_fill(~mask, math.nan), pad], 1)[order] for x in (scores, old, reference)]
    wide_mask = torch.cat([mask, torch.zeros_like(pad, dtype=torch.bool)], 1)[order]
    got, got_kl = apply_kl_penalty(wide[0], wide[1], wide[2], wide_mask, coef=0.3, kind="k3")
    assert torch.equal(got[:, :5], rewards[order])
    assert_close(got_kl, mean_kl, rtol=1e-5, atol=1e-6)
    without, _ = apply_kl_penalty(wide[0][:2], wide[1][:2], wide[2][:2], wide_mask[:2], coef=0.3, kind="k3")
    assert torch.equal(without, got[:2])


def test_fixed_controller_stays() -> None:
    controller = FixedKLController(0.001)
    controller.update(5.0, 256)
    assert controller.value == 0.001
    controller.load_state_dict({"value": 7.0})
    assert controller.value == 0.001
    assert controller.state_dict() == {"value": 0.001}


@pytest.mark.parametrize(
    "kl, value",
    [
        (0.11, 0.5 * (1 + 0.1 * 50 / 1000)),  # 10 % over the target
        (0.09, 0.5 * (1 - 0.1 * 50 / 1000)),
        (9.0, 0.5 * (1 + 0.2 * 50 / 1000)),  # held at +20 %
        (-1.0, 0.5 * (1 - 0.2 * 50 / 1000)),  # held at -20 %
        (0.1, 0.5),
        (math.nan, 0.5),
        (math.inf, 0.5),
    ],
)
def test_adaptive_controller_by_hand(kl: float, value: float) -> None:
    controller = AdaptiveKLController(0.5, target_kl=0.1, horizon=1000)
    controller.update(kl, 50)
    assert controller.value == pytest.approx(value)


def test_adaptive_controller_resumes_where_it_was() -> None:
    a = AdaptiveKLController(0.5, target_kl=0.1, horizon=1000)
    a.update(0.2, 100)
    b = AdaptiveKLController(0.5, target_kl=0.1, horizon=1000)
    b.load_state_dict(a.state_dict())
    for controller in (a, b):
        controller.update(0.05, 100)
    assert a.value == b.value != 0.5
    # 0.5 * (1 + 0.2 * 0.1) * (1 - 0.2 * 0.1)
    assert a.value == pytest.approx(0.5 * 1.02 * 0.98)


def test_adaptive_controller_refuses_a_target_or_horizon_of_zero() -> None:
    with pytest.raises(ConfigError, match=r"(?s)^target_kl=0.*horizon=-1"):
        AdaptiveKLController(0.5, target_kl=0, horizon=-1)
