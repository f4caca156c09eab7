"""Versions of installed packages, read from their metadata: nothing is imported, so a broken package cannot fail."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

UNKNOWN = "unknown"
"""The version of a package whose metadata names none."""


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed; None when none of them is."""
    for name in names:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        except Exception:  # the metadata cannot be read, but the package is there
            return UNKNOWN
        return found or UNKNOWN
    return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a release: "2.10.0.post4+cpu" -> (2, 10, 0); empty for a text that is no version."""
    try:
        return Version(version).release
    except InvalidVersion:
        return ()


def public(version: str) -> str:
    """A version without what the builder added: "2.13.0+cpu" -> "2.13.0"."""
    return version.partition("+")[0]


def build(version: str) -> str | None:
    """What the builder added, where it names a kind of build: "2.13.0+cpu" -> "cpu"; None for a hash of git's."""
    tag = version.partition("+")[2]
    return tag if re.fullmatch(r"cpu|[a-z]+\d[\d.]*", tag) else None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ">=2.10,<2.14". Release numbers are compared: a post-release counts as
    its release. A text that is no version (`UNKNOWN`) satisfies every range."""
    try:
        return SpecifierSet(wanted).contains(".".join(map(str, Version(version).release)))
    except InvalidVersion:
        return True


def requirement(package: str, on: str) -> str | None:
    """What an installed package asks of another on this machine, as "==2.13.0"; None where it asks nothing."""
    try:
        lines = metadata.requires(package) or []
    except Exception:  # not installed, or its metadata cannot be read
        return None
    for line in lines:
        try:
            found = Requirement(line)
        except InvalidRequirement:  # of another package than ours: doctor reports what it can read
            continue
        applies = found.marker is None or found.marker.evaluate({"extra": ""})
        if canonicalize_name(found.name) == canonicalize_name(on) and applies:
            return ",".join(sorted(map(str, found.specifier), reverse=True)) or None
    return None


def pip_install(extra: str) -> str:
    """The command that installs the packages of one of our extras: "pip install 'wandb>=0.19'".

    It names the packages, since Steepest itself is on no package index. Where our own metadata is missing, as in a copy
    of the sources that nobody installed, the command installs the extra from the clone.
    """
    try:
        lines = metadata.requires("steepest") or []
    except metadata.PackageNotFoundError:
        lines = []
    wanted = [
        found for line in lines if (found := Requirement(line)).marker and found.marker.evaluate({"extra": extra})
    ]
    if not wanted:
        return f"pip install -e '.[{extra}]' in a clone of Steepest"
    return "pip install " + " ".join(f"'{str(found).partition(';')[0].strip()}'" for found in wanted)
