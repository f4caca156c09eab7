r"""Mathematics as in MATH and AIME: the stated expression against the ground truth.

answers.py finds the answer (the last `\boxed{...}`, `Answer: ...`, ...), so that a text without a stated answer is
wrong. spelling.py brings both sides into one spelling, units.py takes units off, structure.py reads lists, intervals
and equations, and evaluate.py compares single expressions by their values, read with the parser of math-verify.

What an expression costs is counted before it is read (cost.py); one that is too expensive is compared as text. No
signal and no clock is used: the time limit of the worker process (`reward.timeout_s`) is the last resort.
"""

from __future__ import annotations

import re
from typing import Any

from steepest.rewards.answers import Statement, ground_truth_text, last_line, statements, visible
from steepest.rewards.api import REWARDS
from steepest.rewards.cost import MAX_CHARS
from steepest.rewards.numbers import DENIED_AFTER, DENYING_WORDS, SCALES, number_in_words
from steepest.rewards.spelling import latex_of
from steepest.rewards.structure import equal, structure_of
from steepest.rewards.units import without_unit

_SCALED = re.compile(r"[\u767e\u5343\u4e07\u842c\u4ebf\u5104\ub9cc\uc5b5\u500d\u7b2c]")  # 3 \u4e07 is not 3
# letters of other scripts than Latin (Greek ones are commands by now) around a value
_OTHER_SCRIPT = re.compile(r"[^\W\d_A-Za-z\u00aa-\u024f](?:[^\W\d_A-Za-z\u00aa-\u024f]|\s)*[:\uff1a]?")
_LEADING_WORDS = re.compile(
    r"\A\s*(?:\\text\{\s*[^{}\d]*[a-zA-Z]{2}[^{}\d]*\}(?:\s*:)?\s*|[A-Za-z]{2,}(?:\s+[A-Za-z]{2,})*(?:\s*:\s*|\s+))"
    r"(?=[-(\d]|\\(?:frac|sqrt|pi))"
)
_NUMBER_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?\s*_\s*\{?\s*(?:\\text\{\s*)?([0-9]+|[a-z]+)\s*\}?\s*\}?")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
          "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip
_NO_SOLUTION = re.compile(r"(?:there\s+(?:is|are)\s+)?no\s+(?:real\s+)?solutions?|(?:the\s+)?empty\s+set")
_ALL_REALS = re.compile(
    r"(?:the\s+)?(?:set\s+of\s+)?(?:all\s+)?(?:the\s+)?reals?(?:\s+numbers?)?|\\mathbb\s*\{?\s*r\s*\}?"
)
_NEGATIVE = re.compile(r"\A\s*(?:\\text\{\s*)?(?:minus|negative)\s*\}?\s*(?=[\d.]|\\frac)", re.IGNORECASE)
_TIMES = re.compile(
    r"\A(.*[0-9}])\s*(\\text\{\s*)?(hundred|thousand|lakh|million|crore|billion|trillion|dozens?)\b\s*(\}?)",
    re.IGNORECASE,
)
_DEGREES_IN = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc))\s*[({]?\s*([0-9.]+)\s*\^\s*\\circ\s*[)}]?")
# A statement of these words is a remark about the answer, not the answer.
_REMARK = re.compile(
    r"\b(?:verified|correct|right|wrong|explanation|explained|check(?:ed)?|verification|summary|note|notes|proof|above|"
    r"below|solution|conclusion|confirmed|step|steps|reasoning|final|answer|remark|unique|valid|consistent|reasonable)\b",
    re.IGNORECASE,
)
# What a sentence adds to its answer: `73, since 80 - 7 = 73`, `73 (rounded)`.
_COMMENT = re.compile(
    r"(?<=[\w$)}])(?:(?:,?\s+(?:since|because|which|rounded)|,\s+(?:as|so|but\s+not))\b(?!\s*\Z)|\s+\((?=[^()]{0,80}[A-Za-z]{3})[^()\\]{1,80}\)[.\s]*\Z)"
)
_PLACEHOLDERS = frozenset(("n/a", "na", "null", "nan", "unknown", "todo", "tbd", "?", "-", "--", "...", "none given"))
_LONGEST_STATEMENT = 2000  # characters in which a formula is looked for
_MAX_WORDS = 6
"""of a ground truth that is a text; more of them are prose"""


def stated_expression(text: str, truth: str = "1") -> str | None:
    """The LaTeX of the answer, or None if the response states none. Without a statement it is `$...$` alone on the last
    line, or a last line that is only an expression. A statement that only speaks about the answer to a `truth` of this
    kind is none."""
    shown = visible(text)
    found = [one for one in _outermost(statements(shown)) if not _is_remark(one, truth)]
    if found:
        return _plain(_within(found))
    line = last_line(shown).strip()
    if not line or len(line) > MAX_CHARS:
        return None
    return None if re.search(r"[A-Za-z]{3,}(?![^{}]*\})(?<!frac)(?<!sqrt)", line) else _plain(line)


def _outermost(found: list[Statement]) -> list[Statement]:
    r"""The statements that are not within a box: `\boxed{\text{The answer is } 18}` is one statement, and the box in a
    box is the inner one."""
    ends = [(one.start, one.start + len("\\boxed{") + len(one.text)) for one in found if one.kind == "boxed"]
    return [one for one in found if one.kind == "boxed" or not any(a < one.start <= b for a, b in ends)]


def _is_remark(statement: Statement, truth: str) -> bool:
    """`The answer is verified.`, `#### Explanation`: no digit and no mathematics in it."""
    if statement.kind in ("boxed", "tag"):
        return False
    text = re.sub(r"\\text[a-z]*\{|[*_}]", "", statement.text).strip().rstrip(".!")
    if not text:
        return True
    if re.search(r"\d|\\[a-zA-Z]|[$=^]", latex_of(text[:MAX_CHARS])):
        return False
    if number_in_words(text) is not None or _NO_SOLUTION.fullmatch(text.casefold()) or _key(text) == _key(truth):
        return False
    long_words = re.findall(r"[^\W\d_]{3,}", text)
    return bool(_REMARK.search(text)) or (bool(long_words) and not _is_words(latex_of(truth)))


def _within(found: list[Statement]) -> str:
    """The text of the last statement; for a phrase, the formula in it if there is one."""
    last = found[-1]
    if last.kind == "boxed":
        return last.text
    text = _COMMENT.split(last.text[:_LONGEST_STATEMENT], maxsplit=1)[0]
    formulas = re.findall(r"\$\$?([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text)
    return next(part for part in formulas[0] if part) if formulas else text.rstrip("| ")


def _plain(text: str) -> str:
    text = re.sub(r"(?<![\w)}])\*\*(?=\S)([^*]+)\*\*(?![\w({])", r"\1", text).strip().lstrip("$*_` ")
    if text.endswith("..."):
        return text
    text = text.rstrip("$*_`.\u3002 \t\n")
    return f"{text}$" if text.endswith("\\") else text


def _key(text: str) -> str:
    r"""A form in which equal texts are identical: no spaces but between digits, no `\text{}`, no braces around one
    character."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)).casefold().rstrip(".")


def same(stated: str, truth: str) -> bool:
    """Whether two answers in LaTeX or plain text are the same."""
    if max(len(stated), len(truth)) > MAX_CHARS:
        return stated == truth
    one, other = latex_of(stated), latex_of(truth)
    if _key(one) == _key(other):
        return _key(one) != ""
    if not one or (_denied(one) and not _denied(other)):
        return False
    one, other = _words_read(one, other), _words_read(other, other)
    if _is_words(other):
        return _key(one).strip("()") == _key(other).strip("()")
    bases = _NUMBER_BASE.fullmatch(one), _NUMBER_BASE.fullmatch(other)
    if any(bases):
        return all(bases) and len({(m[1].casefold(), _BASES.get(m[2], m[2])) for m in bases if m}) == 1
    return _same_quantity(one, other)


def _denied(text: str) -> bool:
    """Whether words or signs deny or bound the value: `not 13`, `at most 5`, `no es 72`."""
    return bool(
        DENYING_WORDS.search(text)
        or DENIED_AFTER.search(re.sub(r"\A[^0-9]*[0-9.,]+", "", text))
        or _SCALED.search(text)
    )


def _words_read(text: str, truth: str) -> str:
    """The text without words around the value, and with number words as digits."""
    if not _OTHER_SCRIPT.search(truth):
        text = _OTHER_SCRIPT.sub(" ", text).strip()
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip().casefold()
    if _NO_SOLUTION.fullmatch(bare):
        return "\\emptyset"
    if _ALL_REALS.fullmatch(bare):
        return "(-\\infty,\\infty)"
    if re.fullmatch(r"[a-z -]+", bare) and len(bare) > 2:
        number = number_in_words(bare)
        return text if number is None else str(number.value)
    text = _NEGATIVE.sub("-", text, count=1)
    text = _TIMES.sub(_multiplied, text)
    if not _denied(text):
        text = _LEADING_WORDS.sub("", text, count=1)
    text = re.sub(r",\s*\\text\{\s*(?:since|because|where|for|as|when|if)\b.*", "", text)
    text = re.sub(r"^([0-9.]+)\s+to\s+([0-9.]+)$", r"\1:\2", text)
    return _DEGREES_IN.sub(r"\1(\\frac{\2\\cdot\\pi}{180})", text)


def _multiplied(match: re.Match[str]) -> str:
    """`5 million` as a product; what follows in the same braces stays in braces."""
    return f"{match[1]}\\cdot {SCALES[match[3].casefold()]}" + ("\\text{" if match[2] and not match[4] else "")


def _is_words(text: str) -> bool:
    """True for an answer that is a text: `\\text{Monday}`, `Evelyn`, `\\text{(C)}`."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if re.search(r"[0-9=^_+<>\\]", bare):
        return False
    return "\\text{" in text or bool(re.search(r"[^\W\d_]{4,}", bare))


def _same_quantity(one: str, other: str) -> bool:
    (value, unit), (wanted, truth_unit) = without_unit(one), without_unit(other)
    value, percent = _without_percent(value, unit)
    wanted, truth_percent = _without_percent(wanted, truth_unit)
    units = {unit, truth_unit} - {"", "%"}
    if len(units) == 2 or (units and (percent or truth_percent)):
        return False
    if percent and not truth_percent:
        value = _hundredth(value)
    truth = structure_of(_ratio(wanted))
    if equal(structure_of(_ratio(value)), truth):
        return True
    return truth_percent and not percent and equal(structure_of(value), structure_of(_hundredth(wanted)))


def _without_percent(text: str, unit: str) -> tuple[str, bool]:
    bare = text.strip().removesuffix("\\%")
    return bare.strip(), unit == "%" or bare != text.strip()


def _hundredth(text: str) -> str:
    mixed = re.sub(r"(?<![\d.}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\\frac{\2}{\3})", text)
    return f"\\frac{{{mixed}}}{{100}}"


def _ratio(text: str) -> str:
    """`3:4` as a fraction, `1:2:3` as a tuple."""
    parts = text.split(":")
    if len(parts) == 2 and all(part.strip() for part in parts):
        return f"\\frac{{{parts[0]}}}{{{parts[1]}}}"
    return f"({','.join(parts)})" if len(parts) > 2 else text


def prepare() -> None:
    """Import the parser of math-verify and sympy (a second, longer on a busy machine), and read a first expression: the
    parser builds its tables with it."""
    same("\\frac{1}{2}+x", "x+0.5")


def _truth(ground_truth: Any) -> str:
    r"""The ground truth as LaTeX; of a whole solution, its last `\boxed{...}`, else what it states as its answer.

    Raises TypeError or ValueError for one that no answer can equal: none, a placeholder such as N/A, or prose.
    """
    text = ground_truth_text(ground_truth)
    found = statements(text)
    boxes = [statement for statement in found if statement.kind == "boxed"]
    truth = _plain((boxes or found)[-1].text if found else text)
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[a-zA-Z]+", " ", truth))
    if truth.casefold() in _PLACEHOLDERS or not re.search(r"\w|\\[a-zA-Z{]|[\u2205\u221e{]", truth):
        raise ValueError(
            f"ground_truth is {text[:40]!r}, expected an answer such as '\\frac{{1}}{{2}}', '180' or '(3, 4)'"
        )
    if len(words) > _MAX_WORDS:
        raise ValueError(
            f"ground_truth is {text[:40]!r}..., a text of {len(words)} words, expected an answer such as '180' alone, "
            "after '####' or in \\boxed{}"
        )
    return truth


def _plain_answers(ground_truth: Any) -> list[str]:
    return [f"\\boxed{{{_truth(ground_truth)}}}"]


@REWARDS.register(
    "math",
    "lighteval/MATH",
    "DigitalLearningGmbH/MATH-lighteval",
    "HuggingFaceH4/MATH-500",
    "math_dapo",
    "math_dapo_reasoning",
    "aime*",
    check_ground_truth=_truth,
    plain_answers=_plain_answers,
    prepare=prepare,
)
def math(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score 1.0 when the stated expression equals the ground truth, else 0.0; `format` is 1.0 when one is stated.

    Raises TypeError or ValueError for a ground truth that is no answer: neither a text nor a number, empty, a
    placeholder or prose. No response raises.
    """
    truth = _truth(ground_truth)
    stated = stated_expression(solution_str, truth)
    right = float(stated is not None and same(stated, truth))
    return {"score": right, "acc": right, "format": float(stated is not None)}
