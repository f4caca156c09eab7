"""Values of expressions, with a bound for each operation that is checked before it is done.

An expression is read by the parser of math-verify, which leaves powers and factorials as they are written, and is
evaluated here with mpmath. Two expressions are equal when they agree to about 1,800 digits; those with variables must
agree at each of a few fixed points where both have a value. Simplification by
computer algebra is not used: nothing bounds it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from steepest.rewards.cost import MAX_BITS, is_affordable

_MAX_NODES = 400
_MAGNITUDE = 4000  # bits before the point, and after it until the first digit
_ROUGH, _FINE = 256, 2 * _MAGNITUDE  # bits of the two evaluations: the first separates nearly all unequal ones
_NUM_POINTS = 4


class NoValue(Exception):
    """An expression has no value, or one beyond the bounds."""


@lru_cache(maxsize=4096)
def read(latex: str) -> Any:
    """The sympy expression of a text in LaTeX, unevaluated; None if it is none or too expensive."""
    if not is_affordable(latex):
        return None
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from sympy import Expr

    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        found = latex2sympy(latex, normalization_config=rules)
    except Exception:  # the parser raises Exception itself for what is no expression, and others for malformed ones
        return None
    return found if isinstance(found, Expr) else None


def same_value(one: Any, other: Any) -> bool:
    """Whether two sympy expressions are equal."""
    if one == other:
        return True
    names = sorted(_names(one) | _names(other))
    agreed = False
    for number in range(_NUM_POINTS if names else 1):
        point = {name: _sample(name, number) for name in names}
        try:
            if not all(_agree(one, other, point, bits) for bits in (_ROUGH, _FINE)):
                return False
            agreed = True
        except NoValue:
            if not names:
                return False
    return agreed


def proportional(one: Any, other: Any) -> float | None:
    """The sign of `one / other` where that is the same number at every point, else None: x - 3 and 6 - 2x give -1."""
    import mpmath

    names = sorted(_names(one) | _names(other))
    ratios = []
    for number in range(_NUM_POINTS):
        point = {name: _sample(name, number) for name in names}
        try:
            with mpmath.workprec(_ROUGH):
                a, b = (_value(expr, point) for expr in (one, other))
                if a != 0 and b != 0:
                    ratios.append(a / b)
        except NoValue:
            continue
    if len(ratios) < min(2, _NUM_POINTS) or not all(_close(r, ratios[0], _ROUGH) for r in ratios):
        return None
    return 1.0 if mpmath.re(ratios[0]) > 0 else -1.0


def number_of(expr: Any) -> Any:
    """The value of an expression without variables as an mpmath number, else None."""
    import mpmath

    if _names(expr):
        return None
    try:
        with mpmath.workprec(_ROUGH):
            return _value(expr, {})
    except NoValue:
        return None


def _agree(one: Any, other: Any, point: dict[str, Any], bits: int) -> bool:
    import mpmath

    with mpmath.workprec(bits):
        return _close(_value(one, point), _value(other, point), bits)


def _close(a: Any, b: Any, bits: int) -> bool:
    import mpmath

    with mpmath.workprec(bits):
        scale = max(mpmath.mpf(1), abs(a), abs(b))
        return bool(abs(a - b) <= scale * mpmath.ldexp(1, -bits * 3 // 4))


def _names(expr: Any) -> set[str]:
    found: set[str] = set()
    waiting = [expr]
    for _ in range(_MAX_NODES):
        if not waiting:
            return found
        node = waiting.pop()
        if node.is_Symbol or _is_opaque(node):
            found |= set() if str(node) in ("i", "\\pi", "pi") else {str(node)}
        else:
            waiting += node.args
    return found


def _is_opaque(node: Any) -> bool:
    """True for a function without a definition, `f(x)`: it counts as a variable of that name."""
    from sympy.core.function import AppliedUndef

    return isinstance(node, AppliedUndef)


def _sample(name: str, number: int) -> Any:
    """The value of a variable at a point: fixed, from 0.4 to 3.4, without a pattern, at some points negative."""
    share = zlib.crc32(f"{number} {name}".encode()) / 2**32
    negative = number == 1 or (number == 3 and zlib.crc32(name.encode()) % 2)
    return -(0.4 + 3 * share) if negative else 0.4 + 3 * share


def _value(expr: Any, point: dict[str, Any]) -> Any:
    """The value at a point, as an mpmath number. Raises NoValue."""
    try:
        return _Walk(point).value(expr)
    except (ArithmeticError, ValueError, TypeError, AttributeError) as error:  # no value: a pole, an unknown function
        raise NoValue from error


class _Walk:
    """Evaluates one expression; counts its nodes."""

    def __init__(self, point: dict[str, Any]) -> None:
        self.point, self.left = point, _MAX_NODES

    def value(self, expr: Any) -> Any:
        import mpmath

        self.left -= 1
        if self.left < 0:
            raise NoValue
        kind = type(expr).__name__
        if expr.is_Rational:
            found = mpmath.mpf(int(expr.p)) / int(expr.q)
        elif expr.is_Symbol or _is_opaque(expr):
            name = str(expr)
            found = mpmath.mpc(0, 1) if name == "i" else mpmath.mpmathify(self.point[name])
        elif kind in _CONSTANTS:
            found = _CONSTANTS[kind](mpmath)
        elif kind in ("Add", "Mul", "Pow") or kind in _FUNCTIONS:
            found = self._combine(kind, [self.value(part) for part in expr.args])
        elif kind in ("UnevaluatedExpr", "Float"):
            found = self.value(expr.args[0]) if kind == "UnevaluatedExpr" else mpmath.mpmathify(expr)
        else:
            raise NoValue
        return _bounded(found)

    def _combine(self, kind: str, parts: list[Any]) -> Any:
        import mpmath

        if kind == "Add":
            return mpmath.fsum(parts)
        if kind == "Mul":
            return mpmath.fprod(parts)
        return _power(*parts) if kind == "Pow" else _FUNCTIONS[kind](mpmath, *parts)


def _bounded(value: Any) -> Any:
    import mpmath

    if not mpmath.isfinite(value) or (value != 0 and abs(mpmath.mag(value)) > _MAGNITUDE):
        raise NoValue
    return value


def _power(base: Any, exponent: Any) -> Any:
    """A power whose size is checked first. An odd root of a negative number is real: the cube root of -8 is -2."""
    import mpmath

    if base == 0:
        if mpmath.re(exponent) <= 0:
            raise NoValue
        return mpmath.mpf(0)
    if abs(exponent) * (abs(mpmath.mag(base)) + 2) > MAX_BITS:
        raise NoValue
    if mpmath.im(base) == 0 and mpmath.re(base) < 0 and mpmath.im(exponent) == 0:
        odd = next((q for q in (3, 5, 7, 9) if _is_whole(exponent * q)), None)
        if odd is not None and not _is_whole(exponent):
            sign = -1 if int(mpmath.nint(exponent * odd)) % 2 else 1
            return sign * mpmath.power(-base, exponent)
    return mpmath.power(base, exponent)


def _is_whole(value: Any) -> bool:
    import mpmath

    return bool(abs(value - mpmath.nint(value)) < mpmath.ldexp(1, -mpmath.mp.prec // 2))


def _small(mp: Any, value: Any, limit: int) -> Any:
    """`value`, which an exponential or a factorial may take. Raises NoValue for a larger one."""
    if abs(value) > limit:
        raise NoValue
    return value


def _factorial(mp: Any, n: Any) -> Any:
    if not _is_whole(n) or n < 0:
        raise NoValue
    return mp.factorial(_small(mp, n, 500))


def _binomial(mp: Any, n: Any, k: Any) -> Any:
    return mp.binomial(_small(mp, n, 1000), _small(mp, k, 1000))


def _logarithm(mp: Any, value: Any, base: Any = None) -> Any:
    if value == 0 or base == 1 or base == 0:
        raise NoValue
    return mp.log(value) if base is None else mp.log(value) / mp.log(base)


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "Pi": lambda mp: +mp.pi, "Exp1": lambda mp: +mp.e, "ImaginaryUnit": lambda mp: mp.mpc(0, 1),
    "GoldenRatio": lambda mp: +mp.phi,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: (lambda mp, x, name=name: getattr(mp, name)(x))
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc",
                     "asinh", "acosh", "atanh", "conjugate")
    },
    **{
        name: (lambda mp, x, name=name: getattr(mp, name)(_small(mp, x, _MAGNITUDE)))
        for name in ("sinh", "cosh", "tanh", "coth", "sech", "csch", "exp")
    },
    "log": _logarithm, "Abs": lambda mp, x: abs(x), "factorial": _factorial, "binomial": _binomial,
    "floor": lambda mp, x: mp.floor(x), "ceiling": lambda mp, x: mp.ceil(x),
    "re": lambda mp, x: mp.re(x), "im": lambda mp, x: mp.im(x),
    "Max": lambda mp, *x: max(x), "Min": lambda mp, *x: min(x),
}  # fmt: skip
