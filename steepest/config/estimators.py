"""What the configuration knows of the advantage estimators: what they compare, and the options they take."""

from __future__ import annotations

from steepest.config.reward_functions import functions_of
from steepest.config.schema import Config

IN_GROUPS = (
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus_baseline",
    "rloo",
)
"""Estimators that compare the responses to one prompt, and need two of them."""

TAKES: dict[str, tuple[str, ...]] = {
    "gamma": ("gae", "reinforce_plus_plus"),
    "lam": ("gae",),
    "lam_critic": ("gae",),
    "length_adaptive_alpha": ("gae",),
    "norm_adv_by_std_in_grpo": ("gdpo", "grpo", "grpo_passk"),
}
"""Option of `algorithm` -> the estimators that take it."""


def takes(estimator: str, option: str) -> bool:
    """Whether an estimator takes an option of TAKES. One of the user's own may take any."""
    return ":" in estimator or estimator in TAKES[option]


def named_rewards(c: Config) -> dict[str, float]:
    """The rewards that gdpo reads, each with its weight; those of `reward.functions` where no others are named."""
    functions = {function.label: function.weight for function in functions_of(c.reward.functions)}
    keys = c.algorithm.gdpo_reward_keys
    names = tuple(functions) if keys is None else keys
    weights = c.algorithm.gdpo_reward_weights
    if weights is None:
        return {name: functions.get(name, 1.0) for name in names}
    return dict(zip(names, weights, strict=False))
