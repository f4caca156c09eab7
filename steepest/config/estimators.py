"""The options of the advantage estimators, as their functions get them."""

from __future__ import annotations

from typing import Any

from steepest.config.algorithms import EstimatorSpec, option_values
from steepest.config.reward_functions import functions_of
from steepest.config.schema import Config

_WEIGHTS = "gdpo_reward_weights"


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
    keyword = spec.options.get(_WEIGHTS)
    if keyword is not None:
        del values[keyword]
        if "named_rewards" in spec.needs:
            values[keyword] = tuple(named_rewards(c).values())
    return values
