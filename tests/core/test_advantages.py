"""GAE against a textbook sum on each unpadded row; GRPO against arithmetic by hand."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, gae, grpo
from steepest.errors import ConfigError

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
T, F = True, False


def textbook_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float, last_value: float = 0.0
) -> list[float]:
    """A_t = sum over l of (gamma * lam)^l * delta_{t+l}, written as the double sum, for one row without padding."""
    n = len(rewards)
    after = [*values[1:], last_value]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


def random_inputs(seed: int, *, holes: bool = True, num_rows: int = 5, width: int = 9) -> AdvantageInputs:
    """Rows of many lengths, one of them fully masked, tool tokens inside; NaN wherever the mask is false."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (num_rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    if holes:
        mask &= torch.rand(num_rows, width, generator=generator) < 0.7
    mask[-1] = False
    mask[0, 0] = True

    def noise() -> Tensor:
        return torch.randn(num_rows, width, generator=generator).masked_fill(~mask, math.nan)

    return AdvantageInputs(
        token_level_rewards=noise(),
        response_mask=mask,
        values=noise(),
        final_values=torch.randn(num_rows, generator=generator),
        truncated=torch.rand(num_rows, generator=generator) < 0.5,
        group_ids=torch.zeros(num_rows, dtype=torch.int64),
    )


def rows_of(x: AdvantageInputs, rows: Tensor) -> AdvantageInputs:
    assert x.values is not None and x.final_values is not None and x.truncated is not None and x.group_ids is not None
    return AdvantageInputs(
        x.token_level_rewards[rows], x.response_mask[rows], x.values[rows], x.group_ids[rows],
        x.final_values[rows], x.truncated[rows],
    )  # fmt: skip


def test_gae_by_hand() -> None:
    # gamma 0.5, lam 0.5, rewards 0 0 1, values 0.5 0.25 0.75
    #   t=2: delta = 1 + 0 - 0.75                 = 0.25     A = 0.25                    R = 1.0
    #   t=1: delta = 0 + 0.5 * 0.75 - 0.25        = 0.125    A = 0.125 + 0.25 * 0.25     = 0.1875    R = 0.4375
    #   t=0: delta = 0 + 0.5 * 0.25 - 0.5         = -0.375   A = -0.375 + 0.25 * 0.1875  = -0.328125 R = 0.171875
    x = AdvantageInputs(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[T, T, T]]), values=torch.tensor([[0.5, 0.25, 0.75]])
    )
    advantages, returns = gae(x, gamma=0.5, lam=0.5)
    assert_close(advantages, torch.tensor([[-0.328125, 0.1875, 0.25]]))
    assert_close(returns, torch.tensor([[0.171875, 0.4375, 1.0]]))


def test_gae_steps_over_tool_tokens() -> None:
    # The row of the test above with two tool tokens inside and one after: the same numbers at the policy's tokens.
    n = math.nan
    x = AdvantageInputs(
        torch.tensor([[0.0, n, n, 0.0, 1.0, n]]),
        torch.tensor([[T, F, F, T, T, F]]),
        values=torch.tensor([[0.5, n, 7.0, 0.25, 0.75, n]]),
    )
    advantages, returns = gae(x, gamma=0.5, lam=0.5)
    assert_close(advantages, torch.tensor([[-0.328125, 0.0, 0.0, 0.1875, 0.25, 0.0]]))
    assert_close(returns, torch.tensor([[0.171875, 0.0, 0.0, 0.4375, 1.0, 0.0]]))


def test_gae_with_gamma_and_lam_one_is_reward_to_go_minus_value() -> None:
    x = AdvantageInputs(
        torch.tensor([[0.1, 0.2, 1.0]]), torch.tensor([[T, T, T]]), values=torch.tensor([[0.5, 0.25, 0.75]])
    )
    advantages, returns = gae(x, gamma=1.0, lam=1.0)
    # rewards to go 1.3, 1.2, 1.0
    assert_close(returns, torch.tensor([[1.3, 1.2, 1.0]]))
    assert_close(advantages, torch.tensor([[0.8, 0.95, 0.25]]))


def test_only_a_truncated_row_bootstraps_and_only_when_asked() -> None:
    # Trap 7. Two rows, equal but for the finish reason. gamma 0.5, lam 1, value 0.5 at each token, final value 4.
    #   ended:     t=1: 0 + 0 - 0.5 = -0.5                     t=0: 0 + 0.5 * 0.5 - 0.5 + 0.5 * -0.5 = -0.5
    #   truncated: t=1: 0 + 0.5 * 4 - 0.5 = 1.5                t=0: -0.25 + 0.5 * 1.5 = 0.5
    x = AdvantageInputs(
        torch.zeros(2, 3),
        torch.tensor([[T, T, F], [T, T, F]]),
        values=torch.full((2, 3), 0.5),
        final_values=torch.tensor([4.0, 4.0]),
        truncated=torch.tensor([F, T]),
    )
    advantages, returns = gae(x, gamma=0.5, lam=1.0, bootstrap_truncated=True)
    assert_close(advantages, torch.tensor([[-0.5, -0.5, 0.0], [0.5, 1.5, 0.0]]))
    assert_close(returns, torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]))
    plain, _ = gae(x, gamma=0.5, lam=1.0)
    assert_close(plain, torch.tensor([[-0.5, -0.5, 0.0], [-0.5, -0.5, 0.0]]))


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.9]), st.sampled_from([1.0, 0.95, 0.0]), st.booleans())
@PROPERTY
def test_gae_equals_the_textbook_on_each_unpadded_row(seed: int, gamma: float, lam: float, bootstrap: bool) -> None:
    x = random_inputs(seed)
    assert x.values is not None and x.final_values is not None and x.truncated is not None
    advantages, returns = gae(x, gamma=gamma, lam=lam, bootstrap_truncated=bootstrap)
    for row, mask in enumerate(x.response_mask):
        rewards, values = x.token_level_rewards[row][mask].tolist(), x.values[row][mask].tolist()
        last = float(x.final_values[row]) if bootstrap and bool(x.truncated[row]) else 0.0
        want = textbook_gae(rewards, values, gamma, lam, last)
        assert_close(advantages[row][mask], torch.tensor(want), rtol=1e-5, atol=1e-5)
        assert_close(
            returns[row][mask], torch.tensor([a + v for a, v in zip(want, values, strict=True)]), rtol=1e-5, atol=1e-5
        )
        assert not advantages[row][~mask].any()
        assert not returns[row][~mask].any()


@given(st.integers(0, 10_000), st.sampled_from([0, 1, 50]))
@PROPERTY
def test_gae_is_identical_under_padding_order_and_split(seed: int, num_pad: int) -> None:
    x = random_inputs(seed)
    assert x.values is not None and x.final_values is not None and x.truncated is not None
    want = gae(x, gamma=0.9, lam=0.95, bootstrap_truncated=True)
    pad = torch.full((len(x.response_mask), num_pad), math.nan)
    padded = AdvantageInputs(
        torch.cat([x.token_level_rewards, pad], 1),
        torch.cat([x.response_mask, torch.zeros_like(pad, dtype=torch.bool)], 1),
        values=torch.cat([x.values, pad], 1),
        final_values=x.final_values,
        truncated=x.truncated,
    )
    for got, expected in zip(gae(padded, gamma=0.9, lam=0.95, bootstrap_truncated=True), want, strict=True):
        assert torch.equal(got[:, : expected.shape[1]], expected)
        assert not got[:, expected.shape[1] :].any()
    order = torch.randperm(len(want[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = gae(rows_of(x, order), gamma=0.9, lam=0.95, bootstrap_truncated=True)
    parts = [gae(rows_of(x, rows), gamma=0.9, lam=0.95, bootstrap_truncated=True) for rows in order.split(2)]
    for i in range(2):
        assert torch.equal(shuffled[i], want[i][order])
        assert torch.equal(torch.cat([part[i] for part in parts]), want[i][order])


def test_gae_carries_no_gradient_and_leaves_its_inputs() -> None:
    x = random_inputs(0)
    assert x.values is not None
    x.values.requires_grad_()
    before = x.values.detach().clone()
    advantages, returns = gae(x, gamma=1.0, lam=1.0)
    assert not advantages.requires_grad and not returns.requires_grad
    assert torch.equal(x.values.detach().nan_to_num(), before.nan_to_num())


def group_of(rewards: list[float], group_ids: list[int] | None = None, width: int = 2) -> AdvantageInputs:
    """One row per reward, the reward on the last of two true tokens, then one padded column of NaN."""
    num_rows = len(rewards)
    per_token = torch.zeros(num_rows, width + 1)
    per_token[:, width - 1] = torch.tensor(rewards)
    per_token[:, width] = math.nan
    mask = torch.ones(num_rows, width + 1, dtype=torch.bool)
    mask[:, width] = False
    return AdvantageInputs(per_token, mask, group_ids=torch.tensor(group_ids or [7] * num_rows))


def test_grpo_one_of_eight_correct() -> None:
    # Trap 12. mean 1/8; deviations 7/8 and -1/8; sum of squares 49/64 + 7/64 = 7/8; n - 1 = 7; variance 1/8
    #   std 0.3535534; 0.875 / 0.3535544 = 2.474867, -0.125 / 0.3535544 = -0.353552
    advantages, returns = grpo(group_of([0, 0, 1, 0, 0, 0, 0, 0]))
    want = torch.full((8, 2), -0.353552)
    want[2] = 2.474867
    assert_close(advantages[:, :2], want, rtol=1e-5, atol=1e-6)
    assert not advantages[:, 2].any()
    assert torch.equal(returns, advantages)


def test_grpo_without_std_is_the_distance_from_the_mean() -> None:
    advantages, _ = grpo(group_of([0, 0, 1, 0]), norm_by_std=False)
    assert advantages[:, 0].tolist() == [-0.25, -0.25, 0.75, -0.25]


def test_grpo_eps_is_added_to_the_std() -> None:
    # deviations -1, 1; std sqrt(2); with eps 1: 1 / (sqrt(2) + 1) = 0.4142136
    advantages, _ = grpo(group_of([0, 2]), eps=1.0)
    assert_close(advantages[:, 0], torch.tensor([-0.4142136, 0.4142136]))


def test_grpo_sums_the_rewards_of_a_row() -> None:
    # rows sum to 0.75 + 0.25 = 1 and 0 + 0 = 0; deviations 0.5 and -0.5
    x = AdvantageInputs(
        torch.tensor([[0.75, 0.25], [0.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool), group_ids=torch.tensor([0, 0])
    )
    assert grpo(x, norm_by_std=False)[0].tolist() == [[0.5, 0.5], [-0.5, -0.5]]


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1e6 / 3, 1e-7])
@pytest.mark.parametrize("num_rows", [2, 3, 7])
def test_grpo_equal_rewards_give_exactly_zero(reward: float, num_rows: int) -> None:
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in fp32: a mean taken plainly would leave a rest, and std would blow it up
    for norm_by_std in (True, False):
        advantages, _ = grpo(group_of([reward] * num_rows), norm_by_std=norm_by_std)
        assert torch.equal(advantages, torch.zeros_like(advantages))


def test_grpo_group_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^n=1.*a group of one has no baseline.*Use n >= 2"):
        grpo(group_of([1.0, 0.0, 1.0], [0, 0, 1]))


def test_grpo_rows_without_tokens_are_outside_the_group() -> None:
    # rewards 0 and 2 count, the third row has no token: mean 1, not 2/3
    x = group_of([0.0, 2.0, 5.0])
    x.response_mask[2] = False
    advantages, _ = grpo(x, norm_by_std=False)
    assert advantages[:, 0].tolist() == [-1.0, 1.0, 0.0]
    # one counted row of two has no baseline left
    y = group_of([3.0, 5.0])
    y.response_mask[1] = False
    assert torch.equal(grpo(y)[0], torch.zeros(2, 3))


def test_grpo_groups_do_not_mix_whatever_their_order_and_ids() -> None:
    # group 40: rewards 1, 3 -> -1, 1.  group 5: rewards 10, 20, 60 -> mean 30 -> -20, -10, 30
    advantages, _ = grpo(group_of([10.0, 1.0, 20.0, 3.0, 60.0], [5, 40, 5, 40, 5]), norm_by_std=False)
    assert advantages[:, 0].tolist() == [-20.0, -1.0, -10.0, 1.0, 30.0]


@given(st.integers(0, 10_000), st.floats(-5, 5))
@PROPERTY
def test_grpo_ignores_order_padding_and_a_constant_added_to_a_group(seed: int, constant: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (8,), generator=generator).float()
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    want, _ = grpo(group_of(rewards.tolist(), ids.tolist()))
    order = torch.randperm(8, generator=generator)
    shuffled, _ = grpo(group_of(rewards[order].tolist(), ids[order].tolist()))
    assert_close(shuffled, want[order], rtol=1e-5, atol=1e-5)
    moved, _ = grpo(group_of((rewards + constant * (ids == 1)).tolist(), ids.tolist()))
    assert_close(moved, want, rtol=1e-4, atol=1e-4)  # the constant itself rounds the rewards
    longer, _ = grpo(group_of(rewards.tolist(), ids.tolist(), width=5))
    assert_close(longer[:, 4], want[:, 1], rtol=0, atol=0)


def test_the_registry_tells_needs_and_options() -> None:
    assert ADVANTAGE_ESTIMATORS.get("gae").spec.needs == ("values",)
    assert ADVANTAGE_ESTIMATORS.get("grpo").spec.needs == ("group_ids",)
    assert list(inspect.signature(ADVANTAGE_ESTIMATORS.get("gae").value).parameters) == [
        "x", "gamma", "lam", "lam_critic", "length_adaptive_alpha", "bootstrap_truncated",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"adv_estimator='gpro'.*Did you mean 'grpo'\? Known: gae, "):
        ADVANTAGE_ESTIMATORS.get("gpro")


def test_missing_and_misshapen_fields_are_named() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    x = AdvantageInputs(torch.zeros(2, 3), mask)
    with pytest.raises(ValueError, match=r"gae needs AdvantageInputs\.values"):
        gae(x, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"grpo needs AdvantageInputs\.group_ids"):
        grpo(x)
    with pytest.raises(ValueError, match=r"gae needs AdvantageInputs\.truncated"):
        gae(
            AdvantageInputs(torch.zeros(2, 3), mask, values=torch.zeros(2, 3)), gamma=1, lam=1, bootstrap_truncated=True
        )
    with pytest.raises(ValueError, match=r"values has shape \(2, 1\), expected \(2, 3\)"):
        AdvantageInputs(torch.zeros(2, 3), mask, values=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"group_ids has shape \(3,\), expected \(2,\)"):
        AdvantageInputs(torch.zeros(2, 3), mask, group_ids=torch.zeros(3))
