"""Scores a row with the reward of its data_source, or with the weighted sum of `reward.functions`."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.config.sections.reward import GRADER, WeightedFunction
from steepest.errors import ConfigError, setting
from steepest.registry import Entry, is_own_code
from steepest.rewards.api import REWARDS, RewardRequest, RewardResult, entry_for, read_outcome
from steepest.rewards.signatures import Signature, definitions, read_signature

Call = Callable[[Callable[..., Any], dict[str, Any]], Any]
"""Calls a function with keywords and returns its result, which is awaited if the function is `async`."""


@dataclass(frozen=True)
class BoundFunction:
    """A reward with its weight and its options, ready to be called for a row."""

    label: str
    weight: float
    entry: Entry | None
    """None: the reward that the row's data_source chooses."""
    options: Mapping[str, Any]
    signature: Signature | None = None
    """How a function of the user's own is called; None: one that is registered."""

    def entry_for(self, data_source: str) -> Entry:
        """The reward that scores a row. Raises LookupError when the data_source chooses none."""
        if self.entry is not None:
            return self.entry
        found = entry_for(data_source)
        if found is None:
            raise LookupError(f"no reward for data_source {data_source!r}; known: {', '.join(REWARDS.names())}")
        return found

    def keywords(self, entry: Entry, request: RewardRequest, mode: str) -> dict[str, Any]:
        """All keywords of the call: the four of every reward, the fields that the function needs, and its options."""
        if self.signature is not None:
            return self.signature.keywords(request, self.options)
        keywords: dict[str, Any] = {
            "data_source": request.data_source,
            "solution_str": request.solution if is_own_code(entry.name) else request.whole,
            "ground_truth": request.ground_truth,
            "extra_info": request.extra_info,
        }
        if entry.facts.get("modes"):
            keywords["mode"] = mode
        keywords |= {name: getattr(request, name) for name in entry.facts.get("needs", ())}
        return keywords | dict(self.options)

    def outcome(self, value: Any) -> Any:
        """What the function returned for one response."""
        return value if self.signature is None else self.signature.outcome(value)


BY_DATA_SOURCE = (BoundFunction(GRADER, 1.0, None, {}),)


def bind(wanted: Sequence[WeightedFunction]) -> tuple[BoundFunction, ...]:
    """Look up functions and check their options. Raises ConfigError with all problems."""
    bound, problems = [], []
    for item in wanted:
        if item.name == GRADER:
            bound.append(BoundFunction(GRADER, item.weight, None, {}))
            continue
        try:
            if ".py:" in item.name:
                sys.path.append(str(Path(item.name.rpartition(":")[0]).expanduser().resolve().parent))  # its helpers
            entry = REWARDS.get(item.name)
            bound.append(_bound(item, entry))
        except ConfigError as error:
            problems += error.marked_problems
        except (TypeError, ValueError) as error:
            problems.append(f"{setting('reward_functions')}.{item.name}: {error}.")
    if problems:
        raise ConfigError(problems)
    return tuple(bound)


def _bound(item: WeightedFunction, entry: Entry) -> BoundFunction:
    """The function with its options checked. Raises TypeError and ValueError."""
    if not is_own_code(item.name) or entry.facts:
        _check_options(entry, item.options)
        return BoundFunction(item.label, item.weight, entry, item.options)
    try:
        signature = read_signature(entry.value, item.options)
    except TypeError as error:
        raise TypeError(f"it cannot be called ({error}). {definitions(item.label)}") from error
    return BoundFunction(item.label, item.weight, entry, item.options, signature)


def _check_options(entry: Entry, options: dict[str, Any]) -> None:
    """Raise TypeError for options that the function does not have, ValueError for values that it refuses."""
    needs = entry.facts.get("needs", ())
    try:
        parameters = inspect.signature(entry.value).parameters.values()
    except ValueError:
        return  # written in C, without a signature: the first call shows it
    known = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in needs}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in options:
            if name not in known:
                takes = f"Its options: {', '.join(known)}" if known else "It takes none"
                raise TypeError(f"no option {name}. {takes}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        raise TypeError(f"needs {' and '.join(missing)}: write {{{entry.name}: {{weight: 1.0, {missing[0]}: ...}}}}")
    usual = dict.fromkeys(("data_source", "solution_str", "ground_truth", "extra_info"), "")
    try:
        inspect.signature(entry.value).bind(**usual, **dict.fromkeys(needs), **options)
    except TypeError as error:
        raise TypeError(f"it cannot be called with the keywords {', '.join(usual)} ({error})") from error
    check = entry.facts.get("check_options")
    if check is not None:
        check(**options)


def score_one(functions: Sequence[BoundFunction], request: RewardRequest, *, mode: str, call: Call) -> RewardResult:
    """The score of a response. Exceptions of a function are passed on; a result that is not a finite number raises too.

    If the data_source chooses one function, the result has its parts. Else each function's own score is in
    `scores` under its label, `acc` is that of the first function that reports one, and other parts are `label/part`.
    """
    if functions == BY_DATA_SOURCE:
        score, parts = read_outcome(_call(functions[0], request, mode, call))
        return RewardResult(score, parts)
    return combine(functions, [_call(function, request, mode, call) for function in functions])


def combine(functions: Sequence[BoundFunction], outcomes: Sequence[Any]) -> RewardResult:
    """The weighted sum of what the functions returned for one response; see `score_one`."""
    total, scores, parts = 0.0, dict[str, float](), dict[str, float]()
    applied = 0
    for function, outcome in zip(functions, outcomes, strict=True):
        if outcome is None and function.signature is not None and function.signature.is_trl:
            continue  # TRL: this reward says nothing about this response
        applied += 1
        score, own = read_outcome(outcome)
        total += function.weight * score
        scores[function.label] = score
        if "acc" in own:
            parts.setdefault("acc", own["acc"])
        parts |= {f"{function.label}/{name}": value for name, value in own.items() if name != "acc"}
    if not applied:
        raise TypeError("every reward function returned None for this response")
    return RewardResult(total, parts, scores=scores)


def _call(function: BoundFunction, request: RewardRequest, mode: str, call: Call) -> Any:
    entry = function.entry_for(request.data_source)
    return function.outcome(call(entry.value, function.keywords(entry, request, mode)))


def preparations(functions: Sequence[BoundFunction], data_source: str) -> list[Callable[[], None]]:
    """The preparations (fact `prepare`) that the functions of a row need once per process before their first call."""
    entries = [function.entry or entry_for(data_source) for function in functions]
    return [entry.facts["prepare"] for entry in entries if entry is not None and "prepare" in entry.facts]


@functools.lru_cache(maxsize=1024)
def prepare_once(prepare: Callable[[], None]) -> None:
    """Run a preparation the first time it is asked for."""
    prepare()


def ground_truth_problem(data_source: str, ground_truth: Any, functions: Sequence[WeightedFunction] = ()) -> str | None:
    """The problem that the rewards of a row find in its ground truth, or None.

    It is called for every row before a model is loaded. `functions` are those of `reward.functions`; empty: the reward
    registered for the data source. A reward without the facts `check_ground_truth` and `plain_answers` accepts every
    ground truth.
    """
    names = [function.name for function in functions] if functions else [GRADER]
    for name in names:
        entry = entry_for(data_source) if name == GRADER else REWARDS.get(name) if name in REWARDS.names() else None
        problem = _problem(entry, ground_truth) if entry is not None else None
        if problem is not None:
            return problem
    return None


def _problem(entry: Entry, ground_truth: Any) -> str | None:
    check, plain_answers = entry.facts.get("check_ground_truth"), entry.facts.get("plain_answers")
    try:
        if check is not None:
            check(ground_truth)
        answers = [] if plain_answers is None else plain_answers(ground_truth)
        scores = [entry.value("", answer, ground_truth)["score"] for answer in answers]
    except (TypeError, ValueError) as error:
        return str(error)
    if answers and max(scores) < 1:
        return (
            f"ground_truth is {str(ground_truth)[:40]!r}: no response can equal it, {answers[0][:60]!r} scores 0 by "
            f"{entry.name}"
        )
    return None
