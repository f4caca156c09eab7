"""What a reward function is, what goes in and what comes out."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from steepest.registry import Entry, Registry

# A name is the `data_source` of a row, a pattern of them (`aime*`), or what `reward.functions` calls the function.
# Facts of an entry:
#   modes               the values of `reward.mode` that the function takes as `mode=`
#   needs               fields of RewardRequest that it takes as keywords, beside the usual four
#   check_ground_truth  called with a row's ground truth, raises for one that no answer could equal
#   check_options       called with the options of `reward.functions`, raises ValueError for those that cannot be
#   prepare             called once in a process before the first call, and not on the sample's time
#   part                True: only a part of a sum; no data_source chooses it
REWARDS = Registry("reward", "reward.functions", package="steepest.rewards.graders")


def match_name(data_source: str, names: Iterable[str]) -> str | None:
    """The name that stands for a data source: itself, or the longest pattern that it fits."""
    known = list(names)
    if data_source in known:
        return data_source
    fitting = [name for name in known if name.endswith("*") and data_source.startswith(name[:-1])]
    return max(fitting, key=len, default=None)


def data_source_names() -> list[str]:
    """Every name and pattern that a row's data_source may have."""
    return [name for name in REWARDS.names() if not REWARDS.get(name).facts.get("part")]


def entry_for(data_source: str) -> Entry | None:
    """The reward that a row's data_source chooses, or None."""
    name = match_name(data_source, data_source_names())
    return None if name is None else REWARDS.get(name)


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
    num_tokens: int | None = None  # of the response, in the policy's tokens, the end token included
    messages: Sequence[Mapping[str, Any]] = ()  # the conversation that the response answers


@dataclass(frozen=True)
class RewardResult:
    """The score of one response, or why there is none. `score` is None exactly when `error` is set; 0.0 is a score.

    With `reward.functions` the score is the sum of weight times score over the named rewards in `scores`.
    """

    score: float | None
    parts: dict[str, float] = field(default_factory=dict)  # the other numbers that the function returned
    error: str | None = None
    scores: dict[str, float] = field(default_factory=dict)  # each reward of a weighted sum by name, without its weight

    def named(self) -> dict[str, float]:
        """Every number about this response by name: the parts and the rewards of a sum."""
        return {**self.parts, **self.scores}


class ScoresResponses(Protocol):
    """What scores a batch of responses: the worker processes, a judge, a reward model, or all of a run's rewards."""

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Results in the order of the requests."""
        ...


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
