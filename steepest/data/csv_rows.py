"""Reads tables with a header line and a separator. Every cell is the text that the file has: `007` stays `007`."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from typing import Any, TextIO

from steepest.errors import DataError


def csv_rows(text: TextIO, name: str, *, tabs: bool) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows. An empty cell is None. A file whose header has no comma may be separated by `;` or tabs.

    Raises DataError that names the line: a header with one name twice, a row with more or fewer cells than the header,
    a quotation that does not end.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default, 131,072 characters, is less than a long prompt
    header = text.readline()
    text.seek(0)
    separator = "\t" if tabs else next((mark for mark in ",;\t" if mark in header), ",")
    spaced = f"{separator} " in header and not tabs  # `prompt, answer`: the space is no part of the cells
    reader = csv.reader(text, delimiter=separator, strict=True, skipinitialspace=spaced)
    try:
        columns = [column.strip() for column in next(reader, [])]
        if not columns:
            raise DataError(f"{name}: the first line is empty; expected the names of the columns.")
        if twice := [column for column, count in Counter(columns).items() if count > 1]:
            raise DataError(f"{name}: two columns are called {twice[0]!r}. Rename one.")
        rows: list[dict[str, Any]] = []
        for cells in reader:
            if not cells:
                continue  # a blank line
            if len(cells) != len(columns):
                raise DataError(
                    f"{name}, row {len(rows)} (counted from 0), up to line {reader.line_num}: found {len(cells)} cells;"
                    f" expected {len(columns)}, one a column ({', '.join(columns)}), separated by {separator!r}. A "
                    'cell that holds the separator or a line break stands in double quotes: "a, b".'
                )
            rows.append({column: cell or None for column, cell in zip(columns, cells, strict=True)})
    except csv.Error as error:
        raise DataError(
            f"{name}, line {reader.line_num} (counted from 1): not CSV: {error}. A double quote within a quoted cell "
            'is written twice: "a ""b"" c".'
        ) from error
    return columns, rows
