"""Grade-school mathematics: the number after `####` against the ground truth. Used for GSM8K and generated arithmetic.

Two rules, chosen by `reward.mode`:

strict    The rule of the reference. It takes the last match of `#### ` (one space) and `-?[0-9.,]+` in the last 300
          characters and drops its commas; the rest must equal the ground truth letter by letter. `72.` and `72.0` are
          not `72`: the model is trained on the form as well.
flexible  The value counts, not the form. See `flexible_answer`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Literal, get_args

from steepest.rewards.answers import body, ground_truth_text, plain, statements
from steepest.rewards.api import REWARDS
from steepest.rewards.numbers import CURRENCY, NOT_IN_A_NAME, plain_digits

Mode = Literal["strict", "flexible"]
MODES: tuple[Mode, ...] = get_args(Mode)

STRICT_TAIL_CHARS = 300
_STRICT = re.compile(r"#### (-?[0-9.,]+)")

# A number as people write it. `unfinished` marks one that is only the start of something else: `6 * 12`, `10:30`,
# `70-72`, `70 or 72`, `1 1/2`. Such a number is no answer.
_NUMBER = re.compile(
    r"""
    (?<![.])"""
    + NOT_IN_A_NAME
    + r"""
    (?P<sign>(?<!\))[-+])? (?:[$€£¥\u20b9\u20bd\u20a9\u20ba\u0e3f]\s?)? (?P<inner_sign>-)?
    (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))
    (?P<decimals>\.[0-9]+)?
    (?P<exponent>[eE][-+]?[0-9]{1,2}(?!\w))?
    (?:\s?/\s?(?P<divisor>[0-9]{1,15}))?
    (?P<scale>k\b|\s?(?:hundred|dozen|thousand|million|billion)\b|[\u767e\u5343\u4e07\u842c\u4ebf\u5104])?
    (?:(?=\s*(?:[-+*^:/\xd7\xf7~]|\\times|\\cdot|\\div|or\b|to\b|[\u6216\u81f3\u5230\u65f6\u6642\u70b9\u9ede])\s*[($]*[0-9]
      |\ [0-9]+/[0-9])(?P<unfinished>))?
    """,
    re.VERBOSE,
)
_SCALES = {
    "k": 10**3, "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "\u767e": 100, "\u5343": 1000, "\u4e07": 10**4, "\u842c": 10**4, "\u4ebf": 10**8, "\u5104": 10**8,
}  # fmt: skip
_IS = re.compile(r"\b(?:is|are|equals|must\ be)\b:?\s(?=[^\w\n]{0,3}[0-9])")
_MAX_DIGITS = 30  # longer runs of digits are noise, and Python refuses to convert very long ones

# LaTeX and Markdown that surrounds or interrupts numbers, in this order
_CLEANING: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;]"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile("\u2212"), "-"),  # the minus sign of typographers
    *((pattern, "") for pattern in CURRENCY),
    (re.compile(r"\*\*|__|`|~|\\[()\[\]]"), " "),
)


def strict_answer(text: str) -> str | None:
    """The text of the answer by the strict rule, or None when the form `#### number` does not occur."""
    found: list[str] = _STRICT.findall(text[-STRICT_TAIL_CHARS:])
    return found[-1].replace(",", "") if found else None


def flexible_answer(text: str) -> Fraction | None:
    r"""The value of the answer by the flexible rule, or None when there is none.

    It looks at these places of the whole text and takes the first hit:
      1. the last marker (four or more `#`) with a number on its line, or on the next line when its own is blank;
         headings (`#### Step 2`, `#### Check 3 times`) are no answers;
      2. the last `\boxed{...}` with a number;
      3. the last `the answer is ...` or `<answer>...</answer>` with a number, see answers.py;
      4. the last number of the text that is in no heading.
    In 1 to 3 the first number counts, where there is an `=` the first number after the last `=`, and in a sentence the
    number after the last `is`.

    A number is: digits with or without commas in groups of three, decimals, a sign, a currency sign before it, a
    fraction `a/b` or `\frac{a}{b}`, `1.5e3`, and after it `k`, `dozen`, `hundred`, `thousand`, `million`, `billion`.
    What follows is ignored (full stop, `%`, units), and so are bold, code marks and LaTeX spacing. An expression left
    open (`6 * 12`, `70-72`, `70 or 72`, `10:30`, `1 1/2`) and a run of more than 30 digits are no answer.
    """
    text = plain_digits(plain(text))
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    found = statements(text)
    for kinds in (("hashes",), ("boxed",), ("phrase", "tag")):
        for statement in reversed(found):
            if statement.kind in kinds and _NUMBER.search(statement.text):
                return _answer_in(statement.text)
    numbers = list(_NUMBER.finditer(body(text)))
    return _value(numbers[-1]) if numbers else None


def _answer_in(text: str) -> Fraction | None:
    text = text.rpartition("=")[2] if _NUMBER.search(text.rpartition("=")[2]) else text
    first = _NUMBER.search(text)
    stated = list(_IS.finditer(text))
    if first is not None and stated and re.search(r"\w", text[: first.start()]):  # the total for 2 months is 72
        first = _NUMBER.search(text, stated[-1].end())
    return _value(first) if first else None


def _value(match: re.Match[str]) -> Fraction | None:
    digits = (match["whole"] or "0").replace(",", "") + (match["decimals"] or "")
    divisor = int(match["divisor"] or 1)
    if match["unfinished"] is not None or len(digits) > _MAX_DIGITS or divisor == 0:
        return None
    negative = (match["sign"] == "-") != (match["inner_sign"] == "-")
    scale = _SCALES[match["scale"].strip()] if match["scale"] else 1
    value = Fraction(digits + (match["exponent"] or "")) * scale / divisor
    return -value if negative else value


def _truth(ground_truth: Any) -> str:
    """The ground truth as the text of a plain number; of a whole solution, what follows its last `####`.

    Raises for one that no answer can equal, instead of a score of 0 for every response.
    """
    if isinstance(ground_truth, float) and ground_truth.is_integer():
        ground_truth = int(ground_truth)  # a table with an empty cell turns whole numbers into floats
    given = ground_truth_text(ground_truth)
    text = given.rpartition("####")[2].strip().lstrip("$").removesuffix(".")
    if re.fullmatch(r"-?\$?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    text = text.replace("-$", "-", 1)
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?|-?\.[0-9]+", text):
        raise ValueError(f"ground_truth is {given[:40]!r}, expected a plain number such as '1234' or '-2.5'")
    return text


def _plain_answers(ground_truth: Any) -> list[str]:
    return [f"#### {_truth(ground_truth)}"]


@REWARDS.register(
    "gsm8k",
    "openai/gsm8k",
    "steepest/arithmetic",
    modes=MODES,
    check_ground_truth=_truth,
    plain_answers=_plain_answers,
)
def gsm8k(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    mode: Mode = "strict",
) -> dict[str, float]:
    """Score one response against the number in `ground_truth`.

    Returns `score` and `acc` (1.0 when the answer is right by the rule of `mode`, else 0.0) and `format` (1.0 when the
    response has the form `#### number` of the strict rule, right or wrong; the same in both modes).
    Raises TypeError or ValueError for a ground truth that is not a number and for an unknown mode. No response raises.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: no such mode. Allowed: {', '.join(MODES)}.")
    truth = _truth(ground_truth)
    stated = strict_answer(solution_str)
    right = stated == truth if mode == "strict" else flexible_answer(solution_str) == Fraction(truth)
    return {"score": float(right), "acc": float(right), "format": float(stated is not None)}
