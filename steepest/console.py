"""Functions that print sentences to the user. Every package may use them: this file needs neither torch nor rich."""

from __future__ import annotations

from collections.abc import Callable

from steepest.errors import render


def say(text: str) -> None:
    """Print one of the run's own sentences on standard output, at once also when standard output is a pipe.

    Its settings are printed by the keys of the job (`errors.key_names`).
    """
    print(render(text), flush=True)


def shortened(text: str, limit: int = 200) -> str:
    """`text` on one line, as `printable` has it; a line longer than `limit` characters is cut in its middle."""
    line = printable(" | ".join(text.strip().splitlines()))
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"


def printable(text: str) -> str:
    """A text of a model or a file for the terminal: a character that a terminal would obey (an escape, a change of
    direction) is written as its number. Line ends stay."""
    return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)


def once(print_line: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that prints the first text it gets and ignores later ones, for a warning that may repeat."""
    printed = False

    def print_first(text: str) -> None:
        nonlocal printed
        if not printed:
            printed = True
            print_line(text)

    return print_first
