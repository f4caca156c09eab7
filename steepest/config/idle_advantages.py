"""Keys without effect about advantages: options that the estimator of the run does not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steepest.config.algorithms import ESTIMATORS
from steepest.config.idle import Idle


def advantage_idle() -> list[Idle]:
    """One entry for all keys that the same estimators read, and those that two other keys make idle."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in ESTIMATORS.option_keys():
        groups.setdefault(ESTIMATORS.takers(key), []).append(key)
    return [
        *(
            Idle(tuple(f"algorithm.{key}" for key in keys), _is_of_others(keys[0]), f"algorithm.adv_estimator is {who}")
            for takers, keys in groups.items()
            for who in [_no_one_of(takers)]
        ),
        Idle(
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
