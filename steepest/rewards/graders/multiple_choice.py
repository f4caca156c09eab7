"""Multiple choice: the letter that a response chooses against the letter of the ground truth."""

from __future__ import annotations

import re
from typing import Any

from steepest.rewards.answers import first_sentence, ground_truth_text, statements, visible
from steepest.rewards.api import REWARDS

_MARKUP = re.compile(
    r"\\(?:text(?:bf)?|math(?:bf|rm)|boldsymbol|boxed)\b\s*|</?[a-z]{1,6}>|(?<!\w)'(?=[A-Z]')|(?<=[A-Z])'(?!\w)"
    r"|\\[()\[\] ,;]|[{}$*_`\"\u3010\u3011]"
)
# One letter that stands alone. A lower-case one needs brackets around it, or nothing behind it.
_CHOICE = re.compile(
    r"""
    \s*(?:[\u9009\u9078]\s?:?\s?)?(?i:(?:the\s+)?(?:correct\s+|best\s+|right\s+)?(?:option|choice|letter|answer)\s+(?:is\s+)?)?
    (?:[(\[](?P<inner>[A-Za-z])[)\]]|(?P<bare>[A-Z])(?![A-Za-z0-9_'+\#])|(?P<small>[a-z])(?=\s*[.)]?\s*\Z))
    (?P<rest>.*)
    """,
    re.VERBOSE | re.DOTALL,
)
_OTHER = re.compile(
    r"\s*(?:[,/&|\u3001]|,?\s*\b(?:or|and|maybe|perhaps)\b|[\u548c\u6216\u4e0e\u53ca\u3068])[\s(\[]*(?:maybe\s+|perhaps\s+)?[A-Z]\b(?!')"
    r"|\s*[(\[][A-Z][)\]]"
)
_DENIED = re.compile(
    r"\b(?:wrong|incorrect|false|not\s+(?:right|correct|true|the))\b|\bisn't\b|[\u9519\u932f]"
    r"|\A\s*(?:(?:is|was|are|can|does|must|should|would|could)\s*)?(?:not\b|n't\b|cannot\b|(?:excluded|eliminated|fails?|out)\b)"
    r"|\A\s*(?:\u9009\u9879)?\u4e0d",
    re.IGNORECASE,
)
_REASON = re.compile(r"\b(?:because|since|while|whereas|as)\b|\u56e0\u4e3a", re.IGNORECASE)
# Words before a letter that take it out of the choice.
_DOUBTED = re.compile(
    r"\b(?:not|never|doubt|n't|can't|cannot|if|unless|whether|could|might|may|neither|either|both|between|except)\b[^.,;!?\n]{0,20}\Z"
    r"|n't\b[^.,;!?\n]{0,20}\Z|\u4e0d\s?\Z|\u975e\s?\Z",
    re.IGNORECASE,
)
# Phrases that choose a letter without the word "answer". The letter comes after or before the phrase.
_CHOOSING = re.compile(
    r"""
    (?:\b(?:so|hence|thus|therefore|it's|it\ is|that\ is|it\ (?:must|has\ to|should|would|can\ only)\ be|leaves|leaving
          |left\ with|chooses?|picks?|selects?|go(?:ing)?\ with|say|only)\b[,:]?\s+(?:is\s+)?(?:with\s+|(?:for|on)\s+)?
       |\b(?:correct|right|best|true|my|selected|chosen|final)\ (?:option|choice|pick|selection|one|response)
         \s?(?:\b(?:is|would\ be|must\ be)\b:?|:)\s+
       |^[\W_]{0,6}(?:option|choice|selected|selection|response|pick|ans\.?)\s?[:.]\s{0,3}
       |\bthe\ one\ that\ \w+\ is\s+
       |(?:\u6545|\u5e94|\u61c9|\u6240\u4ee5|\u56e0\u6b64)?(?:\u9009\u62e9|\u9078\u64c7|\u9009|\u9078)\s?:?\s?
       |(?:\u9009\u9879|\u9078\u9805|\u9078\u629e\u80a2)\s?(?:[\u662f\u4e3a\u70ba\u306f])?\s?:?\s?)
    (?:the\s+)?(?:option\s+|choice\s+|letter\s+)?[(\[]?(?P<after>[A-Z])[)\]]?(?![A-Za-z0-9_'+\#])
      (?=(?P<rest>[^\n]{0,400}))
    |(?<![\w'.])[(\[]?(?P<before>[A-Z])[)\]]?\s+
      (?:is\s+(?:the\s+)?(?:only\s+|one\s+)?(?:correct|right|best|answer|true|one)\b|it\ is\b
      |(?:fits|seems|looks|is)\s+(?:best|most\s+(?:plausible|likely)|left)\b)
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# Before the letter of a sentence such as `B is best`: a word that the letter belongs to (`Vitamin C`).
_IN_A_NAME = re.compile(
    r"\b(?!(?:so|that|and|but|hence|thus|then|therefore|think|believe|say|option|choice|answer|letter|clearly|conclude|only|or|because"
    r"|means|as|since|statement|is|now|here|say|know|see|shows|where|while|which|course|case)\b)[a-z]{2,}\s\Z",
    re.IGNORECASE,
)
# A letter that may be a choice, or a word that says that there is none
_NAMES_A_LETTER = re.compile(
    r"(?<![A-Za-z0-9_'])(?!I\s+[a-z])(?:[A-Z]+|[a-z]\s*[.)]?\s*\Z|[a-z](?=[)\]]))(?![A-Za-z0-9_'+\#])"
    r"|\b(?:none|neither|unknown|nothing|unclear|cannot|can't|not)\b|\A\W*\Z",
)
# Marks before an answer on a line of its own
_POINTER = re.compile(r"^\s*(?:[-*\u2022>\u2192\u2705\u2713\u2714]|=>|->)\s+")
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
    if is_word or _OTHER.match(rest) or re.match(r"\s+[B-Z]\b(?!')", rest) or _denied(rest):
        return None
    return letter.upper()


def _denied(rest: str) -> bool:
    """Whether the words after a letter deny it. A reason that follows may deny other letters."""
    return _DENIED.search(_REASON.split(first_sentence(rest), maxsplit=1)[0]) is not None


def chosen(text: str) -> str | None:
    """The letter that a response chooses, or None.

    The last statement of an answer (answers.py) with a letter counts; if it denies the letter, names several, or says
    that there is none, the result is None. Without a statement these count: a response that is only a label (`B`,
    `(b) Paris`); the last sentence such as `so I choose B` or `B is the correct option`; `(B) ...`, `B. ...` or
    `Option B: ...` as the last or the first line.
    """
    shown = visible(text)
    found = statements(shown)
    for statement in reversed(found):
        if _NAMES_A_LETTER.search(_MARKUP.sub(" ", statement.text)):
            return choice(statement.text)
    lines = [line for line in shown.splitlines() if line.strip()]
    if not lines:
        return None
    if (letter := _by_sentence(shown)) is not None:
        return letter
    if len(lines) == 1 and _is_short(lines[0]):
        return choice(_POINTER.sub("", lines[0]))
    ends = [_MARKUP.sub(" ", line).strip() for line in (lines[-1], lines[0])]
    labels = [match[1] for plain in ends if (match := _LABELLED.match(plain)) and not _DENIED.search(plain)]
    if len(set(labels)) != 1:  # two letters: a copy of the options
        return None
    return labels[0]


def _is_short(line: str) -> bool:
    """True for a label such as `Option B` or `(b) Paris`, false for a sentence about the letter."""
    plain = _POINTER.sub("", _MARKUP.sub(" ", line)).strip()
    return len(plain.split()) <= 2 or bool(_LABELLED.match(plain)) or plain.startswith(("(", "["))


def _by_sentence(text: str) -> str | None:
    letter, text = None, _MARKUP.sub(" ", text)
    for match in _CHOOSING.finditer(text):
        found, rest = match["after"] or match["before"], match["rest"] or ""
        if _DOUBTED.search(text[max(0, match.start() - 40) : match.start()]):
            continue
        if match["before"] and _IN_A_NAME.search(text[max(0, match.start() - 30) : match.start()]):
            continue
        if found.isupper() and not _OTHER.match(rest) and not _denied(rest):
            is_word = found in ("A", "I") and re.match(r"\s+\w", rest)
            letter = letter if is_word else found
    return letter


def _truth(ground_truth: Any) -> str:
    text = ground_truth_text(ground_truth)
    found = statements(text)
    letter = choice(found[-1].text if found else text)
    if letter is None:
        index = " A number does not say whether 0 or 1 is A." if text.isdigit() else ""
        raise ValueError(f"ground_truth is {text[:40]!r}, expected one letter such as 'B', '(B)' or 'B) Paris'.{index}")
    return letter


def _plain_answers(ground_truth: Any) -> list[str]:
    return [f"Answer: {_truth(ground_truth)}"]


@REWARDS.register("multiple_choice", check_ground_truth=_truth, plain_answers=_plain_answers)
def multiple_choice(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    """Score 1.0 when the response chooses the letter of the ground truth, else 0.0; `format` is 1.0 when it chooses.

    Raises TypeError or ValueError for a ground truth that is not a letter.
    """
    truth, letter = _truth(ground_truth), chosen(solution_str)
    right = float(letter == truth)
    return {"score": right, "acc": right, "format": float(letter is not None)}
