"""Rules about rewards: which functions, the reward model, the judge. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.config.resolve import IsSet
from steepest.config.reward_functions import JUDGE, KEY, REWARD_MODEL, function_problems
from steepest.config.rules import Rule, rule
from steepest.config.schema import Config

REWARD_RULES: list[Rule] = []
MODEL = "reward.reward_model"


@rule(KEY, table=REWARD_RULES)
def functions_are_rewards_with_weights(c: Config, is_set: IsSet) -> Iterator[str]:
    yield from function_problems(c.reward.functions)


@rule(KEY, "custom_reward_function.path", table=REWARD_RULES)
def one_way_to_score(c: Config, is_set: IsSet) -> Iterator[str]:
    custom = c.custom_reward_function
    if custom.path is not None and c.reward.functions:
        yield (
            f"custom_reward_function.path={custom.path}: it scores every row, and {KEY} says otherwise. Remove one; "
            f"in a sum your function is {{'{custom.path}:{custom.name}': 1.0}}."
        )


@rule(KEY, f"{MODEL}.enable", f"{MODEL}.model_path", table=REWARD_RULES)
def the_reward_model_is_there(c: Config, is_set: IsSet) -> Iterator[str]:
    model, named = c.reward.reward_model, REWARD_MODEL in c.reward.functions
    if bool(model.enable) != named:
        has = "names no" if model.enable else "names"
        yield f"{MODEL}.enable={model.enable}: {KEY} {has} reward_model. Make the two agree, or leave enable out."
    elif named and model.model_path is None:
        yield f"{KEY} names reward_model: set {MODEL}.model_path, the folder or hub id of the model."


@rule(KEY, "reward.judge.base_url", "reward.judge.model", table=REWARD_RULES)
def the_judge_is_there(c: Config, is_set: IsSet) -> Iterator[str]:
    judge = c.reward.judge
    if JUDGE not in c.reward.functions:
        return
    for name, value in (("base_url", judge.base_url), ("model", judge.model)):
        if not value:
            yield f"{KEY} names judge: set reward.judge.{name}."
    if judge.base_url and not judge.base_url.startswith(("http://", "https://")):
        yield f"reward.judge.base_url={judge.base_url}: expected an address that begins with http:// or https://."
