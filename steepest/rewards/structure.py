r"""What an answer is made of: a list, a tuple, an interval, a set, a union, a matrix, a relation or one expression.

The structure is read from the text, so that only single expressions reach the parser. `equal` compares two answers part
by part; the order counts in tuples and matrices, not in lists and sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from steepest.rewards.cost import MAX_DEPTH
from steepest.rewards.evaluate import number_of, proportional, read, same_value

_MAX_PARTS = 30
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_DECIMAL = re.compile(r"-?\s*([0-9]*)\.([0-9]+)")
_RELATIONS = ("\\le", "\\ge", "\\ne", "<", ">", "=", "\\in", "\\approx")
_SYMBOL = re.compile(r"\s*(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\{?\w+\}?)?'?\s*")
_ANGLE = re.compile(r"\s*\\angle(?:\s*[A-Z0-9]){1,3}\s*")
_CALL = re.compile(r"\s*[a-zA-Z]\s*\([a-zA-Z, ]*\)\s*")
_SPLIT = re.compile(
    r"\\(?:cup|le|ge|ne|in|approx|pm|mp)(?![a-zA-Z])|\\[{}]|\\begin|\\end|[-+]?\\infty|\sor\s|[{}()\[\],;<>=]"
)


@dataclass(frozen=True)
class Leaf:
    """One expression; for infinities `text` says which."""

    text: str


@dataclass(frozen=True)
class Group:
    """Several parts. kind: list, set, union, matrix, or the two brackets of a tuple or interval, `[)`."""

    kind: str
    parts: tuple[Node, ...]
    columns: int = 0


@dataclass(frozen=True)
class Relation:
    """`parts` with `signs` between them: x < 3, y = 2x + 1 = 5."""

    parts: tuple[Node, ...]
    signs: tuple[str, ...]


Node = Leaf | Group | Relation


def structure_of(text: str, depth: int = 0) -> Node:
    """The structure of a text in the spelling of spelling.py."""
    text = text.strip()
    if depth > MAX_DEPTH:
        return Leaf(text)
    if "\\pm" in text or "\\mp" in text:
        return structure_of(_both_signs(text), depth + 1)
    for separators, kind in (((",", ";", "or"), "list"), (("\\cup",), "union")):
        parts = _split(text, separators)[0]
        if len(parts) > 1:
            return Group(kind, tuple(structure_of(part, depth + 1) for part in parts if part.strip()))
    parts, signs = _split(text, _RELATIONS)
    if len(parts) > 1:
        return _relation(parts, signs, depth)
    if text == "\\emptyset":
        return Group("set", ())
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        cells = [structure_of(cell, depth + 1) for row in rows for cell in row]
        return Group("matrix", tuple(cells), len(rows[0]) if rows else 0)
    return _bracketed(text, depth) or Leaf(text)


def _relation(parts: list[str], signs: list[str], depth: int) -> Node:
    nodes = tuple(structure_of(part, depth + 1) for part in parts)
    if not parts[0].strip() and signs[0] in ("=", "\\approx", "\\in"):  # `= 5`
        return nodes[1] if len(nodes) == 2 else Relation(nodes[1:], tuple(signs[1:]))
    if signs == ["\\in"]:
        return nodes[1]
    if signs[0] == "=" and _ANGLE.fullmatch(parts[0]):
        return nodes[1] if len(nodes) == 2 else Relation(nodes[1:], tuple(signs[1:]))
    return Relation(nodes, tuple("=" if sign == "\\approx" else sign for sign in signs))


def _bracketed(text: str, depth: int) -> Node | None:
    for opening, closing in (("\\{", "\\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if not (text.startswith(opening) and text.endswith(closing)) or len(text) < 2 * len(opening):
            continue
        inner = text[len(opening) : -len(closing)]
        if not _is_balanced(inner):
            continue
        parts = _split(inner, (",", ";"))[0]
        if opening == "\\{" or (opening == "{" and len(parts) > 1):
            return Group("set", tuple(structure_of(part, depth + 1) for part in parts if part.strip()))
        if len(parts) > 1:
            return Group(opening + closing, tuple(structure_of(part, depth + 1) for part in parts))
        return structure_of(inner, depth + 1) if opening + closing in ("()", "{}") else None
    return None


def _both_signs(text: str) -> str:
    """`1 \\pm 2` as the list of its two values."""
    before, _, after = text.partition("=")
    name, body = (f"{before}=", after) if after and "\\pm" not in before else ("", text)
    upper = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", body))
    lower = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", body))
    clean = [re.sub(r"^\s*\+", "", re.sub(r"([,(])\s*\+", r"\1", half)) for half in (upper, lower)]
    return f"{name}{clean[0]} , {name}{clean[1]}"


def _tokens(text: str) -> Iterator[tuple[int, int, str]]:
    """Places of separators outside of all brackets, and -1 as the start where brackets do not balance."""
    depth = 0
    for match in _SPLIT.finditer(text):
        word = match[0].strip()
        if word in ("{", "(", "[", "\\{", "\\begin"):
            depth += 1
        elif word in ("}", ")", "]", "\\}", "\\end"):
            depth -= 1
            if depth < 0:
                yield -1, -1, ""
        elif depth == 0:
            yield match.start(), match.end(), word
    if depth:
        yield -1, -1, ""


def _is_balanced(text: str) -> bool:
    return all(start >= 0 for start, _, _ in _tokens(text))


def _split(text: str, separators: tuple[str, ...]) -> tuple[list[str], list[str]]:
    places = list(_tokens(text))
    if any(start < 0 for start, _, _ in places):
        return [text], []
    parts, signs, start = [], [], 0
    for begin, end, word in places:
        if word in separators:
            parts.append(text[start:begin])
            signs.append(word)
            start = end
    return [*parts, text[start:]], signs


def equal(stated: Node, truth: Node) -> bool:
    """Whether two answers are the same. `truth` decides the form: `5` is met by `x = 5`, `x = 5` by `5`."""
    stated, truth = _unwrapped(stated, truth)
    if isinstance(truth, Relation) and isinstance(stated, Relation):
        return _same_relation(stated, truth)
    ranges = _ranges(stated), _ranges(truth)
    if None not in ranges and not (isinstance(stated, Leaf) or isinstance(truth, Leaf)):
        if _same_ranges(*ranges):  # type: ignore[arg-type]
            return True
        if "union" in (_kind(stated), _kind(truth)) or isinstance(stated, Relation) or isinstance(truth, Relation):
            return False
    if isinstance(stated, Group) and isinstance(truth, Group):
        return _same_group(stated, truth)
    if isinstance(stated, Leaf) and isinstance(truth, Leaf):
        return _same_leaf(stated, truth)
    group, leaf = (stated, truth) if isinstance(stated, Group) else (truth, stated)
    if isinstance(group, Group) and group.kind == "set" and len(group.parts) == 1 and isinstance(leaf, Leaf):
        return equal(group.parts[0], leaf)
    return False


def _kind(node: Node) -> str:
    return node.kind if isinstance(node, Group) else ""


def _unwrapped(stated: Node, truth: Node) -> tuple[Node, Node]:
    """Both without a name before them (`x = `) where the other has none. The ends of `a = b = c` count."""
    sides = [_ends(stated), _ends(truth)]
    if isinstance(sides[0], Relation) and not isinstance(sides[1], Relation):
        sides[0] = _value_of(sides[0], any_left=True)
    elif isinstance(sides[1], Relation) and not isinstance(sides[0], Relation):
        sides[1] = _value_of(sides[1], any_left=False)
    return sides[0], sides[1]


def _ends(node: Node) -> Node:
    if isinstance(node, Relation) and len(node.parts) > 2 and set(node.signs) == {"="}:
        return Relation((node.parts[0], node.parts[-1]), ("=",))
    return node


def _value_of(relation: Relation, *, any_left: bool) -> Node:
    """The right side of `x = 5`, `f(x) = ...`, and with `any_left` of `x + y = 18` and of `7/20 = 0.35`."""
    if relation.signs != ("=",):
        return relation
    left, right = relation.parts
    if _is_name(left):
        return right
    if _is_name(right):
        return left
    if not any_left or not isinstance(left, Leaf):
        return relation
    has_letters = re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", left.text) is not None
    return right if has_letters or equal(left, right) else relation


def _is_name(node: Node) -> bool:
    if isinstance(node, Group):
        return node.kind == "()" and all(_is_name(part) for part in node.parts)
    return isinstance(node, Leaf) and bool(
        (_SYMBOL.fullmatch(node.text) and node.text.strip() not in ("\\pi", "e", "i", "\\infty"))
        or _CALL.fullmatch(node.text)
    )


def _same_group(stated: Group, truth: Group) -> bool:
    if len(stated.parts) != len(truth.parts) or len(truth.parts) > _MAX_PARTS:
        return False
    kinds = {stated.kind, truth.kind}
    if "matrix" in kinds or "union" in kinds:
        return len(kinds) == 1 and stated.columns == truth.columns and _in_order(stated, truth)
    if kinds == {"set"} or kinds == {"list"} or kinds == {"set", "list"} or (truth.kind in ("set", "list")):
        return _in_any_order(stated, truth)
    if kinds & {"[)", "(]"} or kinds == {"()", "[]"}:
        return len(kinds) == 1 and _in_order(stated, truth)
    return stated.kind != "set" and _in_order(stated, truth)


def _in_order(stated: Group, truth: Group) -> bool:
    return all(map(equal, stated.parts, truth.parts))


def _in_any_order(stated: Group, truth: Group) -> bool:
    left = list(truth.parts)
    for part in stated.parts:
        found = next((other for other in left if equal(part, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _same_leaf(stated: Leaf, truth: Leaf) -> bool:
    one, other = (re.sub(r"(?<!\d)\s+|\s+(?!\d)|^\+", "", leaf.text) for leaf in (stated, truth))
    if one == other:
        return True
    infinities = ("\\infty", "-\\infty")
    if one in infinities or other in infinities:
        return False
    a, b = expression(stated), expression(truth)
    if a is None or b is None:
        return False
    return same_value(a, b) or _rounded(stated, b) or _rounded(truth, a)


def expression(leaf: Leaf) -> Any:
    """The sympy expression of a leaf; its decimals are exact fractions."""
    text = re.sub(r"(?<![0-9])([0-9]*)\.([0-9]+)", lambda m: _fraction(m[1], m[2]), leaf.text)
    text = re.sub(r"(?<![a-zA-Z\\])([a-eij-oq-z])\(", r"\1\\cdot(", text)  # a(b + c) is no function, f(x) is one
    return read(text)


def _fraction(whole: str, decimals: str) -> str:
    return f"\\frac{{{(whole + decimals).lstrip('0') or '0'}}}{{1{'0' * len(decimals)}}}"


def _rounded(decimal: Leaf, other: Any) -> bool:
    """True for a decimal with six significant digits or more that is `other` rounded, where `other` is no decimal
    itself: 0.333333 is 1/3, and 0.3333 is not."""
    match = _DECIMAL.fullmatch(decimal.text.strip())
    if match is None or len((match[1] + match[2]).lstrip("0")) < 6:
        return False
    value = number_of(other)
    if value is None or value.imag != 0 or _terminates(other):
        return False
    stated = Fraction(decimal.text.replace(" ", ""))
    places = 10 ** len(match[2])
    return abs(stated * places - Fraction(*_ratio(value * places))) <= Fraction(1, 2)


def _ratio(value: Any) -> tuple[int, int]:
    import mpmath

    with mpmath.workprec(512):
        return int(mpmath.nint(mpmath.re(value) * 2**64)), 2**64


def _terminates(expr: Any) -> bool:
    if not expr.is_Rational:
        return False
    below = int(expr.q)
    for prime in (2, 5):
        for _ in range(400):
            if below % prime:
                break
            below //= prime
    return below == 1


def _same_relation(stated: Relation, truth: Relation) -> bool:
    ranges = _ranges(stated), _ranges(truth)
    if None not in ranges and len({_letter(stated), _letter(truth)} - {""}) < 2:
        return _same_ranges(*ranges)  # type: ignore[arg-type]
    if len(stated.parts) != 2 or len(truth.parts) != 2:
        alike = stated.signs == truth.signs and len(stated.parts) == len(truth.parts)
        return alike and all(map(equal, stated.parts, truth.parts))
    named = _is_name(stated.parts[0]) and _is_name(truth.parts[0]) and stated.signs == truth.signs == ("=",)
    if named and all(map(equal, stated.parts, truth.parts)):
        return True
    one, other = _difference(stated), _difference(truth)
    if one is None or other is None:
        return False
    sign = proportional(one, other)
    if sign is None:
        return False
    flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
    return stated.signs[0] == (truth.signs[0] if sign > 0 else flipped.get(truth.signs[0], truth.signs[0]))


def _difference(relation: Relation) -> Any:
    left, right = relation.parts
    if not (isinstance(left, Leaf) and isinstance(right, Leaf)):
        return None
    a, b = expression(left), expression(right)
    if a is None or b is None:
        return None
    from sympy import Add, Mul

    return Add(a, Mul(-1, b, evaluate=False), evaluate=False)


def _letter(node: Node) -> str:
    names = [part.text.strip() for part in getattr(node, "parts", ()) if _is_name(part)]
    return names[0] if names else ""


Range = tuple[Leaf, bool, Leaf, bool]


def _ranges(node: Node) -> list[Range] | None:
    """The intervals of an interval, of a union or list of them, or of an inequality in one letter: (low, closed, high,
    closed); None for anything else."""
    if isinstance(node, Group) and (node.kind == "union" or (node.kind == "list" and node.parts)):
        parts = [_ranges(part) for part in node.parts]
        return None if None in parts else [one for part in parts for one in part or []]
    if isinstance(node, Group) and node.kind in ("()", "(]", "[)", "[]") and len(node.parts) == 2:
        low, high = node.parts
        if isinstance(low, Leaf) and isinstance(high, Leaf):
            return [(low, node.kind[0] == "[", high, node.kind[1] == "]")]
        return None
    return _range_of_inequality(node) if isinstance(node, Relation) else None


def _range_of_inequality(relation: Relation) -> list[Range] | None:
    parts, signs = list(relation.parts), list(relation.signs)
    if signs and signs[0] in (">", "\\ge"):
        turn = {">": "<", "\\ge": "\\le"}
        if any(sign not in turn for sign in signs):
            return None
        parts, signs = parts[::-1], [turn[sign] for sign in reversed(signs)]
    if any(sign not in ("<", "\\le") for sign in signs) or not all(isinstance(part, Leaf) for part in parts):
        return None
    leaves = [part for part in parts if isinstance(part, Leaf)]
    closed = [sign == "\\le" for sign in signs]
    if len(leaves) == 2 and _may_be_bounded(leaves[0]) and not _is_name(leaves[1]):
        return [(Leaf("-\\infty"), False, leaves[1], closed[0])]
    if len(leaves) == 2 and _may_be_bounded(leaves[1]) and not _is_name(leaves[0]):
        return [(leaves[0], closed[0], Leaf("\\infty"), False)]
    if len(leaves) == 3 and _is_name(leaves[1]):
        return [(leaves[0], closed[0], leaves[2], closed[1])]
    return None


def _may_be_bounded(leaf: Leaf) -> bool:
    """A name, or nothing: the name of `>= 5` is left out."""
    return not leaf.text.strip() or _is_name(leaf)


def _same_ranges(stated: list[Range], truth: list[Range]) -> bool:
    if len(stated) != len(truth) or len(truth) > _MAX_PARTS:
        return False
    left = list(truth)
    for low, low_closed, high, high_closed in stated:
        found = next(
            (
                other
                for other in left
                if (other[1], other[3]) == (low_closed, high_closed)
                and _same_leaf(low, other[0])
                and _same_leaf(high, other[2])
            ),
            None,
        )
        if found is None:
            return False
        left.remove(found)
    return True
