"""Reward functions that a Python program passes as objects, see `steepest.train`. They are called in its own process.

Worker processes could not import a function of a notebook, and a closure could not be sent to them. So there is no time
limit a response; in return a function in TRL's form gets all responses of a step in one call.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from steepest.config.sections.reward import GIVEN, WeightedFunction
from steepest.errors import ConfigError, DataError, RewardError, setting
from steepest.registry import Entry
from steepest.rewards.api import RewardRequest, RewardResult
from steepest.rewards.pool import allowed_failures
from steepest.rewards.signatures import definitions, missing_columns, read_signature
from steepest.rewards.weighted import BoundFunction, combine
from steepest.rewards.worker import describe, source_file

_FUNCTIONS: dict[str, Callable[..., Any]] = {}


@contextmanager
def given(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block `reward.functions` knows these functions under their names, which begin with GIVEN."""
    before = dict(_FUNCTIONS)
    _FUNCTIONS.update(functions)
    try:
        yield
    finally:
        _FUNCTIONS.clear()
        _FUNCTIONS.update(before)


def is_given(name: str) -> bool:
    """Whether a name of `reward.functions` stands for a function that a Python program passes."""
    return name.startswith(GIVEN)


def source_of(name: str) -> str:
    """The text of a given function, or its compiled code where there is no text."""
    function = inspect.unwrap(_FUNCTIONS[name])
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return repr(getattr(function, "__code__", function))


class GivenFunctions:
    """The weighted sum of the given functions of a run, as `weighted.score_one` defines it.

    Raises ConfigError for functions that cannot be called with the keywords of a reward, and for names that no running
    program has passed.
    """

    def __init__(self, wanted: Sequence[WeightedFunction], max_error_rate: float) -> None:
        self._functions = [_bound(one) for one in wanted]
        self._max_error_rate = max_error_rate

    def check(self, columns: Collection[str]) -> list[str]:
        """How each function is called. Raises DataError if a parameter is filled by no column."""
        notes = []
        for one in self._functions:
            assert one.signature is not None
            if missing := [name for name in one.signature.columns if name not in columns]:
                raise DataError(missing_columns(one.label, missing, columns))
            notes.append(one.signature.describe(one.label, together=True))
        return notes

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Results in the order of the requests. A response on which a function raises, or returns no finite number, has
        no score; RewardError above `max_error_rate`, as in worker processes."""
        outcomes = [self._outcomes(one, requests) for one in self._functions]
        results = [self._combined(of_one) for of_one in zip(*outcomes, strict=True)]
        failed = [i for i, result in enumerate(results) if result.error is not None]
        if len(failed) > (most := allowed_failures(len(results), self._max_error_rate)):
            raise RewardError(
                f"reward: {len(failed)} of {len(results)} samples failed. First: sample "
                f"{requests[failed[0]].sample_id}: {results[failed[0]].error}. That is more than "
                f"{setting('max_error_rate', 'reward')}={self._max_error_rate:g} allows ({most}), so the run ends."
            )
        return results

    def _combined(self, outcomes: Sequence[Any]) -> RewardResult:
        error = next((outcome for outcome in outcomes if isinstance(outcome, _Failure)), None)
        if error is not None:
            return RewardResult(None, error=error.text)
        try:
            return combine(self._functions, outcomes)
        except (TypeError, ValueError) as problem:
            return RewardResult(None, error=describe(problem, ""))

    def _outcomes(self, function: BoundFunction, requests: Sequence[RewardRequest]) -> list[Any]:
        signature = function.signature
        assert function.entry is not None and signature is not None
        call, options = function.entry.value, function.options
        if not signature.is_trl:
            return [_result_of(call, signature.keywords(request, options)) for request in requests]
        if not requests:
            return []
        found = _result_of(call, signature.batch_keywords(requests, options))
        try:
            return signature.batch_outcomes(found, len(requests))
        except ValueError as error:
            found = _Failure(f"ValueError: {error}")
        except TypeError:
            pass
        return [found] * len(requests)


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _bound(wanted: WeightedFunction) -> BoundFunction:
    function = _FUNCTIONS.get(wanted.name)
    key = f"{setting('reward_functions')}.{wanted.name}"
    if function is None:
        raise ConfigError(
            f"{key}: this stands for a function that a Python program passed to steepest.train. Start the run again "
            f"from there; for the command, put the function into a file and name it file.py:{wanted.label}."
        )
    try:
        signature = read_signature(function, wanted.options)
    except TypeError as error:
        raise ConfigError(f"{key}: it cannot be called ({error}). {definitions(wanted.label)}.") from error
    return BoundFunction(wanted.label, wanted.weight, Entry(wanted.name, function), wanted.options, signature)


def _result_of(function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    """What the function returns, awaited if it is `async`; a `_Failure` if it raises."""
    try:
        found = function(**keywords)
        return _await(found) if inspect.isawaitable(found) else found
    except Exception as error:
        return _Failure(describe(error, source_file(function)))


def _await(outcome: Any) -> Any:
    """The result of an awaitable, from a thread of its own: a notebook's thread has a running loop already."""
    found: list[Any] = []

    async def wait() -> Any:
        return await outcome

    def run() -> None:
        try:
            found.append(asyncio.run(wait()))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="reward")
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
