"""The report as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TextIO

from steepest.checks.text import STYLES, Row, found, group_rows, write
from steepest.doctor.report import Report


def show(report: Report, stream: TextIO | None = None) -> None:
    """Write the report."""
    write(lambda width: render(report, width), stream)


def render(report: Report, width: int) -> Iterator[Row]:
    """The lines of text, each with its style; none is longer than `width` unless a single word is."""
    yield f"steepest {report.version} doctor", "bold"
    yield from group_rows(report.groups, width)
    yield "", ""
    for text in textwrap.wrap(_verdict(report), width):
        yield text, STYLES[report.status]


def _verdict(report: Report) -> str:
    problems = report.count("problem")
    text = found(problems, report.count("warning"), report.seconds)
    return text if problems else f"{text} Runs can start here."
