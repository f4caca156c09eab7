"""Rules about advantages that several rewards make. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.config.algorithms import ESTIMATORS, EstimatorSpec
from steepest.config.estimators import named_rewards
from steepest.config.resolve import IsSet
from steepest.config.reward_functions import KEY, function_problems
from steepest.config.rules import Rule, rule
from steepest.config.schema import Config

ADVANTAGE_RULES: list[Rule] = []
ESTIMATOR, KEYS, WEIGHTS = "algorithm.adv_estimator", "algorithm.gdpo_reward_keys", "algorithm.gdpo_reward_weights"
OVERLONG = "overlong_reward"
"""The part of a reward that reward.overlong_buffer reports."""


def _spec(c: Config) -> EstimatorSpec:
    return ESTIMATORS.assume(c.algorithm.adv_estimator)


@rule(ESTIMATOR, KEYS, WEIGHTS, KEY, table=ADVANTAGE_RULES)
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


@rule(ESTIMATOR, "algorithm.use_kl_in_reward", table=ADVANTAGE_RULES)
def rewards_by_name_have_no_kl(c: Config, is_set: IsSet) -> Iterator[str]:
    spec = _spec(c)
    if not spec.reads_scores and c.algorithm.use_kl_in_reward:
        yield (
            f"algorithm.use_kl_in_reward=True with {ESTIMATOR}={spec.name}: it reads rewards by name, and the KL "
            "penalty is in none of them, so it would change nothing. Use actor_rollout_ref.actor.use_kl_loss=True."
        )


@rule(ESTIMATOR, KEYS, "reward.overlong_buffer.enable", table=ADVANTAGE_RULES)
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


@rule(ESTIMATOR, "algorithm.mask_equal_groups", table=ADVANTAGE_RULES)
def rewards_by_name_judge_groups_each(c: Config, is_set: IsSet) -> Iterator[str]:
    spec = _spec(c)
    if not spec.reads_scores and c.algorithm.mask_equal_groups:
        yield (
            f"algorithm.mask_equal_groups=True with {ESTIMATOR}={spec.name}: responses whose scores are equal in sum "
            f"may differ in every reward, and {spec.name} learns from that. Remove it."
        )
