r"""Units behind (or, for money, before) a value: `5\text{ cm}`, `5 cm`, `12 m^2`, `\$5.40`.

A unit is compared, not converted: an answer with another known unit than the truth's is wrong, also where the quantity
would be the same (`500 cm` for `5 m`). Words that are no known unit (`10 apples`) say nothing.
"""

from __future__ import annotations

import re

_SPELLINGS = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "m": "meter metre", "km": "kilometer kilometre",
    "um": "micrometer micron", "nm": "nanometer", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mi/h": "mph", "km/h": "kph kmph kmh", "m/s": "mps",
    "s": "sec second", "ms": "millisecond", "min": "minute", "h": "hr hour", "day": "", "week": "", "month": "",
    "year": "yr",
    "g": "gram gm", "kg": "kilogram kilo", "mg": "milligram", "t": "tonne ton", "lb": "pound", "oz": "ounce",
    "l": "liter litre", "ml": "milliliter millilitre", "gal": "gallon", "cup": "", "pint": "", "quart": "",
    "deg": "degree", "rad": "radian", "celsius": "", "fahrenheit": "", "kelvin": "", "acre": "", "hectare": "ha",
    "$": "dollar usd us$ buck", "cent": "", "eur": "euro", "gbp": "", "yen": "jpy", "yuan": "rmb cny",
    "rupee": "inr rs",
    "hz": "hertz", "khz": "kilohertz", "mhz": "megahertz", "n": "newton", "j": "joule", "kj": "kilojoule", "w": "watt",
    "kw": "kilowatt", "v": "volt", "a": "ampere amp", "ohm": "", "pa": "pascal", "mol": "mole", "cal": "calorie",
}  # fmt: skip
_NAMES = {word: unit for unit, others in _SPELLINGS.items() for word in (unit, *others.split())}
_MONEY = {"$": "$", "us$": "$", "\u20ac": "eur", "\u00a3": "gbp", "\u00a5": "yen", "\u20b9": "rupee"}
_PREFIX = re.compile(
    r"(-?)\s*((?:US|HK|NT|AU?|CA?|NZ|SG?|R|MX)?\\?\$|[\u20ac\u00a3\u00a5\u20b9\u20bd\u20a9\u20ab]"
    r"|(?:USD|EUR|GBP|CNY|RMB|JPY|INR|KRW|CHF|HKD|SGD|AUD|CAD|Rs|Rp)\.?)\s*(?=[-0-9.\\])"
)
_SUFFIX = re.compile(
    r"""
    (?P<value>.*?[0-9a-z})!.])
    (?: \s*\^\s*\{?\s*\\circ\s*\}?\s*(?:\\text\{\s*)?(?P<degree>[CF])?\}?
      | \s*(?P<text>\\text\{\s*[^{}]*?\s*\}(?:\s*(?:/|\\cdot)\s*\\text\{[^{}]*\})?)
      | \s+(?P<words>[A-Za-z][A-Za-z.]*(?:(?:\s*/\s*|\s+)[A-Za-z.]+)*)
      | (?<=[0-9])(?P<joined>[A-Za-z]{2,4}(?:/[a-z]{1,3})?)
      | \s*(?P<sign>[\u20ac\u00a3\u00a5\u20b9\u20bd\u20a9\u20ab]|\\?\$)
    )
    \s*(?:\^\s*\{?\s*(?P<power>-?[0-9])\s*\}?)?\s*\Z
    """,
    re.VERBOSE | re.DOTALL,
)


def without_unit(text: str) -> tuple[str, str]:
    """The value, and its unit: one spelling for each, or the empty text for none and for words that are no unit."""
    money = _PREFIX.match(text)
    if money:
        return text[: money.end(1)] + text[money.end() :], _money(money[2])
    match = _SUFFIX.fullmatch(text)
    if match is None or not re.search(r"[0-9]|\\pi|\\sqrt|\\frac|\\text\{", match["value"]):
        return text, ""
    value, power = match["value"].strip(), match["power"] or ""
    if match["sign"]:
        return value, _money(match["sign"])
    words = match["text"] or match["words"] or match["joined"]
    if words is None:
        return value, {"C": "celsius", "F": "fahrenheit"}.get(match["degree"] or "", "deg")
    unit = unit_of(words, power)
    if not unit and (match["joined"] or (match["words"] and re.search(r"\b[A-Za-z]\b", words))):
        return text, ""  # letters behind a number that are no unit: variables
    return value, unit


def unit_of(words: str, power: str = "") -> str:
    """The unit that words name, or the empty text: `square metres` is `m^2`, `miles per hour` is `mi/h`."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", words).replace("\\cdot", " ").strip().casefold().rstrip(".")
    plain = re.sub(r"\s*(?:\bper\b|/)\s*", "/", plain)
    plain, powers = re.subn(r"\^\s*\{?\s*2\s*\}?$|^(?:square|sq\.?)\s+|\s+squared$", "", plain)
    plain, cubes = re.subn(r"\^\s*\{?\s*3\s*\}?$|^(?:cubic|cu\.?)\s+|\s+cubed$", "", plain)
    power = power or ("2" if powers else "3" if cubes else "")
    if plain in ("%", "percent", "per cent", "pct"):
        return "%"
    parts = [_NAMES.get(part) or _NAMES.get(part.removesuffix("s")) for part in plain.split("/")]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return ""
    return "/".join(known) + (f"^{power}" if power not in ("", "1") else "")


def _money(sign: str) -> str:
    """The unit of a sign or code of a currency; the empty text for one that is not compared."""
    plain = sign.replace("\\", "").rstrip(".").casefold()
    return _MONEY.get(plain) or _NAMES.get(plain, "")
