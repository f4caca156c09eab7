"""Groups of checks as text: wrapped to the terminal's width, coloured on a terminal only."""

from __future__ import annotations

import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from steepest.checks import Check, Group

Row = tuple[str, str]
"""A line of text and its style."""

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_NAME_WIDTH = 20
_WIDTHS = (40, 120)
_PIPE_WIDTH = 120
"""Width of a line in a file or a pipe, unless COLUMNS is set."""


def write(render: Callable[[int], Iterator[Row]], stream: TextIO | None = None) -> None:
    """Write what `render` makes for a width. Colours through rich, on a terminal and without NO_COLOR."""
    out = sys.stdout if stream is None else stream
    width = min(max(shutil.get_terminal_size((_PIPE_WIDTH, 24)).columns, _WIDTHS[0]), _WIDTHS[1])
    rows = list(render(width))
    if isinstance(out, io.TextIOWrapper):  # a path may hold characters that the terminal cannot encode
        out.reconfigure(errors="backslashreplace")
    if not out.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        print("\n".join(text for text, _ in rows), file=out)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, highlight=False)
    for text, style in rows:
        console.print(Text(text, style=style), soft_wrap=True)


def group_rows(groups: Sequence[Group], width: int) -> Iterator[Row]:
    """Headings and lines of groups; none is longer than `width` unless a single word is."""
    for group in groups:
        yield "", ""
        yield group.name, "bold"
        for line in group.lines:
            yield from _line(line, width)


def found(problems: int, warnings: int, seconds: float) -> str:
    """The first sentence of a verdict: 1 problem, no warnings, 2.3 s."""
    return f"{_number(problems, 'problem')}, {_number(warnings, 'warning')}, {seconds:.1f} s."


def _line(line: Check, width: int) -> Iterator[tuple[str, str]]:
    style = "" if line.status == "ok" else STYLES[line.status]
    head = f"  {line.status:<8} {line.name:<{_NAME_WIDTH}} "
    indent = len(head) if width >= 2 * len(head) and len(line.name) <= _NAME_WIDTH else 11
    if len(line.name) > _NAME_WIDTH or width < 2 * len(head):
        yield from ((text, style) for text in _wrap(line.name, f"  {line.status:<8} ", " " * 11, width))
        head = " " * indent
    yield from ((text, style) for text in _wrap(line.text, head, " " * indent, width))
    if line.remedy is not None:
        yield from ((text, "") for text in _wrap(line.remedy, " " * indent + "-> ", " " * (indent + 3), width))


def _wrap(text: str, first: str, rest: str, width: int) -> list[str]:
    # paths and commands are never cut, not even at hyphens, so that they can be copied
    wrapper = textwrap.TextWrapper(
        width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(" ".join(text.split())) or [first.rstrip()]


def _number(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'' if count == 1 else 's'}"
