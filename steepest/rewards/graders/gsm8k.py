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

from steepest.rewards.answers import body, ground_truth_text, statements, visible, without_exclamation, without_open_box
from steepest.rewards.api import REWARDS
from steepest.rewards.numbers import Number, has_digit, stated_number

Mode = Literal["strict", "flexible"]
MODES: tuple[Mode, ...] = get_args(Mode)

STRICT_TAIL_CHARS = 300
_STRICT = re.compile(r"#### (-?[0-9.,]+)")

_IS = re.compile(r"\b(?:is|are|equals|must\ be)\b:?\s(?=[^\w\n]{0,3}[0-9])")


def strict_answer(text: str) -> str | None:
    """The text of the answer by the strict rule, or None when the form `#### number` does not occur."""
    found: list[str] = _STRICT.findall(text[-STRICT_TAIL_CHARS:])
    return found[-1].replace(",", "") if found else None


def flexible_answer(text: str) -> Fraction | None:
    r"""The value of the answer by the flexible rule, or None when there is none.

    It looks at these places of the text behind the thinking and takes the first hit:
      1. the last marker (four or more `#`) with a number on its line, or on the next line when its own is blank;
         headings (`#### Step 2`, `#### Check 3 times`) are no answers;
      2. the last `\boxed{...}` with a number;
      3. the last `the answer is ...` or `<answer>...</answer>` with a number, see answers.py;
      4. the last number of the text that is in no heading.
    In 1 to 3 the first number counts, where there is an `=` the first number after the last `=`, and in a sentence the
    number after the last `is`. What a number is, and which are none, is the rule of numbers.py, shared with `numeric`.
    A percent sign is ignored.
    """
    shown = visible(text)
    found = statements(shown)
    for kinds in (("hashes",), ("boxed",), ("phrase", "tag")):
        for statement in reversed(found):
            if statement.kind not in kinds:
                continue
            number = stated_number(_part(statement.text))
            if number is not None or has_digit(statement.text):
                return _written(number)
    lines = [line for line in body(without_open_box(shown)).splitlines() if has_digit(line)]
    return _written(stated_number(without_exclamation(lines[-1]), last=True)) if lines else None


def _part(text: str) -> str:
    """The part of a statement that has the answer: what follows the last `is` of a sentence with a number before it."""
    stated = list(_IS.finditer(text))
    first = re.search(r"[0-9]", text)
    between = stated and first is not None and re.search(r"\w", text[: first.start()])
    return text[stated[-1].end() :] if between else text


def _written(number: Number | None) -> Fraction | None:
    if number is None:
        return None
    return number.value * 100 if number.percent else number.value


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
