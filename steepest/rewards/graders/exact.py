"""Exact match of texts: the stated answer against the ground truth, after a careful normalisation."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from steepest.rewards.answers import ground_truth_text, last_line, last_remark, plain, statements, visible
from steepest.rewards.api import REWARDS
from steepest.rewards.numbers import plain_digits

_SPELLINGS = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2010": "-", "\u2011": "-", "\u2012": "-",
        "\u2013": "-", "\u2014": "-", "\u2212": "-",
    }
)  # fmt: skip
_TEXT_COMMAND = re.compile(
    r"\\(?:text(?:bf|it|sf|rm)?|emph|math(?:rm|bf|it|sf)|boldsymbol|bm|mbox|underline|operatorname)\s*\{([^{}]*)\}"
    r"|</?(?:b|i|em|strong|u|code)>"
)
# one spelling for what can be written in LaTeX and in Unicode
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\!\s?|(?<=\d)\\,(?=\d{3})|(?<=\d)\{,\}(?=\d{3})"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]"), " "),
    (re.compile(r"\s*\\?%"), "%"),
    (re.compile(r"\\\$"), "$"),
    (
        re.compile(r"\A(-?[$\u20ac\u00a3\u00a5\u20b9])\s+(?=[0-9])|(?<=[0-9])\s+(?=[$\u20ac\u00a3\u00a5\u20b9]\Z)"),
        r"\1",
    ),
    (re.compile(r"\\[dtc]?frac\s*\{(\w+)\}\s*\{(\w+)\}"), r"\1/\2"),
    (re.compile(r"\\degree(?![a-zA-Z])"), "\u00b0"),
    (re.compile(r"\\(?:emptyset|varnothing)(?![a-zA-Z])"), "\u2205"),
    (re.compile(r"\\pi(?![a-zA-Z])"), "\u03c0"),
    (re.compile(r"\\sqrt\s*(?:\{(\w+)\}|(\w))"), "\u221a\\1\\2"),
    (re.compile(r"\\leq?(?![a-zA-Z])|<="), "\u2264"),
    (re.compile(r"\\geq?(?![a-zA-Z])|>="), "\u2265"),
    (re.compile(r"\\times(?![a-zA-Z])\s?|\u00d7"), " x "),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), "\u00b0"),
    (re.compile(r"\^\{(-?\w+)\}"), r"^\1"),
    (re.compile(r"_\{?([0-9]+)\}?"), r"\1"),
    (re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+"), r"^\g<0>"),
    (re.compile("(?<=[0-9])(?=[\u00bc-\u00be\u2150-\u215e])"), " "),
    (re.compile(r"^\(([^()]*)\)$"), r"\1"),
)
_BULLET = re.compile(r"^\s*(?:[#>*]+|-+(?!\s*[0-9])|[0-9]+\.)\s+")
_ABBREVIATION = re.compile(r"\b(?:\w\.){2,}")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+(?=\w)")
_BOLD = re.compile(r"(?<![\w*])(?:\*\*)(?=\S)([^*]+?)(?<=\S)\*\*(?![\w*])")
_DELIMITERS = re.compile(r"\\[()\[\]]")
_AROUND = (
    " \t\n\"'`*_.,;:!?\u3002\uff01\uff1f\u3001\u0964\u00ab\u00bb\u201e\u300a\u300b\u300c\u300d\u3010\u3011\u00b7\u2022"
)

_MARKS = " \t\n\"'`*_"
# Marks before a text. A full stop or an exclamation mark that touches a letter or a digit belongs to it: `.5`, `!a`.
_BEFORE = re.compile(rf"\A(?:\.{{2,}}|(?![.!]\w)[{re.escape(_AROUND)}])+")
_DOLLARS = re.compile(r"\A\s*(\${1,2})([^$]*)\1[\s.]*\Z")  # mathematics; a single one is money


def normalise(text: str) -> str:
    """The form in which texts are compared.

    Case, Unicode spelling, quotes, Markdown around the text, a leading article, spaces, hyphens between words, commas
    between words and a full stop at the end make no difference. All other characters count: signs, decimal points,
    `%`, `+`.
    """
    text = _DOLLARS.sub(r"\2", plain_digits(plain(" ".join(text.split()).strip(_MARKS)))).strip(_MARKS)
    text = _TEXT_COMMAND.sub(r"\1", _DELIMITERS.sub("", _BOLD.sub(r"\1", text)))
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").translate(_SPELLINGS).casefold()
    text = _BULLET.sub("", text)
    text = _ABBREVIATION.sub(lambda match: match[0].replace(".", ""), text)
    text = _BEFORE.sub("", text).rstrip(_AROUND)
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", text)
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r",(?=\s)", "", re.sub(r"(?<=[0-9]),\s+(?=[0-9])", ",", text))
    text = re.sub(r"\s*([=<>+*/^-])\s*", r"\1", " ".join(text.split()))
    return _ARTICLE.sub("", text)


def stated_text(text: str) -> str:
    """The text of the answer: the last statement (see answers.py), else what looks like a heading or a sentence about
    the answer at the end of the text, else the last line."""
    shown = visible(text)
    found = statements(shown)
    if found:
        return found[-1].text
    remark = last_remark(shown)
    return remark.text if remark is not None else last_line(shown)


def _truths(ground_truth: Any) -> list[str]:
    """The ground truth as a list: one text, or several texts that are all right. A text such as `Answer: Paris` is
    right as it is and as what it states."""
    truths = list(ground_truth) if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    if not truths:
        raise ValueError("ground_truth is an empty list")
    texts = [ground_truth_text(truth) for truth in truths]
    return [*texts, *(found[-1].text for text in texts if (found := statements(text)))]


def _plain_answers(ground_truth: Any) -> list[str]:
    forms = ("Answer: {}", "<answer>{}</answer>", "{}")
    return [form.format(truth) for truth in _truths(ground_truth) for form in forms]


@REWARDS.register("exact", check_ground_truth=_truths, plain_answers=_plain_answers)
def exact(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score 1.0 when the stated answer equals the ground truth (or one of a list), see `normalise`; else 0.0.

    Raises TypeError or ValueError for a ground truth that is neither a text nor a list of texts, or is empty.
    """
    answer = normalise(stated_text(solution_str))
    right = answer != "" and answer in {normalise(truth) for truth in _truths(ground_truth)}
    return {"score": float(right), "acc": float(right)}
