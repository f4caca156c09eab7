"""Collects what is wrong with the rows of several files, so that one error reports all of it, with a right row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steepest.data.files import Table
from steepest.errors import DataError

_MAX_KINDS = 12
_MAX_ROWS = 4


@dataclass
class _Kind:
    """One way in which cells of a column are wrong: the error of its first row, and the numbers of the other rows."""

    first: DataError
    row: int = -1
    more: list[int] = field(default_factory=list)

    def text(self) -> str:
        if not self.more:
            return self.first.marked
        shown = ", ".join(map(str, self.more[:_MAX_ROWS])) + (", ..." if len(self.more) > _MAX_ROWS else "")
        rows = "row" if len(self.more) == 1 else "rows"
        return f"{self.first.marked} The same in {len(self.more):,} more {rows}: {shown}."


class Problems:
    """Problems of cells and of whole files, in the order in which they were found."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], _Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def cell(self, table: Table, row: int, column: str, found: Any, expected: str, remedy: str = "") -> None:
        """A wrong cell; see `Table.error`. Cells of one column that are to be the same thing are one kind."""
        kind = (table.stem, re.sub(r"\[\d+\]", "[]", column), expected, remedy)
        if kind in self._found:
            known = self._found[kind]
            if row != [known.row, *known.more][-1]:  # several messages of one row count once
                known.more.append(row)
        else:
            self._found[kind] = _Kind(table.error(row, column, found, expected, remedy), row)

    def file(self, table: Table, text: str) -> None:
        """A problem of a whole file."""
        self._found[table.stem, text] = _Kind(DataError(f"{table.name}: {text}"))

    def error(self, example: Mapping[str, Any]) -> DataError:
        """All problems, one a line, and `example`, a right row."""
        lines = [kind.text() for kind in self._found.values()]
        if len(lines) > _MAX_KINDS:
            lines[_MAX_KINDS:] = [f"... and {len(lines) - _MAX_KINDS} more kinds of problems."]
        return DataError("\n".join([*lines, f"A right row: {json.dumps(example, ensure_ascii=False)}"]))


def listed(names: Sequence[str]) -> str:
    """Names of columns for a sentence; after the twelfth they are counted."""
    shown = ", ".join(map(str, names[:12]))
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"
