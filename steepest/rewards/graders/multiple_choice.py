"""Multiple choice: the letter that a response chooses against the letter of the ground truth."""

from __future__ import annotations

import re
from typing import Any

from steepest.rewards.answers import first_sentence, ground_truth_text, statements, visible
from steepest.rewards.api import REWARDS

_MARKUP = re.compile(r"\\(?:text(?:bf)?|math(?:bf|rm)|boxed)\b\s*|\\[()\[\] ,;]|[{}$*_`\"]")
# One letter that stands alone. A lower-case one needs brackets around it, or nothing behind it.
_CHOICE = re.compile(
    r"""
    \s*(?i:(?:the\s+)?(?:correct\s+|best\s+|right\s+)?(?:option|choice|letter|answer)\s+(?:is\s+)?)?
    (?:[(\[](?P<inner>[A-Za-z])[)\]]|(?P<bare>[A-Z])(?![\w'+#])|(?P<small>[a-z])(?=\s*[.)]?\s*\Z))
    (?P<rest>.*)
    """,
    re.VERBOSE | re.DOTALL,
)
_OTHER = re.compile(r"\s*(?:[,/&|]|,?\s*\b(?:or|and|maybe|perhaps)\b)[\s(\[]*(?:maybe\s+|perhaps\s+)?[A-Z]\b(?!')")
_DENIED = re.compile(r"\b(?:wrong|incorrect|false|not\s+(?:right|correct|true|the))\b|\bisn't\b", re.IGNORECASE)
# Phrases that choose a letter without the word "answer". The letter comes after or before the phrase.
_CHOOSING = re.compile(
    r"""
    (?:\b(?:so|hence|thus|therefore|it's|it\ is|leaves|choose|pick|select|go\ with|say)\b[,:]?\s+
       |\b(?:correct|right|best)\ (?:option|choice)\s+is\b:?\s+)
    (?:option\s+|choice\s+)?[(\[]?(?P<after>[A-Z])[)\]]?(?![\w'+#])(?=(?P<rest>[^\n]{0,400}))
    |(?<![\w'.])[(\[]?(?P<before>[A-Z])[)\]]?\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LABELLED = re.compile(r"(?:(?i:option|choice)\s+)?[(\[]?([A-Z])(?:[)\].:]+(?:\s|\Z)|,\s*(?:because|since)\b|\s*\Z)")


def choice(text: str) -> str | None:
    """The letter chosen in the text of a statement, or None: no letter, several, or one that is denied."""
    plain = _MARKUP.sub(" ", text).replace("\u2019", "'").strip()
    match = _CHOICE.match(plain)
    if match is None:
        return None
    letter, rest = match["inner"] or match["bare"] or match["small"], match["rest"]
    is_word = (
        match["bare"] in ("A", "I") and re.match(r"\s+[a-z]", rest) and not re.match(r"\s+(?:because|since)", rest)
    )
    if is_word or _OTHER.match(rest) or re.match(r"\s+[B-Z]\b(?!')", rest) or _DENIED.search(first_sentence(rest)):
        return None
    return letter.upper()


def chosen(text: str) -> str | None:
    """The letter that a response chooses, or None.

    The last statement of an answer (answers.py) counts; if it denies a letter or names several, the result is None.
    Without a statement these count: a response that is only a label (`B`, `(b) Paris`); the last sentence such as `so I
    choose B` or `B is the correct option`; `(B) ...`, `B. ...` or `Option B: ...` as the last or the first line.
    """
    shown = visible(text)
    found = statements(shown)
    if found:
        return choice(found[-1].text)
    lines = [line for line in shown.splitlines() if line.strip()]
    if not lines:
        return None
    if (letter := _by_sentence(shown)) is not None:
        return letter
    if len(lines) == 1 and _is_short(lines[0]):
        return choice(lines[0])
    for line in (lines[-1], lines[0]):
        plain = _MARKUP.sub(" ", line).strip()
        if _LABELLED.match(plain) and not _DENIED.search(plain):
            return choice(line)
    return None


def _is_short(line: str) -> bool:
    """True for a label such as `Option B` or `(b) Paris`, false for a sentence about the letter."""
    plain = _MARKUP.sub(" ", line).strip()
    return len(plain.split()) <= 2 or bool(_LABELLED.match(plain)) or plain.startswith(("(", "["))


def _by_sentence(text: str) -> str | None:
    letter = None
    for match in _CHOOSING.finditer(_MARKUP.sub(" ", text)):
        found, rest = match["after"] or match["before"], match["rest"] or ""
        if found.isupper() and not _OTHER.match(rest) and not _DENIED.search(first_sentence(rest)):
            is_word = found in ("A", "I") and re.match(r"\s+\w", rest)
            letter = letter if is_word else found
    return letter


def _truth(ground_truth: Any) -> str:
    text = ground_truth_text(ground_truth)
    match = re.fullmatch(r"[(\[]?([A-Za-z])[)\].]?", text)
    if match is None:
        raise ValueError(f"ground_truth is {text[:40]!r}, expected one letter such as 'B'")
    return match[1].upper()


@REWARDS.register("multiple_choice", check_ground_truth=_truth)
def multiple_choice(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score 1.0 when the response chooses the letter of the ground truth, else 0.0; `format` is 1.0 when it chooses.

    Raises TypeError or ValueError for a ground truth that is not a letter.
    """
    truth, letter = _truth(ground_truth), chosen(solution_str)
    right = float(letter == truth)
    return {"score": right, "acc": right, "format": float(letter is not None)}
