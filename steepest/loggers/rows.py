"""Files of strict JSON, one row per line. Each row is flushed; a killed run leaves whole rows, each step once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steepest.errors import SteepestError

NONFINITE = "_nonfinite"
"""The key that holds the values of a row that are "nan", "inf" or "-inf"; the values themselves are null."""

_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RowFile:
    """Appends rows to a file. Opening the file repairs it after an earlier run.

    A last line that was cut off by a kill is removed. With `start_step` > 0 the rows of later steps are removed as
    well, because the run does those steps again. With `start_step` = 0 a file of an earlier run is kept,
    renamed to `name.1.jsonl`, `name.2.jsonl`, ... The rows of step `redo` are removed, because its rows are written
    again.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0, redo: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size:
            if start_step > 0:
                _keep(self.path, lambda row: row.get("step", 0) <= start_step and row.get("step") != redo)
            else:
                _set_aside(self.path)
        # a lone surrogate becomes \udcXX, which is what JSON calls it
        self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. Raises SteepestError when the disk is full or the file cannot be written any more."""
        try:
            self._file.write(dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise SteepestError(
                f"{self.path}: cannot append to the run's log ({error.strerror}). Make room or fix the folder, then "
                "start the same command again: it resumes from the last checkpoint."
            ) from error

    def close(self) -> None:
        self._file.close()


def dumps(row: Mapping[str, Any]) -> str:
    """One line of strict JSON. Floats keep every digit; NONFINITE holds values that JSON cannot express."""
    plain: dict[str, Any] = {}
    odd: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            plain[key], odd[key] = None, "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        else:
            plain[key] = _strict(value)
    if odd:
        plain[NONFINITE] = odd
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, default=str)


def _strict(value: Any) -> Any:
    """A nested value in which everything that JSON cannot express is text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner) for inner in value]
    return value


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, with nan and inf restored. A last line that is cut off is left out.

    Raises SteepestError for any other line that is damaged.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row: dict[str, Any] = json.loads(line)
            except ValueError as error:
                raise SteepestError(
                    f"{path}:{number}: this line is no JSON ({error}). Fix or move the file, then start again."
                ) from error
            for key, name in row.pop(NONFINITE, {}).items():
                row[key] = _NAMES[name]
            yield row


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file with the wanted rows only; a rename puts it in place."""
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for row in read_rows(path):
            if wanted(row):
                file.write(dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _set_aside(path: Path) -> None:
    number = 1
    while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
