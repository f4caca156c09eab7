"""Data that a program has in memory -> a file that a run reads, and every later start of the run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steepest.errors import DataError
from steepest.process.files import replace_text

Rows = Any
"""A `datasets.Dataset`, a pandas or polars frame, a pyarrow table, a list of dicts; or a path, a hub id, or a list of
those."""
_AS_LISTS = ("to_list", "to_pylist", "to_dicts")
"""How tables give their rows: `datasets`, pyarrow, polars."""


def files_of(rows: Rows, folder: Path, name: str) -> list[str]:
    """The names of files and data sets that `rows` stands for. Rows in memory are written to a file in `folder`.

    The file's folder has the digest of the rows as its name, so a run that goes on with the same rows finds the same
    file, and one with other rows never changes the file of an earlier one. `name`: the argument, for messages.
    Raises DataError for what is none of `Rows`, for rows that JSON cannot hold, and for an empty table.
    """
    if isinstance(rows, (str, Path)):
        return [str(rows)]
    if isinstance(rows, Sequence) and rows and all(isinstance(one, (str, Path)) for one in rows):
        return [str(one) for one in rows]
    lines = [_line(row, number, name) for number, row in enumerate(_dicts(rows, name))]
    if not lines:
        raise DataError(f"{name}: it has no rows.")
    text = "\n".join(lines) + "\n"
    path = folder / hashlib.sha256(text.encode()).hexdigest()[:12] / f"{name}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    return [str(path)]


def _dicts(rows: Rows, name: str) -> Iterable[Any]:
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):  # pandas
        return list(rows.to_dict("records"))
    for method in _AS_LISTS:
        if callable(getattr(rows, method, None)):
            return list(getattr(rows, method)())
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        kinds = "a datasets.Dataset, a pandas or polars frame, a pyarrow table, a list of dicts, a path or a hub id"
        hint = ""
        if isinstance(rows, Mapping):  # a DatasetDict among them
            hint = f" It has the parts {', '.join(map(repr, list(rows)[:5]))}: give one of them."
        raise DataError(f"{name}: found {type(rows).__name__}; expected {kinds}.{hint}")
    return rows


def _line(row: Any, number: int, name: str) -> str:
    if not isinstance(row, Mapping):
        raise DataError(f"{name}, row {number} (counted from 0): found {type(row).__name__}; expected a dict.")
    try:
        return json.dumps(dict(row), ensure_ascii=False, default=_plain, allow_nan=False)
    except (TypeError, ValueError):
        for column, value in row.items():
            try:
                json.dumps(value, default=_plain, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{name}, row {number} (counted from 0), column {column!r}: {error}. Rows hold texts, finite "
                    "numbers, True, False, None, lists and dicts."
                ) from error
        raise


def _plain(value: Any) -> Any:
    """numpy's and torch's numbers and arrays, and dates, as JSON has them."""
    for method in ("tolist", "isoformat"):
        if callable(getattr(value, method, None)):
            return getattr(value, method)()
    raise TypeError(f"found {type(value).__name__}, which JSON does not have")
