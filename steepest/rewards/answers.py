r"""Finds the final answer that a response states, for the graders that compare values or texts.

A statement of an answer is one of these, anywhere in the text:
  boxed    `\boxed{...}` or `\fbox{...}`, braces balanced
  tag      `<answer>...</answer>`
  hashes   the rest of a line after four or more `#`; the next line when its own is blank or only says "answer"
  phrase   what follows `answer:`, `the answer is` (would be, must be) or the same in another language, up to the end of
           the sentence; the next line when its own is blank

A heading (`#### Explanation`, `#### Step 2`), a sentence about the answer (`the answer is verified`) and one that
supposes it (`if the answer is 5`) state nothing. The last statement is the answer, because a model that corrects itself
does so afterwards. Text before `</think>` is thinking and is not searched; a response whose thinking does not end has
no answer. Full-width characters count as the plain ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_THINK_OPEN = re.compile(r"<think(?:ing)?>")
_THINK_CLOSE = re.compile(r"</think(?:ing)?>")
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?P<bare>-?[0-9]+(?:\.[0-9]+)?))")
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_REST = r"(?=(?P<line>[^\n]{0,400})(?:\n\s*(?:(?:\\\[|\$\$)\s*)?(?P<next>[^\n]{0,400}))?)"
_HASHES = re.compile(r"#{4,}(?!#)" + _REST)
_PHRASE = re.compile(
    r"""
    (?:(?<!/)(?<!\bof\s)(?<!\bof\sthe\s)\banswer\b[*_"']{0,2}(?P<about>\s(?:to|for|of|in)\s[^\n.:?!]{1,60}?|\s?\([^()\n]{1,30}\))?
       (?:,\s(?:then|therefore|thus|so),)?
       \s{0,2}(?P<is>(?:is|would\ be|must\ be|should\ be)\b\s{0,2}:?|[:=|]|[-=]>|[\u2192\u21d2])
      |^[#*_\ ]{0,9}(?:final\ )?answer[*_]{0,2}\s(?:[-\u2013\u2014]\s|(?=[$]?[0-9]))
      |^[#*_\ ]{0,9}(?:final\ )?answer[*_\ ]{0,5}$
      |\u7b54\u6848\s?(?:[:=]|[\u662f\u4e3a\u70ba\u9078\u9009]\s?:?|(?=[\u3011]))\u3011?
      |\u7b54\u3048\s?(?:[:=]|\u306f)
      |(?:\b\u043e\u0442\u0432\u0435\u0442|\b\u0432\u0456\u0434\u043f\u043e\u0432\u0456\u0434\u044c|\b\u03b1\u03c0\u03ac\u03bd\u03c4\u03b7\u03c3\u03b7|\b\u0111\u00e1p\s(?:\u00e1n|s\u1ed1)|\bodpowied\u017a
         |\bodpov\u011b\u010f|\bsvar|\bcevap|\byan\u0131t|\bjawaban|\bvastaus|\bantwoord|\br\u0103spuns|\b\u05ea\u05e9\u05d5\u05d1\u05d4|\u067e\u0627\u0633\u062e
         |\u062c\u0648\u0627\u0628|\u0989\u09a4\u09cd\u09a4\u09b0|\u099c\u09ac\u09be\u09ac|\u091c\u0935\u093e\u092c|\u0baa\u0ba4\u0bbf\u0bb2\u0bcd|\u0c38\u0c2e\u0c3e\u0c27\u0c3e\u0c28\u0c02
         |\br\u00e9ponse|\brespuesta|\bantwort|\brisposta|\bresposta|\b\uc815\ub2f5
         |\u0e04\u0e33\u0e15\u0e2d\u0e1a|\u0909\u0924\u094d\u0924\u0930|\u0627\u0644\u062c\u0648\u0627\u0628
         |\u0627\u0644\u0625\u062c\u0627\u0628\u0629|\u1785\u1798\u17d2\u179b\u17be\u1799)
       (?:\s(?:final|finale|correcta?|correcte|corretta))?
       (?:\s?[:=]|\s(?:is|est|es|ist|lautet|\u00e8|\u00e9|\u0647\u064a|\u0647\u0648)\b\s?:?|\u0e04\u0e37\u0e2d|\u1782\u17ba|\uc740|(?=\s?[0-9]))
    )
    [*_]{0,2}"""
    + _REST,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# The first words of a line after `####` that is a heading.
_HEADING = re.compile(
    r"""
    [\s*_]*(?:[0-9]{1,2}[.)]\s+)?[*_]*(?:the\s+|my\s+|your\s+|let's\s+|let\s+(?:us|me)\s+|final\s+)?
    (?:steps?|parts?|cases?|phase|stage|section|chapter|questions?|problem|exercise|examples?|method|approach|explanations?
      |explain\w*|reasoning|reasons?|analys\w+|(?:double[-\s])?check\w*|verif\w+|proof|notes?|remarks?|summary|calculat\w+
      |comput\w+|background|given|sources?|references?|appendix|why|how|what|breakdown|details|understand\w*|hints?|confidence
      |discussion|key|overview|introduction|recap|justification|derivation|working|thoughts?|thinking|interpretation
      |assumptions?|setup|plan|strategy|observations?|tips?|disclaimer|context|additional|important|further
      |schritt|erkl\u00e4rung|\u00e9tape|explication|paso|explicaci\u00f3n|\u0448\u0430\u0433
      |\u043e\u0431\u044a\u044f\u0441\u043d\u0435\u043d\u0438\u0435|\u043f\u0440\u043e\u0432\u0435\u0440\u043a\u0430)\b
    |[\s*_]*(?:\u7b2c\s?[0-9\u4e00-\u9fff]{1,3}\s?\u6b65|\u6b65\u9aa4|\u6b65\u9a5f|\u89e3\u91ca|\u89e3\u91cb|\u8bf4\u660e|\u8aac\u660e
      |\u5206\u6790|\u9a8c\u8bc1|\u68c0\u67e5|\u95ee\u9898|\u554f\u984c|\u89e3\u8aac|\u624b\u9806|\uc124\uba85|\ub2e8\uacc4)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NUMBERED = re.compile(r"[\s*_]*[0-9]{1,2}[.)]\s+[^\W\d]")
_LABEL = re.compile(
    r"[\s*_]*(?:(?:final|the|correct|short)\s+)*(?:answer|result)[\s*_]*(?P<colon>[:=]?)[\s*_]*", re.IGNORECASE
)
# What may stand between `the answer is` and the answer.
_ADVERB = re.compile(
    r"[\s*_]*(?:(?:therefore|thus|hence|then|so|clearly|obviously|evidently|simply|just|indeed|definitely|probably|(?:most\s+)?"
    r"likely|quite|very|actually|of\s+course|certainly|surely|now|therefore)\b,?\s+)+",
    re.IGNORECASE,
)
# Words that say something about an answer, with the end of the sentence or a clause behind them.
_ABOUT = re.compile(
    r"""
    \s*(?:(?:about|almost|nearly)\s+)?(?:[0-9]+(?:\.[0-9]+)?\s?%\s+)?(?:(?:in|as|not)\s+)?(?:the\s+)?
    (?:verified|confirmed|checked|correct|right|accurate|valid|certain|sure|likely|clear|unclear|simple|easy|obvious|explained|shown
      |given|found|derived|stated|written|boxed|known|below|above|text|follows|final|complete|helpful|useful|good|reasonable|here
      |consistent|plausible)\b
    (?=\s*(?P<colon>:)|\s*[*_]*(?:[.,;!?)]|\Z)|\s+(?:by|in|with|above|below|because|since|and|as|for|to|enough|now|from|at|here
      |[0-9]+\s+times)\b)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ABOUT_IN_CHINESE = re.compile(
    r"\s*(?:[0-9]+%\s?)?(?:\u6b63\u786e|\u6b63\u78ba|\u5bf9\u7684|\u5c0d\u7684|\u660e\u786e|\u663e\u7136\u7684|\u5982\u4e0b|\u552f\u4e00)"
)
_QUOTED = re.compile(r"""\s*(?P<quote>["'])(?P<text>[^"'\n]*)(?P=quote)\s*[,}]|\s*(?P<bare>[^"'{},\n]+)\}\s*\Z""")
_KEY = re.compile(r"""["']answer["']\s*:""", re.IGNORECASE)
# Before `the answer is`: the sentence supposes or asks, and states nothing.
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|supposing|assum(?:e|ing)|unless|whether|imagine|had)\b[^.,;:!?\n]{0,40}\Z|\b(?:wrong|incorrect|false)\s\Z|(?:\u5982\u679c|\u5047\u8bbe|\u5047\u5982)[^\n]{0,10}\Z",
    re.IGNORECASE,
)
# What a template writes around a turn, where it came as text.
_TURN_MARK = re.compile(r"<\|[a-zA-Z_]{1,30}\|>|</s>|<(?:start|end)_of_turn>|<eos>")
_COPULA = re.compile(
    "\\s?(?:\u3067\u3059|\u3060|\u3067\u3042\u308b|\uc785\ub2c8\ub2e4|\u0939\u0948|\u0964)[\\s.\u3002\u0964]*\\Z"
)
_SENTENCE_END = re.compile(r"(?:[.!?](?P<mark>[*_\"'`$)\]]*)\s+(?=[\"'(*]*[A-Z])|[\u3002\u0964](?=.))")
_ABBREVIATION = re.compile(r"\W*(?:[A-Z][a-z]?|Mrs|vs|etc|approx|[a-z])\Z")
_HAS_WORD = re.compile(r"[\w\u2200-\u22ff]")  # a sign such as the empty set is an answer too
_WORDS_ONLY = re.compile(r"[^0-9]*[^\W\d_]{3}[^0-9]*\Z|[\s*_]*[0-9]{1,2}[.)]\s+[^\W\d]")
_HASH_LINE = re.compile(r"\s*#{1,6}\s*")
_CONFIDENCE = re.compile(
    r"(?<![0-9.])[0-9.]{1,9}\s?%\s?(?:sure|certain|confident|correct|right|accurate|verified|likely|confidence|\u6b63\u786e|\u786e\u5b9a)\w*"
    r"|\bconfidence\b\W{0,5}[0-9.]{1,9}\s?%?|\b(?:checked|verified|confirmed)\s(?:it\s)?(?:in\s)?[0-9]{1,9}\s(?:times|ways)\b",
    re.IGNORECASE,
)
_WIDE_COMMA = re.compile("(?<=[\uff10-\uff19])\uff0c(?=[\uff10-\uff19])")
_PLAIN: dict[int, int | str] = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}, 0xFF0C: ", ", 0x3000: " ", 0xFFE5: "\u00a5"
}  # fmt: skip
_MAX_DEPTH = 50
_MAX_BOX = 2000
_MAX_STATEMENTS = 50


@dataclass(frozen=True)
class Statement:
    """One place where a response states an answer."""

    kind: str
    """boxed, tag, hashes or phrase."""
    text: str
    start: int
    remark: bool = False
    """True for a heading and for a sentence about the answer."""


def plain(text: str) -> str:
    """`text` with plain characters for full-width ones. A full-width comma ends a clause, except between full-width
    digits."""
    return text if text.isascii() else _WIDE_COMMA.sub(",", text).translate(_PLAIN)


def visible(text: str) -> str:
    """The response in plain characters, without its thinking and without marks such as `<|im_end|>`; empty when the
    thinking does not end."""
    text = _TURN_MARK.sub("\n", plain(text))
    closed = [match.end() for match in _THINK_CLOSE.finditer(text)]
    rest = text[closed[-1] :] if closed else text
    return "" if _THINK_OPEN.search(rest) else rest


def statements(text: str) -> list[Statement]:
    """The statements of an answer in `text` (see `visible`), in the order of the text; of very many the last ones.

    After a box or a tag, a line of words after `####` is a heading, whatever it says."""
    found = [statement for statement in _all_statements(text) if not statement.remark]
    first = min((statement.start for statement in found if statement.kind in ("boxed", "tag")), default=len(text))
    return [one for one in found if one.kind != "hashes" or one.start < first or not _WORDS_ONLY.match(one.text)]


def last_remark(text: str) -> Statement | None:
    """The heading or the sentence about an answer that ends `text`, or None: an answer may look like one."""
    found = _all_statements(text)
    return found[-1] if found and found[-1].remark and "\n" not in text[found[-1].start :].strip() else None


def _all_statements(text: str) -> list[Statement]:
    found = [Statement("boxed", content, start) for start, content in _boxes(text)]
    found += [Statement("tag", match[1], match.start()) for match in _TAG.finditer(text)]
    found += [_after_hashes(match) for match in _HASHES.finditer(text)]
    phrases = list(_PHRASE.finditer(without_open_box(text)))
    found += [_after_phrase(match) for match in phrases[-4 * _MAX_STATEMENTS :]]
    return sorted(found, key=lambda statement: statement.start)[-_MAX_STATEMENTS:]


def _after_hashes(match: re.Match[str]) -> Statement:
    line, below = match["line"], match["next"] or ""
    label = _LABEL.match(line)
    labelled = label is not None and (label["colon"] != "" or not _HAS_WORD.search(line[label.end() :]))
    if label is not None and labelled:
        line = line[label.end() :]
    if not _HAS_WORD.search(line):
        return Statement("hashes", without_exclamation(below), match.start(), remark=below.startswith("#"))
    return Statement(
        "hashes", without_exclamation(line), match.start(), remark=not labelled and is_heading(line, below)
    )


def _after_phrase(match: re.Match[str]) -> Statement:
    line, remark = match["line"] if _HAS_WORD.search(match["line"]) else match["next"] or "", False
    if (match["is"] or "")[:1].isalpha():
        line = _ADVERB.sub("", line, count=1) if _ADVERB.match(line) else line
        about = _ABOUT.match(line)
        if about is not None and about["colon"]:
            line = line[about.end("colon") :]
            line = line if _HAS_WORD.search(line) else match["next"] or ""
        else:
            remark = about is not None
    remark = remark or _ABOUT_IN_CHINESE.match(line) is not None
    remark = remark or _SUPPOSED.search(match.string[max(0, match.start() - 60) : match.start()]) is not None
    quoted = _QUOTED.match(line) if _KEY.match(match.string, max(0, match.start() - 1)) else None
    line = (quoted["text"] or quoted["bare"] or "") if quoted else _COPULA.sub("", first_sentence(line))
    return Statement("phrase", without_exclamation(line), match.start(), remark)


def is_heading(line: str, below: str) -> bool:
    """Whether the text after `####` is the heading of the text below it."""
    return _HEADING.match(line) is not None or (_NUMBERED.match(line) is not None and below[:1] not in ("", "#"))


def body(text: str) -> str:
    """`text` without lines that are headings or questions and without statements of confidence (`I am 99% sure`)."""
    lines = text.splitlines()
    kept = [
        line
        for line, below in zip(lines, [*lines[1:], ""], strict=False)
        if not line.rstrip(" *_").endswith("?")
        and not ((mark := _HASH_LINE.match(line)) and is_heading(line[mark.end() :], below))
    ]
    return _CONFIDENCE.sub("", "\n".join(kept))


def without_open_box(text: str) -> str:
    r"""`text` up to a `\boxed{` that does not end: a response that was cut there may have cut its number too."""
    last = text.rfind("\\boxed{")
    return text if last < 0 or "}" in text[last:] else text[:last]


def without_exclamation(text: str) -> str:
    """A sentence without the exclamation mark at its end; `72!` in a box is a factorial and none."""
    return re.sub(r"(?<=[0-9*_])!+(?=[\s*_]*\Z)", "", text)


def first_sentence(text: str) -> str:
    """`text` up to its first sentence end: a full stop before a capital letter, but not the one of `B. Paris`."""
    for match in _SENTENCE_END.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        if not _ABBREVIATION.match(before[-1:].strip() and before.split()[-1]):
            return text[: match.end("mark")]
    return text


def last_line(text: str) -> str:
    """The last line with a letter or a digit that is no heading, or the empty text."""
    return next((line for line in reversed(body(text).splitlines()) if _HAS_WORD.search(line)), "")


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    found = list(_BOX.finditer(text))
    closing = _closing_braces(text) if found else {}
    for match in found:
        end = closing.get(match.end())
        content = match["bare"] or (None if end is None else text[match.end() : end])
        if content is not None:
            yield match.start(), content


def _closing_braces(text: str) -> dict[int, int]:
    """Place after an open brace -> place of its closing brace, of the pairs that hold at most _MAX_BOX characters and
    are nested at most _MAX_DEPTH deep. One pass for all braces: a text may consist of them."""
    found: dict[int, int] = {}
    opened: list[tuple[int, int]] = []  # where a brace is open, and how many pairs it holds one in the other
    for place in re.finditer(r"\\.|[{}]", text):
        if place[0] == "{":
            opened.append((place.end(), 1))
        elif place[0] == "}" and opened:
            start, depth = opened.pop()
            if depth <= _MAX_DEPTH and place.start() < start + _MAX_BOX:
                found[start] = place.start()
            if opened:
                opened[-1] = (opened[-1][0], max(opened[-1][1], depth + 1))
    return found


def ground_truth_text(ground_truth: object) -> str:
    """A ground truth as text. Raises TypeError if it is neither a text nor a number, ValueError if it is empty
    or not finite."""
    if isinstance(ground_truth, float) and not math.isfinite(ground_truth):
        raise ValueError(f"ground_truth is {ground_truth}: is the cell empty?")
    if isinstance(ground_truth, (int, float)) and not isinstance(ground_truth, bool):
        ground_truth = repr(ground_truth)
    if not isinstance(ground_truth, str):
        raise TypeError(f"ground_truth is {type(ground_truth).__name__}, expected a text such as '72'")
    if not ground_truth.strip():
        raise ValueError("ground_truth is empty")
    return plain(ground_truth).strip()
