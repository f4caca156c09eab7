"""ReMax: by hand, against a loop over the response, an unbiased gradient by enumeration, and its properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, remax

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
T, F = True, False


def random_inputs(seed: int, num_rows: int = 6, width: int = 7) -> AdvantageInputs:
    """Rewards at every token, holes, an empty row whose baseline failed, NaN wherever the mask is false."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_rows, width, generator=generator) < 0.7
    mask[-1] = False
    rewards = torch.randn(num_rows, width, generator=generator).masked_fill(~mask, math.nan)
    baselines = torch.randn(num_rows, generator=generator)
    baselines[-1] = math.nan
    return AdvantageInputs(rewards, mask, extras={"reward_baselines": baselines})


def test_by_hand() -> None:
    # Row 0, baseline 0.5: rewards -0.1, -0.2, 1 (a KL penalty and the score), a tool token between them
    #   G = 0.7, 0.8, 1.0        A = 0.2, 0.3, 0.5
    # Row 1, baseline 1 (the greedy response was right, the sampled one wrong): G = 0, A = -1
    n = math.nan
    x = AdvantageInputs(
        torch.tensor([[-0.1, n, -0.2, 1.0], [0.0, n, n, n]]),
        torch.tensor([[T, F, T, T], [T, F, F, F]]),
        extras={"reward_baselines": torch.tensor([0.5, 1.0])},
    )
    advantages, returns = remax(x)
    assert_close(advantages, torch.tensor([[0.2, 0.0, 0.3, 0.5], [-1.0, 0.0, 0.0, 0.0]]))
    assert_close(returns, torch.tensor([[0.7, 0.0, 0.8, 1.0], [0.0, 0.0, 0.0, 0.0]]))


@given(st.integers(0, 10_000))
@PROPERTY
def test_equals_the_sum_of_what_follows(seed: int) -> None:
    x = random_inputs(seed)
    advantages, returns = remax(x)
    baselines = x.extras["reward_baselines"]
    for row, mask in enumerate(x.response_mask.tolist()):
        for t, is_true in enumerate(mask):
            follow = [float(x.token_level_rewards[row, u]) for u in range(t, len(mask)) if mask[u]]
            wanted = sum(follow) if is_true else 0.0
            assert float(returns[row, t]) == pytest.approx(wanted, abs=1e-5)
            less = wanted - float(baselines[row]) if is_true else 0.0
            assert float(advantages[row, t]) == pytest.approx(less, abs=1e-5)


@given(st.integers(0, 10_000), st.floats(-3, 3))
@PROPERTY
def test_padding_order_and_a_constant_change_nothing(seed: int, constant: float) -> None:
    x = random_inputs(seed)
    baselines = x.extras["reward_baselines"]
    advantages, returns = remax(x)
    order = torch.randperm(len(returns), generator=torch.Generator().manual_seed(seed))
    moved = remax(
        AdvantageInputs(
            x.token_level_rewards[order], x.response_mask[order], extras={"reward_baselines": baselines[order]}
        )
    )
    assert_close(moved, (advantages[order], returns[order]), rtol=0, atol=0)
    pad = torch.nn.functional.pad
    wide = remax(
        AdvantageInputs(
            pad(x.token_level_rewards, (1, 2), value=math.nan),
            pad(x.response_mask, (1, 2)),
            extras={"reward_baselines": baselines},
        )
    )
    assert_close(wide[0][:, 1:-2], advantages, rtol=1e-6, atol=1e-6)
    # what every response to a prompt earns more, its greedy one too, is no reason to prefer any: the last reward moves
    last = torch.arange(x.response_mask.shape[1]) == (x.response_mask * torch.arange(1, 8)).argmax(1)[:, None]
    more = AdvantageInputs(
        torch.where(last, x.token_level_rewards + constant, x.token_level_rewards),
        x.response_mask,
        extras={"reward_baselines": x.extras["reward_baselines"] + constant},
    )
    assert_close(remax(more)[0], advantages, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """All answers of a policy over four words, each as often as it is sampled: the baseline adds nothing."""
    logits = torch.tensor([0.3, -0.2, 0.8, 0.1], requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.4, -0.5])
    (exact,) = torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)
    greedy = rewards[logits.argmax()].expand(4)
    x = AdvantageInputs(rewards[:, None], torch.ones(4, 1, dtype=torch.bool), extras={"reward_baselines": greedy})
    advantages, _ = remax(x)
    assert float(advantages[2]) == 0.0, "the greedy answer itself"
    surrogate = (logits.softmax(0).detach() * logits.log_softmax(0) * advantages[:, 0]).sum()
    (found,) = torch.autograd.grad(surrogate, logits)
    assert_close(found, exact)


def test_the_baseline_is_asked_for() -> None:
    entry = ADVANTAGE_ESTIMATORS.get("remax")
    assert entry.spec.needs == ("reward_baselines",) and not entry.spec.whitened
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"remax needs AdvantageInputs\.reward_baselines, which is None"):
        remax(AdvantageInputs(torch.zeros(2, 3), mask))
    with pytest.raises(ValueError, match=r"reward_baselines has shape \(3,\), expected \(2,\)"):
        AdvantageInputs(torch.zeros(2, 3), mask, extras={"reward_baselines": torch.zeros(3)})
