"""Measures how often a grader is wrong: compares its verdicts on a corpus of hard cases with a person's verdicts.

A corpus is JSON lines with `answer`, `truth`, `right` (the person's verdict). `unseen` marks cases that were written
after the grader, so that none of its rules was made for them. The corpora of the built-in graders are in corpus/.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from steepest.config.sections.reward import WeightedFunction
from steepest.errors import ConfigError, DataError, RewardError
from steepest.registry import is_own_code, nearest
from steepest.rewards.api import REWARDS, RewardRequest, entry_for
from steepest.rewards.weighted import BoundFunction, bind, score_one

_SHOWN = 120
CORPORA = ("exact", "gsm8k", "math", "multiple_choice", "numeric")
"""Names of the graders that have a corpus in the package."""


@dataclass(frozen=True)
class Case:
    """One answer, with a person's verdict."""

    answer: str
    truth: Any
    right: bool
    unseen: bool = False


@dataclass(frozen=True)
class Report:
    """The result of a grader on a corpus: the cases that it judged wrongly, and counts."""

    cases: Sequence[Case]
    false_accepts: list[Case]
    false_rejects: list[Case]

    @property
    def num_right(self) -> int:
        return sum(case.right for case in self.cases)

    @property
    def num_wrong(self) -> int:
        return len(self.cases) - self.num_right

    def unseen(self) -> Report:
        """The report over the cases that no rule was made for."""
        lists = (self.cases, self.false_accepts, self.false_rejects)
        return Report(*([case for case in cases if case.unseen] for cases in lists))

    def rates(self) -> str:
        """Two lines: the share of wrong answers that were accepted, and the share of right answers that were
        rejected."""
        pairs = (("wrong answers accepted", self.false_accepts, self.num_wrong),
                 ("right answers rejected", self.false_rejects, self.num_right))  # fmt: skip
        return "\n".join(f"{what}: {share(len(found), total)}" for what, found, total in pairs)


def share(count: int, total: int) -> str:
    """`3 of 60 = 5.0%`."""
    return f"{count} of {total} = {count / total:.1%}" if total else f"{count} of {total}"


def read_corpus(text: str, name: str) -> list[Case]:
    """The cases of a corpus. Raises DataError with the line that is not one."""
    cases = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
            if not isinstance(row["answer"], str) or not isinstance(row["right"], bool):
                raise TypeError
            cases.append(Case(row["answer"], row["truth"], row["right"], bool(row.get("unseen", False))))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{name}, line {number}: expected {{"answer": text, "truth": ..., "right": true or false}}.'
            ) from None
    if not cases:
        raise DataError(f"{name}: no cases.")
    return cases


def corpus_of(name: str) -> list[Case]:
    """The corpus in the package for a grader."""
    file = resources.files("steepest.rewards").joinpath("corpus").joinpath(f"{name}.jsonl")
    text = file.read_text(encoding="utf-8")
    return read_corpus(text, f"{name}.jsonl")


def grade(cases: Sequence[Case], accepts: Callable[[Case], bool]) -> Report:
    """Run a grader over the cases."""
    pairs = [(case, accepts(case)) for case in cases]
    return Report(
        cases,
        [case for case, accepted in pairs if accepted and not case.right],
        [case for case, accepted in pairs if not accepted and case.right],
    )


def check(name: str, *, mode: str | None = None, corpus: Path | None = None) -> Report:
    """Grade a corpus with a reward: a name, a data_source, or `file.py:function`. A score above 0 accepts.

    Raises ConfigError for an unknown reward, a reward without a corpus and a mode that it does not have; DataError
    for a corpus that cannot be read.
    """
    if is_own_code(name):
        function = bind([WeightedFunction(name, 1.0, {})])[0]
    else:
        entry = entry_for(name)
        if entry is None:
            guess = nearest(name, CORPORA)
            hint = f" Did you mean {guess}?" if guess else ""
            raise ConfigError(f"no such grader: {name}.{hint} There are {', '.join(CORPORA)}, or file.py:function.")
        function = BoundFunction(name, 1.0, entry, {})
    assert function.entry is not None
    modes = function.entry.facts.get("modes", ())
    if mode is not None and mode not in modes:
        has = f"Its modes: {', '.join(modes)}." if modes else "It has none."
        raise ConfigError(f"--mode {mode}: {name} has no such mode. {has}")
    cases = _cases(name, function, corpus)
    how = mode or (modes[0] if modes else "strict")
    return grade(cases, lambda case: _accepts(function, name, how, case))


def _cases(name: str, function: BoundFunction, corpus: Path | None) -> list[Case]:
    if corpus is not None:
        try:
            return read_corpus(corpus.read_text(encoding="utf-8"), str(corpus))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--corpus {corpus}: cannot be read: {error}.") from error
    assert function.entry is not None
    own = next((one for one in CORPORA if REWARDS.get(one).value is function.entry.value), None)
    if own is None:
        raise ConfigError(f"{name}: no corpus of its own. Give one with --corpus FILE.jsonl.")
    return corpus_of(own)


def _accepts(function: BoundFunction, name: str, mode: str, case: Case) -> bool:
    request = RewardRequest("", name, case.answer, case.truth)
    try:
        result = score_one([function], request, mode=mode, call=_call)
    except Exception as error:  # a user's function may raise anything
        raise RewardError(
            f"{name} raised {type(error).__name__}: {error}; the answer is {_shown(case.answer)}."
        ) from error
    return result.score is not None and result.score > 0


def _call(function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    outcome = function(**keywords)
    return asyncio.run(_awaited(outcome)) if inspect.isawaitable(outcome) else outcome


async def _awaited(outcome: Awaitable[Any]) -> Any:
    return await outcome


def describe(report: Report) -> str:
    """The failing cases and the rates, for a person."""
    lines = []
    for title, cases in (("accepted, but wrong", report.false_accepts), ("rejected, but right", report.false_rejects)):
        if cases:
            lines.append(f"{title}:")
            lines += [f"  {_shown(str(case.truth))} <- {_shown(case.answer)}" for case in cases]
    unseen = report.unseen()
    if unseen.cases and len(unseen.cases) < len(report.cases):
        lines += ["of the cases written after the grader:", *(f"  {line}" for line in unseen.rates().splitlines())]
    lines.append(f"{len(report.cases)} cases, {report.num_right} right and {report.num_wrong} wrong")
    return "\n".join([*lines, report.rates()])


def _shown(text: str) -> str:
    text = json.dumps(text, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 4] + '..."'
