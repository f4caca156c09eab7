"""Numeric match: the value that a response states against the value of the ground truth."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from steepest.rewards.answers import body, ground_truth_text, statements, visible, without_open_box
from steepest.rewards.api import REWARDS
from steepest.rewards.numbers import Number, has_digit, number_in_words, stated_number

_MAX_WORDS = 4  # of a ground truth; more are prose, whose first number may be any number


def numeric_answer(text: str) -> Number | None:
    """The number in the last statement of an answer (answers.py) that has a digit or is a number in words. Without such
    a statement, the last number of the last line that has a number."""
    shown = visible(text)
    found = statements(shown)
    for statement in reversed(found):
        number = stated_number(statement.text)
        if number is not None or has_digit(statement.text):
            return number
    if found:
        return None
    lines = [line for line in body(without_open_box(shown)).splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if has_digit(line)), lines[-1] if lines else "")
    return stated_number(line, last=True)


def _truth(ground_truth: Any) -> Number:
    text = ground_truth_text(ground_truth)
    found = statements(text)
    stated = found[-1].text if found else text
    number = stated_number(stated)
    num_words = len(re.findall(r"[^\W\d_]{2,}", stated))
    if number is None or (num_words > _MAX_WORDS and number_in_words(stated) is None):
        raise ValueError(f"ground_truth is {text[:40]!r}, expected one number such as '1234', '2.5', '25%' or '1e-3'")
    return number


def equal(stated: Number, truth: Number, rel_tol: float, abs_tol: float) -> bool:
    """Whether the values agree. If the truth is in percent, the number without the sign is right too (25 for 25%)."""
    values = [stated.value]
    if truth.percent and not stated.percent:
        values.append(stated.value / 100)
    allowed = max(Fraction(rel_tol) * abs(truth.value), Fraction(abs_tol))
    return any(abs(value - truth.value) <= allowed for value in values)


def _plain_answers(ground_truth: Any) -> list[str]:
    return [f"Answer: {ground_truth_text(ground_truth)}"]


@REWARDS.register("numeric", check_ground_truth=_truth, plain_answers=_plain_answers)
def numeric(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    rel_tol: float = 1e-6,
    abs_tol: float = 0.0,
) -> dict[str, float]:
    """Score 1.0 when the stated value is within `rel_tol` (of the truth) or `abs_tol` of the truth, else 0.0.

    `format` is 1.0 when the response states a number. Raises TypeError or ValueError for a ground truth or a tolerance
    that is not a number.
    """
    if not (0 <= rel_tol < 1 and 0 <= abs_tol < float("inf")):
        raise ValueError(f"rel_tol={rel_tol}, abs_tol={abs_tol}: tolerances are at least 0, the relative one below 1")
    truth, stated = _truth(ground_truth), numeric_answer(solution_str)
    right = float(stated is not None and equal(stated, truth, rel_tol, abs_tol))
    return {"score": right, "acc": right, "format": float(stated is not None)}
