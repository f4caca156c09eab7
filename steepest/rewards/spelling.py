r"""One spelling of mathematics: Unicode, plain text and the variants of LaTeX, all as plain LaTeX.

`½`, `\dfrac12` and `{1 \over 2}` become `\frac{1}{2}`; `2*pi`, `2π` and `2\cdot\pi` are one text after it. Nothing is
evaluated here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from steepest.rewards.numbers import plain_digits

_SIGNS = str.maketrans(
    {
        "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\u2014": "-", "\ufe63": "-",
        "\u00d7": "\\times ", "\u2a2f": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ", "\u2219": "\\cdot ",
        "\u2022": "\\cdot ", "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u2236": ":", "\u221a": "\\sqrt ",
        "\u221b": "\\sqrt[3] ", "\u221c": "\\sqrt[4] ", "\u221e": "\\infty ", "\u2264": "\\le ", "\u2a7d": "\\le ",
        "\u2265": "\\ge ", "\u2a7e": "\\ge ", "\u2260": "\\ne ", "\u00b1": "\\pm ", "\u2213": "\\mp ",
        "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2205": "\\emptyset ", "\u2208": "\\in ", "\u00b0": "^\\circ ",
        "\u27e8": "(", "\u27e9": ")", "\u2329": "(", "\u232a": ")", "\u3008": "(", "\u3009": ")", "\u3001": ",",
        "\u2248": "\\approx ", "\u2243": "\\approx ", "\u2245": "\\approx ", "\u2026": "...", "\u2019": "'",
        "\u2032": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ", "\u200b": "", "\u2061": "",
        "\u2062": "", "\u3002": ".", "\u2228": " or ", "\u2192": " \\to ", "\u00b5": "\\mu ",
    }
)  # fmt: skip
_SUPER = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207d\u207e\u207f\u2071"
_SUB = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089\u208a\u208b"
_PLAIN_SUPER, _PLAIN_SUB = "0123456789+-()ni", "0123456789+-"
_GREEK = re.compile("[\u0391-\u03a9\u03b1-\u03c9\u03d5\u03f5\u03d1]")
_COMPATIBLE = re.compile("[\uff01-\uff5e\uffe0-\uffe6\U0001d400-\U0001d7ff\u2100-\u214f\ufb00-\ufb06]")

_STYLES = r"text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|mbox|boldsymbol|bm|pmb|bf|rm|it|underline|emph"
_STYLED = re.compile(rf"\\(?:{_STYLES})\s*\{{\s*([^{{}}]*?)\s*\}}")
_NUMBER_IN_STYLE = re.compile(r"\\text\{([-+\d.,\s()/$%\\^]*\d[-+\d.,\s()/$%\\^]*|\d[\d.,]*\s[^{}]*)\}")
_LAYOUT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\(?:textcolor|color)\s*\{[a-zA-Z]*\}\s*(\{[^{}]*\})"), r"\1"),
    (re.compile(r"\{\s*\\(?:bf|rm|it|bfseries)\s+([^{}]*)\}"), r"{\1}"),
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?|\\(?:display|text|script)style|\\limits"), ""),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (
        re.compile(r"\{?\s*\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|tt|sf|sc)(?![a-zA-Z])\s*([^{}]*)\}?"),
        r"\1",
    ),
    (re.compile(r"(?:[,;]|\\\\)\s*\Z"), ""),
    (re.compile(r"(?<![\d.])(\d+\.\d*)\((\d{1,9})\)(?=\s*\Z)"), r"\1\\overline{\2}"),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\[dt]binom"), r"\\binom"),
    (re.compile(r"\{\s*,\s*\}"), ","),
    (re.compile(r"\{\s*([^{}]+?)\s*\\over\s*([^{}]+?)\s*\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\^\{?(\d+)\}?\s*/\s*_\{?(\d+)\}?"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\le(?:q|qslant)(?![a-zA-Z])|<=|=<"), r"\\le "),
    (re.compile(r"\\ge(?:q|qslant)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|not\s*=)(?![a-zA-Z])|!="), r"\\ne "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}|^\{\s*\}$"), r"\\emptyset "),
    (re.compile(r"\\surd(?![a-zA-Z])"), r"\\sqrt"),
    (re.compile(r"\\degree(?![a-zA-Z])|\\text\{\s*\u00b0\s*\}"), r"^\\circ "),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"\\(?:ldots|dots|cdots)(?![a-zA-Z])"), "..."),
    (re.compile(r"\\text\{\s*(or|and)\s*\}|\s(or|and)\s"), r" or "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
)
_NAMES = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|infty"
_WORD = r"(?<![a-zA-Z\\])(?:{})(?![a-zA-Z])"
_PLAIN_TEXT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<![a-zA-Z\\])sqrt(?![a-zA-Z])"), r"\\sqrt "),
    (re.compile(_WORD.format("cbrt")), r"\\sqrt[3] "),
    (re.compile(_WORD.format("[pP]i")), r"\\pi "),
    (re.compile(_WORD.format("infinity|oo|Infinity|inf")), r"\\infty "),
    (re.compile(_WORD.format(f"({_NAMES})")), r"\\\1 "),
    (re.compile(_WORD.format("(alpha|beta|gamma|theta|phi|lambda|mu|sigma|omega)")), r"\\\1 "),
    (re.compile(r"\bU\b(?=\s*[(\[])"), r"\\cup "),
    (re.compile(r"(?<=[0-9)])\s*[eE]([-+]?[0-9]{1,3})(?![0-9a-zA-Z])"), r"\\cdot 10^{\1}"),
    (re.compile(r"(?<=[0-9)])\s*[xX]\s*(?=10\s*\^)"), r"\\cdot "),
    (re.compile(r"(?<=[0-9])\s+[xX]\s+(?=[0-9])"), r"\\cdot "),
    (re.compile(r"\*"), r"\\cdot "),
    (re.compile(r"\^\s*(-?[0-9]+(?:\.[0-9]+)?)"), r"^{\1}"),
    (re.compile(r"\^\s*-\s*([a-zA-Z])"), r"^{-\1}"),
    (re.compile(r"(?<![0-9.,/^{])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9/.])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"\\sqrt\s*\[([^\]]*)\]\s*([0-9]+|[a-zA-Z])"), r"\\sqrt[\1]{\2}"),
    (re.compile(r"\\sqrt\s*([0-9]+(?:\.[0-9]+)?|[a-zA-Z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*(\\[a-zA-Z]+)\s*([0-9a-zA-Z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9a-zA-Z])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9a-zA-Z])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*(\{[^{}]*\})\s*([0-9a-zA-Z])"), r"\\frac\1{\2}"),
)
_ROOT_OPEN, _POWER_OPEN = re.compile(r"\\sqrt\s*(?:\[[^\]]*\])?\s*\("), re.compile(r"\^\s*\(")
# `12 345`, `12,345` and `12'345` are one number where no bracket or further comma makes them several.
_GROUPED = re.compile(
    r"(?<![\d.,^_{(\[])(\d{1,3})((?:[ ']\d{3})+|(?:,\d{3})+)(?![\d(]|,\d|\s*\d*\s*/|\s*\\frac)(?=[^)\]]*\Z)"
)
_EUROPEAN = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d+)(?![\d,.])")
_REPEATING = re.compile(r"(\d+)\.(\d*)\\(?:overline|bar|dot|overbar)\s*\{?\s*(\d+)\s*\}?(?!\d)")
_DOTTED = re.compile(r"(\d+)\.(\d*?)(\d{1,6}?)\3{1,30}\.{3}")


def latex_of(text: str) -> str:
    """The text in one spelling, as LaTeX."""
    text = _from_unicode(text)
    text = _STYLED.sub(lambda match: f"\\text{{{match[1]}}}", _STYLED.sub(lambda m: f"\\text{{{m[1]}}}", text))
    for pattern, replacement in _LAYOUT:
        text = pattern.sub(replacement, text)
    text = _NUMBER_IN_STYLE.sub(r"\1", text)
    text = _outside_text(text, _plain_text)
    text = _EUROPEAN.sub(lambda match: match[1].replace(".", "") + "." + match[2], text)
    text = _GROUPED.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    text = _DOTTED.sub(lambda m: _repeating(m[1], m[2], m[3]) if _repeats(m) else m[0], text)
    return _REPEATING.sub(lambda m: _repeating(m[1], m[2], m[3]), text).strip()


def _from_unicode(text: str) -> str:
    if text.isascii():
        return text
    text = plain_digits(text)
    text = _COMPATIBLE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u00bc-\u00be\u2150-\u215e]", _vulgar, text)
    text = re.sub(f"[{_SUPER}]+", lambda m: "^{" + m[0].translate(str.maketrans(_SUPER, _PLAIN_SUPER)) + "}", text)
    text = re.sub(f"[{_SUB}]+", lambda m: "_{" + m[0].translate(str.maketrans(_SUB, _PLAIN_SUB)) + "}", text)
    return _GREEK.sub(_greek, text.translate(_SIGNS))


def _vulgar(match: re.Match[str]) -> str:
    above, _, below = unicodedata.normalize("NFKC", match[0]).partition("\u2044")
    return f"\\frac{{{above}}}{{{below}}}"


def _greek(match: re.Match[str]) -> str:
    name = unicodedata.name(unicodedata.normalize("NFKC", match[0])).rsplit(" ", 1)[-1]
    name = {"LAMDA": "LAMBDA"}.get(name, name)
    return f"\\{name.lower() if match[0].islower() else name.title()} "


def _plain_text(text: str) -> str:
    for pattern, replacement in _PLAIN_TEXT:
        text = pattern.sub(replacement, text)
    return _braced(_braced(text, _ROOT_OPEN), _POWER_OPEN)


def _outside_text(text: str, change: Callable[[str], str]) -> str:
    r"""`change` on all but the `\text{...}` of the text."""
    parts = re.split(r"(\\text\s*\{[^{}]*\})", text)
    return "".join(part if part.startswith("\\text") else change(part) for part in parts)


def _braced(text: str, command: re.Pattern[str]) -> str:
    r"""`\sqrt(x)` and `2^(x)` with braces for the parentheses."""
    place = 0
    while found := command.search(text, place):
        place, depth = found.end(), 0
        for end in range(place - 1, len(text)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0:
                text = f"{text[: place - 1]}{{{text[place:end]}}}{text[end + 1 :]}"
                break
    return text


def _repeats(match: re.Match[str]) -> bool:
    return len(match[0]) >= len(match[1]) + 1 + len(match[2]) + 3 + (3 if len(match[3]) == 1 else 2 * len(match[3]))


def _repeating(whole: str, head: str, cycle: str) -> str:
    """A repeating decimal as a fraction: 0.1(6) = (16 - 1) / 90."""
    nines = int("9" * len(cycle) + "0" * len(head))
    above = int(whole + head + cycle) - int(whole + head)
    return f"\\frac{{{above}}}{{{nines}}}"
