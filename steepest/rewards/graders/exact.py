"""Exact match of texts: the stated answer against the ground truth, after a careful normalisation."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from steepest.rewards.answers import ground_truth_text, last_line, last_remark, plain, statements, visible
from steepest.rewards.api import REWARDS

_SPELLINGS = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2010": "-", "\u2011": "-", "\u2012": "-",
        "\u2013": "-", "\u2014": "-", "\u2212": "-",
    }
)  # fmt: skip
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textsf|emph|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_BULLET = re.compile(r"^\s*(?:[#>*-]+|[0-9]+\.)\s+")
_ABBREVIATION = re.compile(r"\b(?:\w\.){2,}")
_ARTICLE = re.compile(r"^(?:the|an|a)\s+(?=\w)")
_DELIMITERS = re.compile(r"\\[()\[\]]")
_AROUND = (
    " \t\n\"'`*_$.,;:!?\u3002\uff01\uff1f\u3001\u0964\u00ab\u00bb\u201e\u300a\u300b\u300c\u300d\u3010\u3011\u00b7\u2022"
)


def normalise(text: str) -> str:
    """The form in which texts are compared.

    Case, Unicode spelling, quotes, Markdown around the text, a leading article, spaces, hyphens between words, commas
    between words and a full stop at the end make no difference. All other characters count: signs, decimal points,
    `%`, `+`.
    """
    text = _TEXT_COMMAND.sub(r"\1", _DELIMITERS.sub("", plain(text)))
    text = "".join(c if _changes_number(c) else unicodedata.normalize("NFKC", c) for c in text)
    text = unicodedata.normalize("NFC", text).translate(_SPELLINGS).casefold()
    text = _BULLET.sub("", text)
    text = _ABBREVIATION.sub(lambda match: match[0].replace(".", ""), text)
    text = text.strip(_AROUND)
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", text)
    text = re.sub(r",(?=\s)|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"\s*([=<>+*/^-])\s*", r"\1", " ".join(text.split()))
    return _ARTICLE.sub("", text)


def _changes_number(c: str) -> bool:
    """True if the compatibility form of `c` would change a number: superscripts and fractions (10\u00b2 -> 102)."""
    return unicodedata.decomposition(c).startswith(("<super>", "<fraction>"))


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
    """The ground truth as a list: one text, or several texts that are all right."""
    truths = list(ground_truth) if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    if not truths:
        raise ValueError("ground_truth is an empty list")
    return [ground_truth_text(truth) for truth in truths]


@REWARDS.register("exact", check_ground_truth=_truths)
def exact(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score 1.0 when the stated answer equals the ground truth (or one of a list), see `normalise`; else 0.0.

    Raises TypeError or ValueError for a ground truth that is neither a text nor a list of texts, or is empty.
    """
    answer = normalise(stated_text(solution_str))
    right = answer != "" and answer in {normalise(truth) for truth in _truths(ground_truth)}
    return {"score": float(right), "acc": float(right)}
