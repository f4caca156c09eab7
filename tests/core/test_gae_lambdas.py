"""GAE with two lambdas and with lambdas by length: by hand, against the textbook's double sum, and its properties."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, gae
from steepest.core.advantages.gae import length_adaptive_lambda

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
T, F = True, False
ALPHAS = st.sampled_from([None, 0.05, 0.4, 2.0])


def textbook(rewards: list[float], values: list[float], gamma: float, lam: float, last: float) -> list[float]:
    """A_t = sum over k of (gamma * lam)^k * delta_{t+k}, for one row without padding."""
    n = len(rewards)
    after = [*values[1:], last]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


def random_inputs(seed: int, num_rows: int = 6, width: int = 12) -> AdvantageInputs:
    """Ragged rows with holes, one of them empty; NaN wherever the mask is false."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (num_rows, 1), generator=generator)
    mask = (torch.arange(width) < lengths) & (torch.rand(num_rows, width, generator=generator) < 0.8)
    mask[-1] = False

    def noise() -> Tensor:
        return torch.randn(num_rows, width, generator=generator).masked_fill(~mask, math.nan)

    return AdvantageInputs(
        noise(),
        mask,
        values=noise(),
        final_values=torch.randn(num_rows, generator=generator),
        truncated=torch.rand(num_rows, generator=generator) < 0.5,
    )


def rows_of(x: AdvantageInputs, rows: Tensor | slice) -> AdvantageInputs:
    assert x.values is not None and x.final_values is not None and x.truncated is not None
    return AdvantageInputs(
        x.token_level_rewards[rows],
        x.response_mask[rows],
        values=x.values[rows],
        final_values=x.final_values[rows],
        truncated=x.truncated[rows],
    )


def three_tokens() -> AdvantageInputs:
    # gamma 1, rewards 0 0 1, values 0.5 0.25 0.75: deltas -0.25, 0.5, 0.25
    return AdvantageInputs(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[T, T, T]]), values=torch.tensor([[0.5, 0.25, 0.75]])
    )


def test_two_lambdas_by_hand() -> None:
    # advantages, lam 0.5:  0.25 | 0.5 + 0.5 * 0.25 = 0.625 | -0.25 + 0.5 * 0.625 = 0.0625
    # returns, lam 1:       0.25 + 0.75 = 1 | 0.75 + 0.25 = 1 | 0.5 + 0.5 = 1, the reward to go
    advantages, returns = gae(three_tokens(), gamma=1.0, lam=0.5, lam_critic=1.0)
    assert_close(advantages, torch.tensor([[0.0625, 0.625, 0.25]]))
    assert_close(returns, torch.tensor([[1.0, 1.0, 1.0]]))


def test_lambda_by_length_by_hand() -> None:
    # alpha 2/3 and three tokens: lam_actor = 1 - 1 / 2 = 0.5; the returns keep lam = 0, so R_t = r_t + V_{t+1}
    advantages, returns = gae(three_tokens(), gamma=1.0, lam=0.0, length_adaptive_alpha=2 / 3)
    assert_close(advantages, torch.tensor([[0.0625, 0.625, 0.25]]))
    assert_close(returns, torch.tensor([[0.25, 0.75, 1.0]]))


def test_the_length_is_that_of_the_policys_tokens() -> None:
    # the row above with a tool token inside and padding, beside a row of one token, whose lambda would be -0.5: 0
    n = math.nan
    x = AdvantageInputs(
        torch.tensor([[0.0, n, 0.0, 1.0, n], [2.0, n, n, n, n]]),
        torch.tensor([[T, F, T, T, F], [T, F, F, F, F]]),
        values=torch.tensor([[0.5, n, 0.25, 0.75, n], [0.5, n, n, n, n]]),
    )
    advantages, returns = gae(x, gamma=1.0, lam=0.0, lam_critic=1.0, length_adaptive_alpha=2 / 3)
    assert_close(advantages, torch.tensor([[0.0625, 0.0, 0.625, 0.25, 0.0], [1.5, 0.0, 0.0, 0.0, 0.0]]))
    assert_close(returns, torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0, 0.0]]))


def test_the_lambda_of_a_length() -> None:
    # VAPO's alpha: 100 tokens 1 - 1/5, 1000 tokens 1 - 1/50; at 20 tokens it reaches 0 and goes no lower; none: 0
    found = length_adaptive_lambda(torch.tensor([0, 1, 10, 20, 100, 1000]), 0.05)
    assert_close(found, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.8, 0.98]))


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_an_alpha_that_is_not_above_zero_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"length_adaptive_alpha={alpha}: must be above 0"):
        gae(three_tokens(), gamma=1.0, lam=1.0, length_adaptive_alpha=alpha)


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.9]), st.sampled_from([None, 0.0, 0.7]), ALPHAS, st.booleans())
@PROPERTY
def test_both_lambdas_equal_the_textbook_on_each_unpadded_row(
    seed: int, gamma: float, lam_critic: float | None, alpha: float | None, bootstrap: bool
) -> None:
    x = random_inputs(seed)
    assert x.values is not None and x.final_values is not None and x.truncated is not None
    advantages, returns = gae(
        x, gamma=gamma, lam=0.5, lam_critic=lam_critic, length_adaptive_alpha=alpha, bootstrap_truncated=bootstrap
    )
    for row in range(len(x.response_mask)):
        mask = x.response_mask[row]
        rewards, values = x.token_level_rewards[row][mask].tolist(), x.values[row][mask].tolist()
        last = float(x.final_values[row]) if bootstrap and x.truncated[row] else 0.0
        lam = 0.5 if alpha is None else max(0.0, 1 - 1 / (alpha * len(rewards))) if rewards else 0.0
        wanted = textbook(rewards, values, gamma, lam, last)
        of_critic = textbook(rewards, values, gamma, 0.5 if lam_critic is None else lam_critic, last)
        assert_close(advantages[row][mask], torch.tensor(wanted), rtol=1e-5, atol=1e-5)
        targets = [a + v for a, v in zip(of_critic, values, strict=True)]
        assert_close(returns[row][mask], torch.tensor(targets), rtol=1e-5, atol=1e-5)
        assert advantages[row][~mask].eq(0).all() and returns[row][~mask].eq(0).all()


@given(st.integers(0, 10_000), ALPHAS)
@PROPERTY
def test_a_row_stands_alone_and_padding_and_order_change_nothing(seed: int, alpha: float | None) -> None:
    """What `by_row` promises: the critic's one update asks for the returns of some rows at a time."""
    x = random_inputs(seed)
    options = {"gamma": 0.9, "lam": 0.8, "lam_critic": 1.0, "length_adaptive_alpha": alpha}
    advantages, returns = gae(x, **options)
    for row in range(len(x.response_mask)):
        alone = gae(rows_of(x, slice(row, row + 1)), **options)
        assert_close(alone[0][0], advantages[row], rtol=0, atol=0)
        assert_close(alone[1][0], returns[row], rtol=0, atol=0)
    order = torch.randperm(len(x.response_mask), generator=torch.Generator().manual_seed(seed))
    moved = gae(rows_of(x, order), **options)
    assert_close(moved[0], advantages[order], rtol=0, atol=0)
    assert_close(moved[1], returns[order], rtol=0, atol=0)
    assert x.values is not None
    pad = torch.nn.functional.pad
    wider = AdvantageInputs(
        pad(x.token_level_rewards, (2, 3), value=math.nan),
        pad(x.response_mask, (2, 3)),
        values=pad(x.values, (2, 3), value=math.nan),
    )
    assert_close(gae(wider, **options)[0][:, 2:-3], advantages, rtol=0, atol=0)


def test_without_the_options_there_is_one_lambda() -> None:
    x = random_inputs(3)
    plain = gae(x, gamma=0.9, lam=0.8)
    same = gae(x, gamma=0.9, lam=0.8, lam_critic=0.8)
    assert_close(same, plain, rtol=0, atol=0)
    known = torch.where(x.response_mask, torch.nan_to_num(x.values), 0.0)
    assert_close(plain[1], plain[0] + known, rtol=0, atol=0)


def test_gae_stays_an_estimator_of_single_rows() -> None:
    entry = ADVANTAGE_ESTIMATORS.get("gae")
    assert entry.spec.by_row is True
    options = inspect.signature(entry.value).parameters
    assert options["lam_critic"].default is None and options["length_adaptive_alpha"].default is None
