"""The report: groups of lines, also as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from steepest.checks import Check, Status

STATUSES: tuple[Status, ...] = ("ok", "warning", "problem")
"""Status of a line, from good to bad."""

SCHEMA = 1
"""Version of the JSON. It increases when a field or the name of a line is removed or changes its meaning. New fields
and lines do not change it."""

EXIT_OK = 0
EXIT_PROBLEM = 1


def ok(name: str, text: str, remedy: str | None = None) -> Check:
    """A line without a problem. A remedy says how to install something optional that is absent."""
    return Check(name, "ok", text, remedy)


def warning(name: str, text: str, remedy: str) -> Check:
    """A line about something that works, but perhaps not as wanted."""
    return Check(name, "warning", text, remedy)


def problem(name: str, text: str, remedy: str) -> Check:
    """A line about something that is installed or set up but does not work."""
    return Check(name, "problem", text, remedy)


@dataclass(frozen=True)
class Group:
    """Lines under one heading."""

    name: str
    lines: list[Check]


@dataclass(frozen=True)
class Report:
    """The whole report."""

    version: str
    device: str | None
    """The device that a run takes if trainer.device is unset; None if no device can be asked."""
    devices: dict[str, dict[str, Any]]
    """Mapping from the name of a device to its facts, as plain values."""
    groups: list[Group]
    seconds: float = field(default=0.0, compare=False)

    def lines(self) -> Iterator[Check]:
        """All lines, in order."""
        return (line for group in self.groups for line in group.lines)

    def count(self, status: Status) -> int:
        """How many lines have this status."""
        return sum(line.status == status for line in self.lines())

    @property
    def status(self) -> Status:
        """The worst status of all lines."""
        return max((line.status for line in self.lines()), key=STATUSES.index, default="ok")

    @property
    def exit_code(self) -> int:
        """The exit code of the command: 1 with a problem; warnings do not count."""
        return EXIT_PROBLEM if self.status == "problem" else EXIT_OK

    def as_json(self) -> dict[str, Any]:
        """The object of `steepest doctor --json`; docs/doctor.md describes it."""
        return {
            "schema": SCHEMA,
            "steepest": self.version,
            "status": self.status,
            "counts": {status: self.count(status) for status in STATUSES},
            "seconds": round(self.seconds, 2),
            "device": self.device,
            "devices": self.devices,
            "groups": [
                {"name": group.name, "lines": [vars(line).copy() for line in group.lines]} for group in self.groups
            ],
        }


def group(name: str, *parts: Callable[[], list[Check]]) -> Group:
    """The lines of all parts. A part that raises becomes a line too, so that the rest of the report is still
    printed."""
    lines: list[Check] = []
    for part in parts:
        try:
            lines += part()
        except Exception as error:
            text = f"this part of the report failed: {type(error).__name__}: {error}"
            lines.append(problem(part.__name__, text, "report it with the output of `steepest doctor --json`"))
    return Group(name, lines)
