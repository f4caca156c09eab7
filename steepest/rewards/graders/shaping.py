"""Rewards for the shape of a response: its length and its form. They are parts of a weighted sum."""

from __future__ import annotations

import re
from typing import Any

from steepest.rewards.api import REWARDS

FORMS = {
    "boxed": r"\\boxed\s*\{.*\S.*\}",
    "hashes": r"^#### -?[0-9.,]+",
    "think": r"\A\s*<think>(?:(?!</?think>).)+</think>\s*(?!.*</?think>)\S.*\Z",
    "tags": r"\A\s*<think>(?:(?!</?think>).)+</think>\s*<answer>(?:(?!</?answer>).)+</answer>\s*\Z",
}
"""Name of a form -> regular expression for the response; `.` matches line breaks and `^` line starts."""


def _check_length(*, soft: int, hard: int) -> None:
    for name, value in (("soft", soft), ("hard", hard)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r}: expected a whole number of tokens")
    if not 0 <= soft < hard:
        raise ValueError(f"soft={soft}, hard={hard}: expected 0 <= soft < hard, in tokens")


@REWARDS.register("length", part=True, needs=("num_tokens",), check_options=_check_length)
def length(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    num_tokens: int,
    soft: int,
    hard: int,
) -> float:
    """Penalty for length: 0 up to `soft` tokens, then in a straight line to -1 at `hard` tokens, and -1 beyond.

    `num_tokens` is the length of the response in the policy's tokens, the end token included.
    """
    return -min(1.0, max(0.0, (num_tokens - soft) / (hard - soft)))


def _pattern(form: str | None, pattern: str | None) -> re.Pattern[str]:
    if (form is None) == (pattern is None):
        raise ValueError(f"expected either form (one of {', '.join(FORMS)}) or pattern (a regular expression)")
    if form is not None and form not in FORMS:
        raise ValueError(f"form={form!r}: no such form. Allowed: {', '.join(FORMS)}")
    text = FORMS[form] if form is not None else pattern
    if not isinstance(text, str):
        raise ValueError(f"pattern={pattern!r}: expected a regular expression")
    try:
        return re.compile(text, re.DOTALL | re.MULTILINE)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r}: not a regular expression ({error})") from error


def _check_format(*, form: str | None = None, pattern: str | None = None) -> None:
    _pattern(form, pattern)


@REWARDS.register("format", part=True, check_options=_check_format)
def format_reward(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    form: str | None = None,
    pattern: str | None = None,
) -> float:
    """1.0 when the response has the form, else 0.0: one of FORMS, or a regular expression that is searched in it.

    boxed: an answer in `\\boxed{}`; hashes: a line `#### number`; think: `<think>...</think>` and then an answer;
    tags: `<think>...</think><answer>...</answer>` and nothing else.
    """
    return float(_pattern(form, pattern).search(solution_str) is not None)
