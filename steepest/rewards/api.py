"""The interface of a reward function: its inputs, its result, and the table of names."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from steepest.errors import setting
from steepest.registry import Entry, Registry

# A name is the `data_source` of a row, a pattern of them (`aime*`), or what `reward.functions` calls the function.
# Facts of an entry:
#   modes               the values of `reward.mode` that the function takes as `mode=`
#   needs               fields of RewardRequest that it takes as keywords, in addition to the usual four
#   check_ground_truth  called with a row's ground truth; raises if no answer can equal it
#   plain_answers       called with a row's ground truth; the plainest answers that state it, one of which must score 1
#   check_options       called with the options of `reward.functions`; raises ValueError for invalid ones
#   prepare             called once per process before the first call; it does not count in the sample's time
#   part                True: usable only as a part of a sum; a data_source cannot choose it
REWARDS = Registry("reward", setting("reward_functions"), package="steepest.rewards.graders")


def match_name(data_source: str, names: Iterable[str]) -> str | None:
    """The registered name for a data source: the same name, or the longest pattern that matches it."""
    known = list(names)
    if data_source in known:
        return data_source
    fitting = [name for name in known if name.endswith("*") and data_source.startswith(name[:-1])]
    return max(fitting, key=len, default=None)


def data_source_names() -> list[str]:
    """Every name and pattern that the data_source of a row can match."""
    return [name for name in REWARDS.names() if not REWARDS.get(name).facts.get("part")]


def entry_for(data_source: str) -> Entry | None:
    """The reward for the data_source of a row, or None."""
    name = match_name(data_source, data_source_names())
    return None if name is None else REWARDS.get(name)


class RewardFunction(Protocol):
    """A reward function with this project's keywords. A user's function may leave some out, or take TRL's instead
    (`signatures.py`).

    Returns a number, a bool, or a mapping with "score" and other numbers. It may be `async def`.
    """

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any]
    ) -> Any: ...


@dataclass(frozen=True)
class RewardRequest:
    """One response that has to be scored."""

    sample_id: str  # names the sample in warnings
    data_source: str
    solution: str  # the decoded response, without the prompt; docs/rewards.md, "What a reward gets"
    ground_truth: Any
    extra_info: dict[str, Any] = field(default_factory=dict)
    num_tokens: int | None = None  # of the response, in the policy's tokens, the end token included
    messages: Sequence[Mapping[str, Any]] = ()  # the conversation that the response answers
    is_text: bool = False  # the row's prompt was a text, not messages
    opening: str = ""  # what the chat template has opened of the response at the end of the prompt, such as "<think>\n"

    @property
    def whole(self) -> str:
        """The response with its opening: what the built-in rewards read."""
        return self.opening + self.solution


@dataclass(frozen=True)
class RewardResult:
    """The score of one response, or why there is none. `score` is None exactly when `error` is set; 0.0 is a score.

    With `reward.functions` the score is the sum of weight times score over the named rewards in `scores`.
    """

    score: float | None
    parts: dict[str, float] = field(default_factory=dict)  # the other numbers that the function returned
    error: str | None = None
    scores: dict[str, float] = field(default_factory=dict)  # each reward of a weighted sum by name, without its weight
    timed_out: bool = False  # a built-in grader was ended by the time limit: the response scores 0

    def named(self) -> dict[str, float]:
        """All numbers of this response by name: the parts, and the rewards of a sum."""
        return {**self.parts, **self.scores}


class ScoresResponses(Protocol):
    """Interface of everything that scores responses: the worker processes, a judge, a reward model, or all rewards."""

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Results in the order of the requests."""
        ...


def read_outcome(outcome: object) -> tuple[float, dict[str, float]]:
    """Read the score and the parts from the result of a reward function.

    Numbers are bool, int, float, numpy scalars and arrays or tensors without dimensions. In a mapping, "score" is the
    score and the other numbers are the parts; values that are not numbers (texts, lists, None) are left out. Example:
    {"score": 1, "format": 0.5, "answer": "72"} -> (1.0, {"format": 0.5}).

    Raises TypeError for a result that is not a number, ValueError for a missing "score" and for NaN or infinity in the
    score or in a part.
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
    """`value` as a plain number, or None. numpy and torch values are recognised without importing either package."""
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
