"""Results of checks: `steepest doctor` and `steepest preflight` print them, devices return some (`version_checks`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]

STATUSES: tuple[Status, ...] = ("ok", "warning", "problem")
"""Status of a line, from good to bad."""

EXIT_OK = 0
EXIT_PROBLEM = 1


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    """Name of the check, the same in every release and unique in its group of the report, so that programs can look it
    up."""
    status: Status
    text: str
    """What was found, in words."""
    remedy: str | None = None
    """What to do; None where nothing has to be done."""


def ok(name: str, text: str, remedy: str | None = None) -> Check:
    """A line without a problem. A remedy says how to install something optional that is absent."""
    return Check(name, "ok", text, remedy)


def warning(name: str, text: str, remedy: str) -> Check:
    """A line about something that works, but perhaps not as wanted."""
    return Check(name, "warning", text, remedy)


def problem(name: str, text: str, remedy: str) -> Check:
    """A line about something that does not work."""
    return Check(name, "problem", text, remedy)


@dataclass(frozen=True)
class Group:
    """Lines under one heading."""

    name: str
    lines: list[Check]

    def as_json(self) -> dict[str, Any]:
        """The group as plain values."""
        return {"name": self.name, "lines": [vars(line).copy() for line in self.lines]}


def count(lines: Iterable[Check], status: Status) -> int:
    """How many lines have this status."""
    return sum(line.status == status for line in lines)


def worst(lines: Iterable[Check]) -> Status:
    """The worst status of all lines."""
    return max((line.status for line in lines), key=STATUSES.index, default="ok")
