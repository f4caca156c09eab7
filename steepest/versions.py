"""Versions of installed packages, read from their metadata: nothing is imported, so a broken package cannot fail."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata

UNKNOWN = "unknown"
"""The version of a package whose metadata names none."""

_CLAUSE = re.compile(r"(===?|~=|!=|<=|>=|<|>)\s*([^,\s;()]+)")


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed; None when none of them is."""
    for name in names:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        except Exception:  # metadata that cannot be read: the package is there all the same
            return UNKNOWN
        return found or UNKNOWN
    return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a release: "2.10.0.post4+cpu" -> (2, 10, 0); empty when it does not start with a number."""
    match = re.match(r"\d+(?:\.\d+)*", version.strip().lstrip("v"))
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def public(version: str) -> str:
    """A version without what the builder added: "2.13.0+cpu" -> "2.13.0"."""
    return version.partition("+")[0]


def build(version: str) -> str | None:
    """What the builder added, where it names a kind of build: "2.13.0+cpu" -> "cpu"; None for a hash of git's."""
    tag = version.partition("+")[2]
    return tag if re.fullmatch(r"cpu|[a-z]+\d[\d.]*", tag) else None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ">=2.10,<2.14". Compares release numbers; post-releases count as their
    release. A version without numbers (`UNKNOWN`) satisfies everything.
    """
    return not release(version) or all(_holds(version, sign, limit) for sign, limit in _CLAUSE.findall(wanted))


def _holds(version: str, sign: str, limit: str) -> bool:
    if limit.endswith(".*"):
        prefix = release(limit[:-2])
        same = _padded(release(version), len(prefix))[: len(prefix)] == prefix
        return same if sign == "==" else not same
    size = max(len(release(version)), len(release(limit)))
    have, want = _padded(release(version), size), _padded(release(limit), size)
    if sign == "~=":
        return have >= want and have[: len(release(limit)) - 1] == want[: len(release(limit)) - 1]
    return {
        "==": have == want,
        "===": version == limit,
        "!=": have != want,
        "<=": have <= want,
        ">=": have >= want,
        "<": have < want,
        ">": have > want,
    }[sign]


def _padded(numbers: tuple[int, ...], size: int) -> tuple[int, ...]:
    return numbers + (0,) * (size - len(numbers))


def requirement(package: str, on: str) -> str | None:
    """What an installed package asks of another on this machine, as "==2.13.0"; None where it asks nothing."""
    try:
        lines = metadata.requires(package) or []
    except Exception:  # not installed, or its metadata cannot be read
        return None
    return _find(lines, on)


def _find(lines: Iterable[str], on: str) -> str | None:
    for line in lines:
        match = re.match(r"[A-Za-z0-9._-]+", line)
        wanted, _, condition = line.partition(";")
        if match and _plain(match[0]) == _plain(on) and _applies(condition.strip()):
            return ",".join(sign + limit for sign, limit in _CLAUSE.findall(wanted[match.end() :])) or None
    return None


def _applies(condition: str) -> bool:
    """Whether this machine meets the condition of a requirement; an extra is never asked for."""
    if not condition:
        return True
    try:  # transformers brings it; without it nothing can be said
        from packaging.markers import InvalidMarker, Marker
    except ImportError:
        return False
    try:
        return Marker(condition).evaluate({"extra": ""})
    except InvalidMarker:
        return False


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
