"""Rules about advantages that several rewards make. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.config.estimators import named_rewards
from steepest.config.resolve import IsSet
from steepest.config.reward_functions import KEY, function_problems
from steepest.config.rules import Rule, rule
from steepest.config.schema import Config

ADVANTAGE_RULES: list[Rule] = []
ESTIMATOR, KEYS, WEIGHTS = "algorithm.adv_estimator", "algorithm.gdpo_reward_keys", "algorithm.gdpo_reward_weights"
OVERLONG = "overlong_reward"
"""The part of a reward that reward.overlong_buffer reports."""


def _gdpo(c: Config) -> bool:
    return c.algorithm.adv_estimator == "gdpo"


@rule(ESTIMATOR, KEYS, WEIGHTS, KEY, table=ADVANTAGE_RULES)
def gdpo_has_several_rewards(c: Config, is_set: IsSet) -> Iterator[str]:
    if not _gdpo(c) or function_problems(c.reward.functions):
        return
    names, weights = c.algorithm.gdpo_reward_keys, c.algorithm.gdpo_reward_weights
    known = list(named_rewards(c)) if names is None else list(names)
    said = f"{KEYS}={'null' if names is None else '[' + ','.join(names) + ']'}"
    if len(set(known)) < len(known):
        yield f"{said}: one of them twice. Give it once, with its whole weight in {WEIGHTS}."
    elif len(known) < 2:
        yield (
            f"{said} with {ESTIMATOR}=gdpo: it scales several rewards, each in its group, and there is "
            f"{len(known) or 'none'}. Name two or more in {KEY} or here, or use {ESTIMATOR}=grpo for one."
        )
    elif weights is not None and len(weights) != len(known):
        yield f"{WEIGHTS} has {len(weights)} numbers for the {len(known)} rewards {', '.join(known)}. Give one each."
    elif weights is not None and 0.0 in weights:
        yield f"{WEIGHTS}: weight 0 changes nothing. Remove {known[weights.index(0.0)]} from {KEYS}."


@rule(ESTIMATOR, "algorithm.use_kl_in_reward", table=ADVANTAGE_RULES)
def gdpo_has_no_kl_in_the_reward(c: Config, is_set: IsSet) -> Iterator[str]:
    if _gdpo(c) and c.algorithm.use_kl_in_reward:
        yield (
            f"algorithm.use_kl_in_reward=True with {ESTIMATOR}=gdpo: it reads rewards by name, and the KL penalty "
            "is in none of them, so it would change nothing. Use actor_rollout_ref.actor.use_kl_loss=True."
        )


@rule(ESTIMATOR, KEYS, "reward.overlong_buffer.enable", table=ADVANTAGE_RULES)
def gdpo_knows_the_overlong_penalty(c: Config, is_set: IsSet) -> Iterator[str]:
    buffer = c.reward.overlong_buffer
    if _gdpo(c) and buffer.enable and not (buffer.log and OVERLONG in (c.algorithm.gdpo_reward_keys or ())):
        yield (
            f"reward.overlong_buffer.enable=True with {ESTIMATOR}=gdpo: it reads rewards by name, so the penalty would "
            f"change nothing. Name it in {KEYS} as {OVERLONG}, with reward.overlong_buffer.log=True."
        )


@rule(ESTIMATOR, "algorithm.mask_equal_groups", table=ADVANTAGE_RULES)
def gdpo_judges_groups_by_each_reward(c: Config, is_set: IsSet) -> Iterator[str]:
    if _gdpo(c) and c.algorithm.mask_equal_groups:
        yield (
            f"algorithm.mask_equal_groups=True with {ESTIMATOR}=gdpo: responses whose scores are equal in sum may "
            "differ in every reward, and gdpo learns from that. Remove it."
        )
