"""What a reward function is, what goes in and what comes out."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from steepest.registry import Registry

# The name is the `data_source` of a row. Fact `modes`: the values of `reward.mode` that the function takes as `mode=`.
# Fact `check_ground_truth`: called with a row's ground truth, raises for one that no answer could equal.
REWARDS = Registry("reward", "data_source")


def ground_truth_problem(data_source: str, ground_truth: Any) -> str | None:
    """What is wrong with a row's ground truth, by the reward registered for its data source; None when nothing is.

    Asked of every row before a model loads. A reward without the fact `check_ground_truth` takes anything.
    """
    if data_source not in REWARDS.names():
        return None
    check = REWARDS.get(data_source).facts.get("check_ground_truth")
    try:
        if check is not None:
            check(ground_truth)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


class RewardFunction(Protocol):
    """A reward function, built in or the user's; always called with these four keywords.

    Returns a number, a bool, or a mapping with "score" beside other numbers. May be `async def`.
    """

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]
    ) -> Any: ...


@dataclass(frozen=True)
class RewardRequest:
    """One response to be scored."""

    sample_id: str  # names the sample in warnings
    data_source: str
    solution: str  # the decoded response, without the prompt and without special tokens
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardResult:
    """The score of one response, or why there is none. `score` is None exactly when `error` is set; 0.0 is a score."""

    score: float | None
    parts: dict[str, float] = field(default_factory=dict)  # the other numbers that the function returned
    error: str | None = None


def read_outcome(outcome: object) -> tuple[float, dict[str, float]]:
    """The score and the parts in what a reward function returned.

    Numbers are bool, int, float, numpy scalars and arrays or tensors of no dimension. Of a mapping, "score" is the
    score and the other numbers are the parts; values that are no numbers (texts, lists, None) are left out.

    Raises TypeError for what is no number, ValueError for a missing "score" and for NaN or infinity, in the score
    or in a part.
    """
    if not isinstance(outcome, Mapping):
        return _finite(outcome, "a score"), {}
    if "score" not in outcome:
        raise ValueError(f"the reward function returned a dict without 'score'; it has {sorted(map(str, outcome))}")
    parts = {
        str(key): _finite(value, f"{key!r}")
        for key, value in outcome.items()
        if key != "score" and _plain(value) is not None
    }
    return _finite(outcome["score"], "'score'"), parts


def _plain(value: object) -> numbers.Real | None:
    """The number behind `value`, or None. numpy and torch values are recognised without importing either."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()  # type: ignore[attr-defined]
    return value if isinstance(value, numbers.Real) else None


def _finite(value: object, what: str) -> float:
    number = _plain(value)
    if number is None:
        raise TypeError(f"the reward function returned {_short(value)} as {what}, which is not a number")
    try:
        result = float(number)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"the reward function returned {result} as {what}, which is not finite")
    return result


def _short(value: object) -> str:
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
