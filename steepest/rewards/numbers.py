"""Reads numbers as people write them, and decides which number a text states as its answer."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_MAX_DIGITS = 60  # longer runs are noise, and Python refuses to convert very long ones
_MAX_EXPONENT = 400

# A number may follow a letter of a script without spaces, or a word in one of _ALPHABETS; it may not follow a Latin
# letter, a single letter, an underscore or a digit (x72, GPT4, H2O, x_72), nor `#` or the sign of Chinese ordinals.
_ALPHABETS = "\u0370-\u06ff\u10a0-\u10ff"
NOT_IN_A_NAME = rf"(?<![0-9A-Za-z_\u00aa\u00b5\u00ba-\u024f\u7b2c\#])(?<!_\{{)(?<!(?<![{_ALPHABETS}])[{_ALPHABETS}])"
_CURRENCY = (
    re.compile(r"(?<![A-Za-z])(?:US|HK|NT|AU?|CA?|NZ|SG?|R|MX)(?=\s?\$\s?[-0-9])"),
    re.compile(
        r"(?<![A-Za-z])(?:US|USD|EUR|GBP|CNY|RMB|JPY|INR|KRW|CHF|SGD|AUD|CAD|HKD|NZD|TWD|BRL|MXN|RUB|TRY|ZAR|THB|VND|IDR|PHP|MYR"
        r"|NT|RM|Rp|Rs\.?)(?=\s?[$]?\s?[-.]?[0-9])"
    ),
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_TEN_TO_THE = re.compile("(?<=10)\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_OTHER_DIGIT = re.compile(r"[^\W\x00-\x7f]")
_CLEANING: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("[\u2212\u2013\ufe63\uff0d]"), "-"),
    (re.compile("\u066b"), "."),
    (re.compile("\u066c|(?<=[0-9])['\u2019](?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), "\u00b0"),
    (re.compile(r"\\!\s?|(?<=\d)\\,(?=\d{3})|(?<=\d)\{,\}(?=\d{3})"), ""),
    (re.compile(r"(?<![\d.,])(\d{1,3})\.(\d{3})\.(\d{3})(?![\d.])"), r"\1\2\3"),
    (re.compile(r"(?<![\d.,])(\d{1,3})\.(\d{3}),(\d{1,2})(?![\d.,])"), r"\1\2.\3"),
    (re.compile("[\u00a0\u2009\u202f\u2007]|\\\\[,;:! ]"), " "),
    (re.compile("\u2044|\u2215|\u00f7"), "/"),
    (re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])"), r" \1/\2 "),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2 "),
    (re.compile(r"\{\s*(\d+)\s*\\over\s*(\d+)\s*\}"), r" \1/\2 "),
    (re.compile(r"(?<=[-+])\s+(?=\d+/\d+\s)"), ""),
    (
        re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|sf)|boldsymbol|bm|mbox|underline)\s*\{([^{}]*)\}"),
        r"\1",
    ),
    (re.compile(r"\{,\}"), ","),
    *((pattern, "") for pattern in _CURRENCY),
    (re.compile(r"\\times|\\cdot|\u00d7"), " x "),
    (re.compile(r"(?<![\w.])(?<!x\s)(?<!x\s\s)10\s?\^\s?\{?(-?[0-9]{1,3})\}?(?![\w.])"), r"1e\1"),
    (re.compile("\u2248|\u2243|\\\\approx|\\\\sim"), " = "),
    (re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]"), "^"),
    (
        re.compile(
            r"\\(?=[$%])|\*\*|__|[`$\u20ac\u00a3\u00a5\u20b9\u20bd\u20a9\u20ba\u0e3f\u20ab]|\\[()\[\]]|\\(?:left|right)\b"
        ),
        "",
    ),
    (re.compile(r"(?<=\d)_(?=\d)"), ""),
)
_NUMBER = re.compile(
    r"""
    (?<![.^])(?<!\^\{)(?<![A-Za-z]-)"""
    + NOT_IN_A_NAME
    + r"""
    (?P<sign>(?<!\))(?:[-+]|minus\ |negative\ |[\u8d1f\u8ca0]|\u96f6\u4e0b)\s?)?
    (?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]{1,3}(?:\ [0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))
    (?P<decimals>\.[0-9]+|,[0-9]{1,2}(?![0-9,]))?
    (?P<mixed>\ [0-9]{1,4}/[0-9]{1,4})?
    (?:[eE](?P<exponent>[-+]?[0-9]{1,3})(?!\w)|\s{0,3}x\s{0,3}10\s?\^\s?\{?(?P<power>[-+]?[0-9]{1,3})\}?)?
    (?:\s?/\s?(?P<divisor>[0-9]{1,15}))?
    (?P<scale>[kKM]\b|\s?(?:hundred|dozens?|thousand|lakh|million|crore|billion|trillion)\b
      |[\u767e\u5343\u4e07\u842c\u4ebf\u5104\ub9cc\uc5b5])?
    (?P<percent>\s?(?:%|percent\b|per\ cent\b))?
    """,
    re.VERBOSE,
)
SCALES = {
    "k": 10**3, "K": 10**3, "M": 10**6, "lakh": 10**5, "crore": 10**7, "dozen": 12, "dozens": 12,
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
    "\u767e": 100, "\u5343": 1000, "\u4e07": 10**4, "\u842c": 10**4, "\ub9cc": 10**4,
    "\u4ebf": 10**8, "\u5104": 10**8, "\uc5b5": 10**8,
}  # fmt: skip
# If this is between two numbers, they are parts of one expression, range or list, and neither is the answer.
_JOINING = re.compile(
    r"\s*(?:[-+*^:/,;&x!~\u3001\u301c]|\\div|\u00f7|times|plus|minus|or|to|and|,\s*(?:and|or)|[\u548c\u6216\u81f3\u5230\u4e0e\u53ca]"
    r"|[hH]|[\u65f6\u6642\u70b9\u9ede\u5206]|\u00b0)?\s*[({]*\s*\Z",
    re.IGNORECASE,
)
DENYING_WORDS = re.compile(
    r"\b(?:not|never|neither|nor|cannot|unlikely|unknown|impossible|nicht|kein|pas|n\u00e3o|(?:wrong|incorrect)\s+answer)\b|\bno\s+(?:es|son)\b|\bnon\s+\u00e8\b"
    r"|n't\b|n\u2019t\b|\b(?:more|less|fewer|greater|bigger|smaller|other)\s+than\b|\bat\s+(?:least|most)\b"
    r"|\b(?:between|except|under|over|above|below)\b|\b(?:m\u00e1s|menos)\s+de\b|\b(?:plus|moins)\s+de\b"
    r"|\b(?:mehr|weniger)\s+als\b|\b(?:mindestens|h\u00f6chstens)\b|\u0644\u064a\u0633|\u0928\u0939\u0940\u0902|\u0e44\u0e21\u0e48"
    r"|\b(?:\u043d\u0435|\u0431\u043e\u043b\u0435\u0435|\u043c\u0435\u043d\u0435\u0435|\u0431\u043e\u043b\u044c\u0448\u0435|\u043c\u0435\u043d\u044c\u0448\u0435)\b"
    r"|\\neq?(?![a-zA-Z])|[\u4e0d\u975e\u6ca1\u672a]|[\u5927\u5c0f\u5c11\u591a]\u4e8e|\u8d85\u8fc7|\u81f3[\u5c11\u591a]|\u4ee5[\u4e0a\u4e0b]|\u4e4b\u95f4",
    re.IGNORECASE,
)
"""Words that deny or bound the value behind them: `not 72`, `more than 72`, `no es 72`."""
_BOUNDED = re.compile(
    r"\b(?:(?:half|third|quarter)\s+of|twice|double)\b|[<>\u2260\u00b1\u2264\u2265]|\\(?:pm|geq?|leq?)\b", re.IGNORECASE
)
# A second quantity after a first one with a unit: `5 hours 30 minutes`, `5h30`, `$7 and 50 cents`, `7 and a half`.
_MEASURE = (
    r"(?:h|hrs?|hours?|m|min|minutes?|s|sec|seconds?|days?|weeks?|months?|years?|ft|foot|feet|yards?|miles?|met(?:er|re)s?|km|cm"
    r"|lbs?|pounds?|oz|ounces?|kg|kilograms?|g|grams?|gallons?|quarts?|pints?|in|inch(?:es)?|dollars?|euros?|cents?|degrees?|['\"\u00b0])"
)
_FURTHER = re.compile(
    rf"\s*(?:{_MEASURE}(?![A-Za-z])\.?,?\s*)?(?:and\s+)?(?!0+\b)[0-9]+(?:\.[0-9]+)?\s*{_MEASURE}(?![A-Za-z])"
    r"|\s?[hH][0-9]{2}(?![0-9])|\s*(?:\w+\s+)?and\s+(?:a|one|two|three)[\s-](?:half|quarters?|thirds?)\b|\s*mod(?:ulo)?\b",
    re.IGNORECASE,
)
_COMMENT = re.compile(r"\s+\([^()0-9]*[0-9.,]+%?\s+[a-z]{2}")  # 72 (2 months)
DENIED_AFTER = re.compile(
    "\\A[^0-9\n]{0,12}(?:\uc544\ub2c8|\uc544\ub2d9|\u3067\u306f\u306a\u3044|\u3067\u306f\u3042\u308a\u307e\u305b\u3093|\u3058\u3083\u306a\u3044|\u0928\u0939\u0940\u0902)"
)
"""What denies the value before it, in languages that deny at the end."""
_FUNCTION = re.compile("(?:sqrt|log|ln|sin|cos|tan|exp|\u221a)\\s*[({]?\\s*\\Z", re.IGNORECASE)
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4} | {
    word + plural: below
    for below, word in enumerate(("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), start=3)
    for plural in ("", "s")
}
_WORDS = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * n for n, word in enumerate(_TENS, start=2)}


@dataclass(frozen=True)
class Number:
    """A number, and whether it was written as a percentage (then `value` is a hundredth of what is written)."""

    value: Fraction
    percent: bool = False


def has_digit(text: str) -> bool:
    """Whether the text has a digit of any script."""
    return any(c.isdigit() for c in text)


def plain_digits(text: str) -> str:
    """`text` with 0 to 9 for the digits of other scripts."""
    return _OTHER_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0], match[0])), text)


def clean(text: str) -> str:
    """Replace LaTeX, Markdown and Unicode spellings of numbers by plain ones."""
    text = _TEN_TO_THE.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]).replace("\u2212", "-"), text)
    text = _VULGAR.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])} ", plain_digits(text))
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return text


def stated_number(text: str, *, last: bool = False) -> Number | None:
    """The one number that a short text states, or None.

    If the text has an `=`, the part after the last one counts, provided it has a number. If there are several numbers
    with words between them, the first counts (`last`: the last). The result is None for a list (`1, 2`), a range
    (`70-72`), an open expression (`6 * 12`, `72^2`, `10:30`), for words that deny or bound (`not 72`, `more than 72`,
    `< 72`, `between`), and for a number that is more than `_MAX_DIGITS` long or follows a letter (`x72`).
    """
    text = clean(text)
    after = text.rpartition("=")[2]
    if _NUMBER.search(after):
        text = after
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return number_in_words(text)
    index = len(matches) - 1 if last else 0
    match = matches[index]
    near = _near(text, match)
    if DENYING_WORDS.search(near) or _BOUNDED.search(near) or DENIED_AFTER.search(text[match.end() :]):
        return None
    if _is_joined(text, matches, index):
        return None
    return _value(match)


def _near(text: str, match: re.Match[str]) -> str:
    """The text that may deny or bound a number: the words before it in its part of the sentence, and the sign after
    it."""
    return re.split(r"[,;.](?=\s)", text[: match.start()])[-1] + text[match.end() : match.end() + 2]


def _is_joined(text: str, matches: list[re.Match[str]], index: int) -> bool:
    match = matches[index]
    behind = text[match.end() :]
    if _FUNCTION.search(text[: match.start()][-20:]) or (match["sign"] and text[: match.start()].endswith("|")):
        return True
    if _FURTHER.match(behind):
        return True
    if index + 1 < len(matches) and _JOINING.match(text[match.end() : matches[index + 1].start()]):
        return _COMMENT.match(behind) is None
    if index > 0 and _JOINING.match(text[matches[index - 1].end() : match.start()]):
        return True
    return bool(
        re.match(
            r"[\u2080-\u2089]|\s*(?:\\(?:sqrt|pi|frac|log|ln|sin|cos|tan)(?![a-zA-Z])|[\u221a\u03c0])|\s*(?:\)?\s*[\^!*:]|\)?\s*/(?!\s?[a-z]{2})|[-+]\s*\d|\+|,\d|x\b|(?![ap]\.?\s?m\b)[a-cefijnopqruvwxyzBDEIMOPQRSUXYZ](?![A-Za-z])|\u2030|(?:st|nd|rd|th)\b|or\s+so\b|squared\b|cubed\b|of\s+\d)",
            behind,
        )
    )


def _value(match: re.Match[str]) -> Number | None:
    decimals = (match["decimals"] or "").replace(",", ".")
    digits = re.sub(r"[, ]", "", match["whole"] or "") or "0"
    exponent = int(match["exponent"] or match["power"] or 0)
    divisor = int(match["divisor"] or 1)
    if len(digits + decimals) > _MAX_DIGITS or abs(exponent) > _MAX_EXPONENT or divisor == 0:
        return None
    value = Fraction(digits + decimals) * Fraction(10) ** exponent / divisor
    if match["mixed"]:
        above, below = match["mixed"].split("/")
        if int(below) == 0 or decimals or divisor != 1:
            return None
        value += Fraction(int(above), int(below))
    if match["scale"]:
        value *= SCALES[match["scale"].strip()]
    value = (
        -value
        if (match["sign"] or "").strip() in ("-", "minus", "negative", "\u8d1f", "\u8ca0", "\u96f6\u4e0b")
        else value
    )
    return Number(value / 100 if match["percent"] else value, match["percent"] is not None)


def number_in_words(text: str) -> Number | None:
    """`seventy-two`, `minus five`, `six dozen`: a text that is only a number in words."""
    words = re.findall(r"[a-z]+", text.lower())
    negative = words[:1] in (["minus"], ["negative"])
    part = _part_in_words(words[1 if negative else 0 :])
    if part is not None:
        return Number(-part if negative else part)
    total = current = 0
    words = [word for word in words[1 if negative else 0 :] if word != "and"]
    for word in words:
        if word in _WORDS:
            current += _WORDS[word]
        elif word in ("hundred", "dozen"):
            current = max(1, current) * SCALES[word]
        elif word in SCALES and word != "k":
            total, current = total + max(1, current) * SCALES[word], 0
        else:
            return None
    return Number(Fraction(-(total + current) if negative else total + current)) if words else None


def _part_in_words(words: list[str]) -> Fraction | None:
    """`one half`, `two thirds`, `one and a half`; None for anything else."""
    if len(words) < 2 or words[-1] not in _PARTS or words[-2] not in ("a", *_UNITS[1:]):
        return None
    part = Fraction(_WORDS.get(words[-2], 1), _PARTS[words[-1]])
    if len(words) == 2:
        return part
    whole = number_in_words(" ".join(words[:-3])) if words[-3] == "and" else None
    return None if whole is None else whole.value + part
