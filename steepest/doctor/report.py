"""The report: groups of lines, also as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from steepest.checks import EXIT_OK, EXIT_PROBLEM, STATUSES, Check, Group, Status, count, problem, worst

SCHEMA = 1
"""Version of the JSON. It increases when a field or the name of a line is removed or changes its meaning. New fields
and lines do not change it."""


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
        return count(self.lines(), status)

    @property
    def status(self) -> Status:
        """The worst status of all lines."""
        return worst(self.lines())

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
            "groups": [group.as_json() for group in self.groups],
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
