"""`algorithm`: from rewards to advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steepest.config.algorithms import ESTIMATORS, AdvEstimatorName, EstimatorSpec, option_values
from steepest.config.checks import ROLLOUT, IsSet, NoEffect, Section
from steepest.config.sections.correction import RolloutCorrectionConfig
from steepest.config.sections.kl import KLControlConfig, KLKind
from steepest.config.sections.reward import KEY, function_problems, functions_of
from steepest.config.sections.row_selection import FilterGroupsConfig, PFPPOConfig
from steepest.config.types import DERIVED, PositiveFloat, Share

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()
ESTIMATOR, KEYS, WEIGHTS = "algorithm.adv_estimator", "algorithm.gdpo_reward_keys", "algorithm.gdpo_reward_weights"
OVERLONG = "overlong_reward"
"""The part of a reward that reward.overlong_buffer reports."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """`algorithm`: from rewards to advantages."""

    adv_estimator: AdvEstimatorName = "gae"
    """gae (PPO, with a critic), reinforce_plus_plus (no critic, no groups), remax (no critic; one greedy response
    more to each prompt), or of groups of responses to one prompt, no critic: grpo, gdpo (several rewards), grpo_passk,
    rloo, opo, gpg, reinforce_plus_plus_baseline, optimal_token_baseline; or `module:function` of your own."""
    gamma: Share = 1.0
    """Discount a token (gae, reinforce_plus_plus)."""
    lam: Share = 1.0
    """GAE's lambda."""
    lam_critic: Share | None = None
    """Lambda of the critic's returns, apart from the advantages' (decoupled GAE; VC-PPO and VAPO: 1.0, with lam=0.95 or
    length_adaptive_alpha). null: lam. Ours, not verl's."""
    length_adaptive_alpha: PositiveFloat | None = None
    """Lambda of the advantages by the response's length in tokens: 1 - 1 / (alpha * length), at least 0 (VAPO: 0.05,
    for answers of thousands of tokens). null: lam. Ours, not verl's."""
    bootstrap_truncated: bool = False
    """A response cut at the length limit ends with the critic's value of its last state instead of 0 (gae)."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation (grpo, gdpo, grpo_passk); off: Dr. GRPO."""
    gdpo_reward_keys: tuple[str, ...] | None = None
    """The rewards that gdpo scales within their groups, two or more: names of `reward.functions`, or of parts that a
    reward reports. null: all of `reward.functions`."""
    gdpo_reward_weights: tuple[float, ...] | None = None
    """Their weights in the sum, after the scaling. null: those of `reward.functions`, 1 for other names; verl: 1 for
    all, which would reward what a negative weight is to punish."""
    use_kl_in_reward: bool = DERIVED
    """Subtract the KL to the reference from the reward. null: on when `kl_ctrl.kl_coef` is above 0 and either you
    gave it or `adv_estimator` is gae. verl: off."""
    kl_penalty: KLKind = "kl"
    """Estimator of that KL; kl = k1, mse = k2, low_var_kl = k3."""
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    mask_equal_groups: bool = False
    """Leave prompts whose responses all score alike out of losses and denominators. Ours, not verl's."""
    mask_truncated: bool = False
    """Leave responses cut at the length limit out of losses, groups and denominators (DAPO's overlong filtering). Ours,
    not verl's."""
    use_pf_ppo: bool = False
    """Update on responses drawn from the batch by their score (PF-PPO)."""
    pf_ppo: PFPPOConfig = field(default_factory=PFPPOConfig)


def named_rewards(c: Config) -> dict[str, float]:
    """The rewards that gdpo reads, each with its weight; those of `reward.functions` where no others are named."""
    functions = {function.label: function.weight for function in functions_of(c.reward.functions)}
    keys = c.algorithm.gdpo_reward_keys
    names = tuple(functions) if keys is None else keys
    weights = c.algorithm.gdpo_reward_weights
    if weights is None:
        return {name: functions.get(name, 1.0) for name in names}
    return dict(zip(names, weights, strict=False))


def estimator_options(spec: EstimatorSpec, c: Config) -> dict[str, Any]:
    """Keyword -> value. Weights are those of `named_rewards`; an estimator that reads none has no weights either."""
    values = option_values(spec, c.algorithm)
    keyword = spec.options.get("gdpo_reward_weights")
    if keyword is not None:
        del values[keyword]
        if "named_rewards" in spec.needs:
            values[keyword] = tuple(named_rewards(c).values())
    return values


@SECTION.rule("algorithm.adv_estimator", f"{ROLLOUT}.n")
def estimators_need_groups(c: Config, is_set: IsSet) -> Iterator[str]:
    name = c.algorithm.adv_estimator
    if ESTIMATORS.assume(name).in_groups and c.actor_rollout_ref.rollout.n < 2:
        yield (
            f"{ROLLOUT}.n=1 with algorithm.adv_estimator={name}: a group of one has no baseline, "
            f"so every advantage is zero. Use {ROLLOUT}.n >= 2."
        )


@SECTION.rule(ESTIMATOR, KEYS, WEIGHTS, KEY)
def enough_rewards_are_named(c: Config, is_set: IsSet) -> Iterator[str]:
    spec = _spec(c)
    if "named_rewards" not in spec.needs or function_problems(c.reward.functions):
        return
    names, weights = c.algorithm.gdpo_reward_keys, c.algorithm.gdpo_reward_weights
    known = list(named_rewards(c)) if names is None else list(names)
    said = f"{KEYS}={'null' if names is None else '[' + ','.join(names) + ']'}"
    if len(set(known)) < len(known):
        yield f"{said}: one of them twice. Give it once, with its whole weight in {WEIGHTS}."
    elif spec.several_rewards and len(known) < 2:
        yield (
            f"{said} with {ESTIMATOR}={spec.name}: it scales several rewards, each in its group, and there is "
            f"{len(known) or 'none'}. Name two or more in {KEY} or here, or use {ESTIMATOR}=grpo for one."
        )
    elif weights is not None and len(weights) != len(known):
        yield f"{WEIGHTS} has {len(weights)} numbers for the {len(known)} rewards {', '.join(known)}. Give one each."
    elif weights is not None and 0.0 in weights:
        yield f"{WEIGHTS}: weight 0 changes nothing. Remove {known[weights.index(0.0)]} from {KEYS}."


@SECTION.rule(ESTIMATOR, "algorithm.use_kl_in_reward")
def rewards_by_name_have_no_kl(c: Config, is_set: IsSet) -> Iterator[str]:
    spec = _spec(c)
    if not spec.reads_scores and c.algorithm.use_kl_in_reward:
        yield (
            f"algorithm.use_kl_in_reward=True with {ESTIMATOR}={spec.name}: it reads rewards by name, and the KL "
            "penalty is in none of them, so it would change nothing. Use actor_rollout_ref.actor.use_kl_loss=True."
        )


@SECTION.rule(ESTIMATOR, KEYS, "reward.overlong_buffer.enable")
def rewards_by_name_have_the_overlong_penalty(c: Config, is_set: IsSet) -> Iterator[str]:
    spec, buffer = _spec(c), c.reward.overlong_buffer
    if (
        not spec.reads_scores
        and buffer.enable
        and not (buffer.log and OVERLONG in (c.algorithm.gdpo_reward_keys or ()))
    ):
        yield (
            f"reward.overlong_buffer.enable=True with {ESTIMATOR}={spec.name}: it reads rewards by name, so the "
            f"penalty would change nothing. Name it in {KEYS} as {OVERLONG}, with reward.overlong_buffer.log=True."
        )


@SECTION.rule(ESTIMATOR, "algorithm.mask_equal_groups")
def rewards_by_name_judge_groups_each(c: Config, is_set: IsSet) -> Iterator[str]:
    spec = _spec(c)
    if not spec.reads_scores and c.algorithm.mask_equal_groups:
        yield (
            f"algorithm.mask_equal_groups=True with {ESTIMATOR}={spec.name}: responses whose scores are equal in sum "
            f"may differ in every reward, and {spec.name} learns from that. Remove it."
        )


def _spec(c: Config) -> EstimatorSpec:
    return ESTIMATORS.assume(c.algorithm.adv_estimator)


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    """One entry for all keys that the same estimators read, and those that two other keys leave without effect."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in ESTIMATORS.option_keys():
        groups.setdefault(ESTIMATORS.takers(key), []).append(key)
    return [
        NoEffect(
            ("algorithm.bootstrap_truncated",),
            lambda c: c.algorithm.mask_truncated,
            "algorithm.mask_truncated leaves truncated responses out",
        ),
        *(
            NoEffect(
                tuple(f"algorithm.{key}" for key in keys),
                _is_of_others(keys[0]),
                f"algorithm.adv_estimator is {_no_one_of(takers)}",
            )
            for takers, keys in groups.items()
        ),
        NoEffect(
            ("algorithm.lam",),
            lambda c: c.algorithm.lam_critic is not None and c.algorithm.length_adaptive_alpha is not None,
            "length_adaptive_alpha gives the advantages' lambda and lam_critic the returns'",
        ),
    ]


def _is_of_others(key: str) -> Callable[[Any], bool]:
    return lambda c: not ESTIMATORS.takes(c.algorithm.adv_estimator, key)


def _no_one_of(names: tuple[str, ...]) -> str:
    """`not a`, or `none of a, b and c`."""
    *others, last = names
    return f"none of {', '.join(others)} and {last}" if others else f"not {last}"
