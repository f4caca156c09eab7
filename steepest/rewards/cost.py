r"""What an expression would cost to read and to evaluate, counted from its text before either is done.

Reading costs more than in proportion to the depth of brackets, and evaluating costs the size of the numbers: `10^{99}!`
has 17 signs and more digits than atoms exist. `is_affordable` counts signs, depth and an upper bound for the length of
every number in bits, with integers and floats only. What it refuses is compared as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

MAX_CHARS = 300
MAX_DEPTH = 10
MAX_TOKENS = 200
MAX_DIGITS = 100
"""of one number"""
MAX_BITS = 8192
"""length of the largest number that may come up, 2,400 digits"""

# What the reader would evaluate while it reads, or what has no bound that the text shows.
_UNBOUNDED = re.compile(
    r"\\(?:sum|prod|i*int|oint|lim|limsup|liminf|operatorname|Gamma|det|xrightarrow|partial)(?![a-zA-Z])"
    r"|\|\s*_|\|\s*\^\s*\{[^{}]*=|[vV]matrix|[0-9.][eE][-+]?[0-9]{4}"
)
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[a-zA-Z]+|\\.|\S", re.DOTALL)
_OPEN, _CLOSE = frozenset("{([") | {"\\{"}, frozenset("})]") | {"\\}"}
_GROWING = frozenset(("\\exp", "\\sinh", "\\cosh", "\\tanh", "\\sech", "\\csch", "\\coth"))
_NOTHING = frozenset(("+", "-", "*", "/", ",", ";", "=", "<", ">", "\\cdot", "\\times", "\\frac", "\\left", "\\right"))
_SYMBOL_BITS = 2.0


def is_affordable(text: str) -> bool:
    """Whether the expression may be read and evaluated."""
    if len(text) > MAX_CHARS or _UNBOUNDED.search(text):
        return False
    tokens = _TOKEN.findall(text)
    return len(tokens) <= MAX_TOKENS and depth(tokens) <= MAX_DEPTH and size(text) <= MAX_BITS


def depth(tokens: list[str]) -> int:
    """How deep brackets are nested."""
    deepest = now = 0
    for token in tokens:
        now += (token in _OPEN) - (token in _CLOSE)
        deepest = max(deepest, now)
    return deepest


def size(text: str) -> float:
    """An upper bound for the bits of every number that comes up when the expression is evaluated; infinite if it is not
    small. Sums and quotients are counted as products, and variables as numbers below 4."""
    tokens = iter(_TOKEN.findall(text))
    total = 0.0
    for _ in range(MAX_CHARS):  # a bracket that closes more than was opened does not end the text
        part, ended = _sequence(tokens, 0)
        total += part
        if ended:
            break
    return total


def _sequence(tokens: Iterator[str], depth: int) -> tuple[float, bool]:
    """The bits of what stands up to the closing bracket, and whether the text has ended."""
    sizes: list[float] = []
    pending = ""  # what the next size is to be combined with: ^ or a function that grows
    for token in tokens:
        if token in _CLOSE:
            return sum(sizes), False
        if token == "!":
            sizes.append(_factorial(sizes.pop() if sizes else 0.0))
            continue
        if token in ("^", "**") or token in _GROWING or token in ("\\binom", "\\dbinom", "\\tbinom", "_"):
            pending = token
            continue
        if token in _NOTHING:
            continue
        bits = _sequence(tokens, depth + 1)[0] if token in _OPEN and depth <= 2 * MAX_DEPTH else _atom(token)
        if pending == "^" and sizes:
            bits = _power(sizes.pop(), bits)
        elif pending in _GROWING:
            bits = _power(_SYMBOL_BITS, bits)
        elif pending == "_" and sizes:  # (n)_{k} is read as permutations
            bits = max(bits, _factorial(sizes.pop())) if token in _OPEN else bits + sizes.pop()
        elif pending:
            bits = _factorial(bits)
        sizes.append(bits)
        pending = ""
    return sum(sizes), True


def _atom(token: str) -> float:
    if token[-1] not in "0123456789":  # isdigit() is true of superscripts too
        return _SYMBOL_BITS
    digits = token.replace(".", "")
    if len(digits) > MAX_DIGITS:
        return math.inf
    return max(1.0, math.log2(max(1, int(digits))))


def _power(base: float, exponent: float) -> float:
    """Bits of a power whose exponent has `exponent` bits: the base's, as many times as the exponent says."""
    return base * 2.0**exponent if exponent < 64 else math.inf


def _factorial(bits: float) -> float:
    """Bits of n!, at most n log2(n)."""
    return max(1.0, bits) * 2.0**bits if bits < 64 else math.inf
