"""Advantage estimators beside verl's."""

from __future__ import annotations

import math

import pytest
import torch

from steepest.config.algorithms import EXTRAS
from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.core.masked import whiten
from steepest.errors import ConfigError
from tests.parity import verl_side
from tests.parity.batches import every_batch, padded_batches, rows
from tests.parity.conftest import Parity

pytestmark = pytest.mark.parity


def inputs(r, rewards, **more) -> AdvantageInputs:  # type: ignore[no-untyped-def]
    extras = {name: more.pop(name) for name in [*more] if name in EXTRAS}
    return AdvantageInputs(token_level_rewards=rewards, response_mask=r.mask, group_ids=r.groups, extras=extras, **more)


def ours(name: str):  # type: ignore[no-untyped-def]
    return ADVANTAGE_ESTIMATORS.get(name).value


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae(parity: Parity, gamma: float, lam: float) -> None:
    verl = verl_side.core_algos()
    for r in every_batch():
        advantages, returns = ours("gae")(inputs(r, r.token_rewards, values=r.values), gamma=gamma, lam=lam)
        theirs, theirs_returns = verl.compute_gae_advantage_return(r.token_rewards, r.values, r.ones, gamma, lam)
        parity.same("gae advantages", whiten(advantages, r.mask), theirs, r.mask)
        parity.same("gae returns", returns, theirs_returns, r.mask)


def test_a_nan_value_in_padding_reaches_every_token_of_verl_s_gae(parity: Parity) -> None:
    r = rows(2)
    values = torch.where(r.mask, r.values, math.nan)
    clean, _ = ours("gae")(inputs(r, r.token_rewards, values=r.values), gamma=1.0, lam=1.0)
    spoilt, _ = ours("gae")(inputs(r, r.token_rewards, values=values), gamma=1.0, lam=1.0)
    theirs, _ = verl_side.core_algos().compute_gae_advantage_return(r.token_rewards, values, r.ones, 1.0, 1.0)
    assert torch.equal(clean, spoilt) and torch.isnan(theirs).all()
    parity.differs("gae", "a NaN value in padding makes every advantage of verl's batch NaN; ignored here")


@pytest.mark.parametrize("norm", [True, False])
def test_grpo(parity: Parity, norm: bool) -> None:
    for r in every_batch():
        found, _ = ours("grpo")(inputs(r, r.outcome_rewards), norm_by_std=norm)
        for name in ("grpo", "grpo_vectorized"):
            theirs, _ = verl_side.estimate(name, r, r.outcome_rewards, norm_adv_by_std_in_grpo=norm)
            parity.same(f"{name}{'' if norm else ' without std'}", found, theirs)


def test_a_group_of_one_is_the_raw_reward_in_verl_and_refused_here(parity: Parity) -> None:
    r = rows(3)
    alone = torch.arange(len(r.mask))
    theirs, _ = verl_side.core_algos().compute_grpo_outcome_advantage(
        r.outcome_rewards.clone(), r.ones, alone.numpy(), epsilon=0.0
    )
    parity.same("grpo of a group of one, verl's number", theirs, r.outcome_rewards.sum(1)[:, None] * r.ones)
    with pytest.raises(ConfigError, match="a group of one has no baseline"):
        ours("grpo")(AdvantageInputs(r.outcome_rewards, r.mask, group_ids=alone))
    parity.differs(
        "grpo", "a group of one: verl's advantage is the raw reward, which pushes nothing down; refused here"
    )


def test_equal_rewards_leave_a_rest_in_verl_and_none_here(parity: Parity) -> None:
    """Eight rewards of 0.6 in float32: their computed mean is not 0.6, and the rest is divided by a tiny std."""
    mask = torch.ones(8, 1, dtype=torch.bool)
    rewards, groups = torch.full((8, 1), 0.6), torch.zeros(8, dtype=torch.int64)
    theirs, _ = verl_side.core_algos().compute_grpo_outcome_advantage(rewards.clone(), mask.float(), groups.numpy())
    found, _ = ours("grpo")(AdvantageInputs(rewards, mask, group_ids=groups))
    assert theirs.abs().max() > 0.01 and torch.equal(found, torch.zeros(8, 1))
    why = f"eight rewards of 0.6 in float32: verl's advantage is {float(theirs[0, 0]):.2g}, all rounding; 0 here"
    parity.differs("grpo", why)


def test_a_reward_at_a_masked_position_counts_in_verl(parity: Parity) -> None:
    r = rows(4)
    row = int((~r.mask).any(1).nonzero()[0])
    column = int((~r.mask[row]).nonzero()[0])
    spoilt = r.outcome_rewards.clone()
    spoilt[row, column] += 5.0
    clean, _ = ours("grpo")(inputs(r, r.outcome_rewards))
    found, _ = ours("grpo")(inputs(r, spoilt))
    theirs, _ = verl_side.estimate("grpo", r, spoilt)
    assert torch.equal(clean, found) and float((theirs - clean)[row].abs().max()) > 0.1
    parity.differs("grpo", "a reward at a masked position is part of verl's sum; ignored here")


@pytest.mark.parametrize("name", ["rloo", "opo"])
def test_baselines_of_groups(parity: Parity, name: str) -> None:
    for r in every_batch():
        found, _ = ours(name)(inputs(r, r.outcome_rewards))
        parity.same(name, found, verl_side.estimate(name, r, r.outcome_rewards)[0])
        if name == "rloo":
            parity.same("rloo_vectorized", found, verl_side.estimate("rloo_vectorized", r, r.outcome_rewards)[0])


def test_reinforce_plus_plus_baseline(parity: Parity) -> None:
    for r in every_batch():
        found, _ = ours("reinforce_plus_plus_baseline")(inputs(r, r.outcome_rewards))
        theirs, _ = verl_side.estimate("reinforce_plus_plus_baseline", r, r.outcome_rewards)
        parity.same("reinforce_plus_plus_baseline", whiten(found, r.mask), theirs)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(parity: Parity, gamma: float) -> None:
    verl = verl_side.core_algos().compute_reinforce_plus_plus_outcome_advantage
    for r in every_batch():
        found, returns = ours("reinforce_plus_plus")(inputs(r, r.token_rewards), gamma=gamma)
        theirs, theirs_returns = verl(r.token_rewards, r.ones, verl_side.algo_config(gamma=gamma))
        parity.same("reinforce_plus_plus advantages", whiten(found, r.mask), theirs)
        parity.same("reinforce_plus_plus returns", returns, theirs_returns)


@pytest.mark.parametrize("norm", [True, False])
def test_grpo_passk(parity: Parity, norm: bool) -> None:
    config = verl_side.algo_config(norm_adv_by_std_in_grpo=norm)
    for r in every_batch():
        found, _ = ours("grpo_passk")(inputs(r, r.outcome_rewards), norm_by_std=norm)
        parity.same("grpo_passk", found, verl_side.estimate("grpo_passk", r, r.outcome_rewards, config=config)[0])


def test_optimal_token_baseline(parity: Parity) -> None:
    for r in padded_batches():
        for weights in (None, (r.old_log_probs - r.rollout_log_probs).exp()):
            more = {"old_log_probs": r.old_log_probs, "sum_pi_squared": r.sum_pi_squared, "rollout_is_weights": weights}
            found, returns = ours("optimal_token_baseline")(inputs(r, r.token_rewards, **more))
            for name in ("optimal_token_baseline", "tir_optimal_token_baseline"):
                theirs, theirs_returns = verl_side.estimate(name, r, r.token_rewards, **more)
                parity.same(name, found, theirs)
                parity.same(f"{name} returns", returns, theirs_returns, r.mask)


def test_places_of_the_optimal_token_baseline_are_columns_in_verl(parity: Parity) -> None:
    r = rows(1, holes=True)
    more = {"old_log_probs": r.old_log_probs, "sum_pi_squared": r.sum_pi_squared}
    found, _ = ours("optimal_token_baseline")(inputs(r, r.token_rewards, **more))
    parity.same("tir_optimal_token_baseline", found, verl_side.estimate(
        "tir_optimal_token_baseline", r, r.token_rewards, **more)[0])  # fmt: skip
    by_column, _ = verl_side.estimate("optimal_token_baseline", r, r.token_rewards, **more)
    assert float((by_column - found)[r.mask].abs().max()) > 1e-3
    parity.differs(
        "optimal_token_baseline", "tool tokens: verl counts places by column; by policy token here and in tir_"
    )


def test_remax(parity: Parity) -> None:
    verl = verl_side.core_algos().compute_remax_outcome_advantage
    for r in every_batch():
        baselines = r.values[:, 0]
        found, returns = ours("remax")(inputs(r, r.token_rewards, reward_baselines=baselines))
        theirs, theirs_returns = verl(r.token_rewards, baselines, r.ones)
        parity.same("remax", found, theirs, r.mask)
        parity.same("remax returns", returns, theirs_returns, r.mask)


def test_gdpo_whitens_over_tokens_in_verl(parity: Parity) -> None:
    """Before the batch's scale both have the same sum of normalised rewards; verl's is then whitened over tokens."""
    keys, weights = ["right", "form"], (1.0, 0.5)
    for r in padded_batches():
        rewards = torch.stack([r.outcome_rewards.sum(1), (r.values[:, 0] > 0).double()], dim=1).float()
        prompt = torch.ones(len(r.mask), 2, dtype=torch.int64)
        theirs, _ = verl_side.core_algos().compute_gdpo_outcome_advantage(
            r.outcome_rewards.float(), r.ones.float(), r.groups.numpy(),
            config=verl_side.algo_config(gdpo_reward_keys=keys, gdpo_reward_weights=list(weights)),
            non_tensor_batch={key: rewards[:, i].numpy() for i, key in enumerate(keys)},
            batch={"prompts": prompt, "attention_mask": torch.cat([prompt, r.mask.long()], dim=1)},
        )  # fmt: skip
        found, _ = ours("gdpo")(inputs(r, r.outcome_rewards.float(), named_rewards=rewards), weights=weights)
        # whitening takes our scale out again, so what is left to compare is the sum
        parity.same("gdpo, whitened as verl's", whiten(found, r.mask), theirs, r.mask)
    assert abs(float(found[r.mask].mean())) > 1e-3 and abs(float(theirs[r.mask].mean())) < 1e-5
    parity.differs("gdpo", "verl whitens over tokens, so a group of equal rewards gets an advantage; exactly 0 here")


def test_gpg(parity: Parity) -> None:
    """Both are the distance from the mean times one number; verl's number is rows / rows of reward above 0."""
    for r in every_batch():
        found, _ = ours("gpg")(inputs(r, r.outcome_rewards))
        theirs, _ = verl_side.estimate("gpg", r, r.outcome_rewards)
        parity.same("gpg, every reward above 0 and every group varied", found, theirs)
    hits = (r.outcome_rewards > 0.5).double()
    varied = torch.stack([hits.sum(1)[r.groups == g].unique().numel() > torch.ones(()) for g in range(4)]).double()
    found, _ = ours("gpg")(inputs(r, hits))
    theirs, _ = verl_side.estimate("gpg", r, hits)
    ratio = (4 / float(varied.sum())) / (len(hits) / float((hits.sum(1) > 0).sum()))
    assert ratio != pytest.approx(1.0)
    parity.same("gpg, rewards of 0 and 1, verl's number", found, theirs * ratio)
    parity.differs("gpg", "alpha: verl divides by the rows whose reward is not 0; by those of groups that differ here")


@pytest.mark.parametrize("name", ["rloo", "opo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline"])
def test_groups_of_one_are_refused(parity: Parity, name: str) -> None:
    r = rows(3)
    with pytest.raises(ConfigError, match="a group of one has no baseline"):
        ours(name)(AdvantageInputs(r.outcome_rewards, r.mask, group_ids=torch.arange(len(r.mask))))
    if name == "grpo_passk":  # there verl refuses too
        return
    alone = verl_side.core_algos().get_adv_estimator_fn(name)(
        token_level_rewards=r.outcome_rewards.clone(), response_mask=r.ones, index=torch.arange(len(r.mask)).numpy()
    )[0]
    assert alone.abs().sum() > 0
    parity.differs(name, "a group of one: verl has a baseline of 0; refused here")
