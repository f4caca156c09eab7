r"""Finds the final answer that a response states, for the graders that compare values or texts.

A statement of an answer is one of these, anywhere in the text:
  boxed    `\boxed{...}` or `\fbox{...}`, braces balanced
  tag      `<answer>...</answer>`
  hashes   the rest of a line after four or more `#`; the next line when its own is blank
  phrase   what follows `answer:` or `the answer is` (would be, must be) up to the end of the sentence; the next line
           when its own is blank

The last statement is the answer, because a model that corrects itself does so afterwards. Text before `</think>` is
thinking and is not searched; a response whose thinking does not end has no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_THINK_OPEN = re.compile(r"<think(?:ing)?>")
_THINK_CLOSE = re.compile(r"</think(?:ing)?>")
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?P<bare>-?[0-9]+(?:\.[0-9]+)?))")
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_HASHES = re.compile(r"#{4,}(?!#)(?=(?P<line>[^\n]{0,400})(?:\n\s*(?P<next>[^\n]{0,400}))?)")
_PHRASE = re.compile(
    r"""
    (?:\banswer\b[*_"]{0,2}\s{0,2}(?:(?:is|would\ be|must\ be|should\ be)\b\s{0,2}:?|[:=])|\u7b54\u6848\s?[:\uff1a])
    [*_]{0,2}(?=(?P<line>[^\n]{0,400})(?:\n\s*(?P<next>[^\n]{0,400}))?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?P<word>\S*)[.!?](?P<mark>[*_\"'`$)\]]*)\s+(?=[\"'(*]*[A-Z])")
_ABBREVIATION = re.compile(r"\W*(?:[A-Z][a-z]?|Mrs|vs|etc|approx|[a-z])\Z")
_HAS_WORD = re.compile(r"\w")
_MAX_DEPTH = 50
_MAX_STATEMENTS = 50


@dataclass(frozen=True)
class Statement:
    """One place where a response states an answer."""

    kind: str
    """boxed, tag, hashes or phrase."""
    text: str
    start: int


def visible(text: str) -> str:
    """The response without its thinking; empty when the thinking does not end."""
    closed = [match.end() for match in _THINK_CLOSE.finditer(text)]
    rest = text[closed[-1] :] if closed else text
    return "" if _THINK_OPEN.search(rest) else rest


def statements(text: str) -> list[Statement]:
    """The statements of an answer in `text` (see `visible`), in the order of the text; of very many the last ones."""
    found = [Statement("boxed", content, start) for start, content in _boxes(text)]
    found += [Statement("tag", match[1], match.start()) for match in _TAG.finditer(text)]
    for kind, pattern in (("hashes", _HASHES), ("phrase", _PHRASE)):
        for match in pattern.finditer(text):
            line = match["line"] if _HAS_WORD.search(match["line"]) else match["next"] or ""
            found.append(Statement(kind, first_sentence(line) if kind == "phrase" else line, match.start()))
    return sorted(found, key=lambda statement: statement.start)[-_MAX_STATEMENTS:]


def first_sentence(text: str) -> str:
    """`text` up to its first sentence end: a full stop before a capital letter, but not the one of `B. Paris`."""
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.match(match["word"]):
            return text[: match.end("mark")]
    return text


def last_line(text: str) -> str:
    """The last line with a letter or a digit, or the empty text."""
    return next((line for line in reversed(text.splitlines()) if _HAS_WORD.search(line)), "")


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    for match in _BOX.finditer(text):
        content = match["bare"] or _balanced(text, match.end())
        if content is not None:
            yield match.start(), content


def _balanced(text: str, start: int) -> str | None:
    """The text between an open brace, which ends at `start`, and its closing brace. None without one, or nested too
    deep."""
    depth = 1
    for place in re.finditer(r"\\.|[{}]", text[start : start + 2000]):
        if place[0] == "{":
            depth += 1
            if depth > _MAX_DEPTH:
                return None
        elif place[0] == "}":
            depth -= 1
            if depth == 0:
                return text[start : start + place.start()]
    return None


def ground_truth_text(ground_truth: object) -> str:
    """A ground truth as text. Raises TypeError if it is neither a text nor a number, ValueError if it is empty."""
    if isinstance(ground_truth, (int, float)) and not isinstance(ground_truth, bool):
        ground_truth = repr(ground_truth)
    if not isinstance(ground_truth, str):
        raise TypeError(f"ground_truth is {type(ground_truth).__name__}, expected a text such as '72'")
    if not ground_truth.strip():
        raise ValueError("ground_truth is empty")
    return ground_truth.strip()
