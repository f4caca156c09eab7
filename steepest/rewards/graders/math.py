r"""Mathematics as in MATH and AIME: the stated expression against the ground truth, compared by math-verify.

answers.py finds the answer (the last `\boxed{...}`, `Answer: ...`, ...), so that a text without a stated answer is
wrong; math-verify then parses both sides and decides whether they are mathematically equal.

math-verify limits its time with `signal.alarm`, which fails outside of the main thread and does not interrupt C code.
Its limits are switched off here: worker processes have their own time limit (`reward.timeout_s`). Expressions that take
computer algebra too long (towers of powers, huge exponents, huge factorials, very long texts) are compared as text.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from steepest.rewards.answers import Statement, ground_truth_text, last_line, statements, visible
from steepest.rewards.api import REWARDS
from steepest.rewards.numbers import without_words

_MAX_CHARS = 300
_EXPLOSIVE = re.compile(
    r"\^[^^]{0,8}\^"  # a tower
    r"|\^\s*\{?\s*[-+(]*\s*[0-9][0-9,\s]{3,}"  # an exponent of four digits
    r"|[)}]\s*\^\s*\{?\s*[0-9]{2}|[a-zA-Z]\s*\^\s*\{?\s*[0-9]{3}"  # a power of a sum; of a variable
    r"|\*\*"
    r"|[0-9]{3,}\s*!|!\s*!|\)\s*!"
    r"|[0-9]{40,}"
    r"|\\(?:sum|prod|int|lim)\b"
)
_NOISE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("\u2212"), "-"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*([^{}]*?)\s*\}"), r"\\text{\1}"),
    (re.compile(r"(?<!\\)\\[,;:! ]|~"), " "),
    (re.compile(r"\\left|\\right|\\displaystyle"), ""),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"^\s*(?:\\approx|\u2248)"), ""),
)
_DENIED = re.compile(r"\\neq?\b|\u2260|\\pm\b|\u00b1|\bnot\b|\bn't\b|\\text\{[^{}]*\bnot\b")
_BASE = re.compile(r"[0-9]_\{?([0-9]+)")  # math-verify does not look at the base of a number


def stated_expression(text: str) -> str | None:
    """The LaTeX of the answer, or None if the response states none. Without a statement it is `$...$` alone on the last
    line, or a last line that is only an expression."""
    shown = visible(text)
    found = statements(shown)
    if found:
        return _plain(_within(found))
    line = last_line(shown).strip()
    return (
        _plain(without_words(line))
        if line and not re.search(r"[A-Za-z]{3,}(?![^{}]*\})(?<!frac)(?<!sqrt)", line)
        else None
    )


def _within(found: list[Statement]) -> str:
    """The text of the last statement; for a phrase, the formula in it if there is one."""
    last = found[-1]
    if last.kind == "boxed":
        return without_words(last.text)
    formulas = re.findall(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", last.text)
    return next(part for part in formulas[0] if part) if formulas else without_words(last.text)


def _plain(text: str) -> str:
    for pattern, replacement in _NOISE:
        text = pattern.sub(replacement, text)
    return text.strip().strip("$*_`").rstrip(".").strip()


def _key(text: str) -> str:
    """A form in which equal texts are identical: no spaces, no `\text{}`, no braces around one character."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", _plain(text))
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"\s+", "", text)).casefold()


def same(stated: str, truth: str) -> bool:
    """Whether two LaTeX expressions are the same answer."""
    if _key(stated) == _key(truth):
        return True
    if not stated or len(stated) > _MAX_CHARS or _EXPLOSIVE.search(stated) or _EXPLOSIVE.search(truth):
        return False
    if _DENIED.search(stated) and not _DENIED.search(truth):
        return False
    if _BASE.findall(stated) != _BASE.findall(truth):
        return False
    if "%" in truth and "%" not in stated:  # 20 for 20%
        truth = truth.replace("\\%", "").replace("%", "")
    elif "%" in stated and "%" not in truth:  # 50% for 1/2; math-verify takes 12% for 12
        stated = re.sub(r"([0-9.]+)\s*\\?%", r"\\frac{\1}{100}", stated)
    gold = _parsed(truth)
    return bool(gold) and _verify(gold, _parse(stated))


@functools.lru_cache(maxsize=4096)
def _parsed(truth: str) -> tuple[Any, ...]:
    return tuple(_parse(truth))


def prepare() -> None:
    """Import math-verify (about a second), and hide its warnings that its own time limits are off."""
    import math_verify  # noqa: F401 (the import is the work)

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parse(text: str) -> list[Any]:
    prepare()
    from math_verify import LatexExtractionConfig, parse

    return parse(
        f"\\boxed{{{text}}}", [LatexExtractionConfig(boxed_match_priority=0)], "no_fallback", parsing_timeout=None
    )


def _verify(gold: tuple[Any, ...], stated: list[Any]) -> bool:
    from math_verify import verify

    return bool(stated) and verify(list(gold), stated, timeout_seconds=None, allow_set_relation_comp=True)


def _truth(ground_truth: Any) -> str:
    r"""The ground truth as LaTeX; for a whole solution, its last `\boxed{...}`."""
    text = ground_truth_text(ground_truth)
    boxes = [statement.text for statement in statements(text) if statement.kind == "boxed"]
    return _plain(boxes[-1] if boxes else text)


@REWARDS.register(
    "math",
    "lighteval/MATH",
    "DigitalLearningGmbH/MATH-lighteval",
    "HuggingFaceH4/MATH-500",
    "math_dapo",
    "math_dapo_reasoning",
    "aime*",
    check_ground_truth=_truth,
    prepare=prepare,
)
def math(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score 1.0 when the stated expression equals the ground truth, else 0.0; `format` is 1.0 when one is stated.

    Raises TypeError or ValueError for a ground truth that is neither a text nor a number, or is empty. No response
    raises.
    """
    truth, stated = _truth(ground_truth), stated_expression(solution_str)
    right = float(stated is not None and same(stated, truth))
    return {"score": right, "acc": right, "format": float(stated is not None)}
