"""Files of strict JSON, one row per line. Each row is flushed; a killed run leaves whole rows, each step once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steepest.console import say
from steepest.errors import SteepestError, setting
from steepest.process.files import LineFile, replace_text

NONFINITE = "_nonfinite"
"""The key that holds the values of a row that are "nan", "inf" or "-inf"; the values themselves are null."""

_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RowFile:
    """Appends rows to a file. Opening the file repairs it after an earlier run.

    A last line that was cut off by a kill is removed. With `start_step` > 0 the rows of later steps are removed as
    well, because the run does those steps again. With `start_step` = 0 a file of an earlier run is kept,
    renamed to `name.1.jsonl`, `name.2.jsonl`, ... The rows of step `redo` are removed, because its rows are written
    again.

    Every method raises SteepestError when the disk is full or the file cannot be read or written.
    """

    def __init__(self, path: str | Path, *, start_step: int = 0, redo: int | None = None) -> None:
        self.path = Path(path)
        with self._told("open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size:
                if start_step > 0:
                    _keep(self.path, lambda row: row["step"] <= start_step and row["step"] != redo)
                else:
                    _set_aside(self.path)
            self._file = LineFile(self.path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        with self._told("append to"):
            if self._file.is_removed():
                say(f"warning: {self.path} was removed while the run wrote to it. It is begun again.")
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = LineFile(self.path)
            self._file.append(dumps(row))

    def close(self) -> None:
        with self._told("close"):
            self._file.close()

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SteepestError(
                f"{self.path}: cannot {doing} this record of the run ({error.strerror or error}). Make room or fix the "
                f"folder, or choose another with {setting('default_local_dir')}, then start the same command again: it "
                "resumes from the last checkpoint."
            ) from error


def dumps(row: Mapping[str, Any]) -> str:
    """One line of strict JSON. Floats keep every digit; NONFINITE holds values that JSON cannot express."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False, default=str)


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON can express it; `restored` gives the row back."""
    found: dict[str, Any] = {}
    odd: dict[str, str] = {}
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            found[key], odd[key] = None, "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        else:
            found[key] = _strict(value)
    return {**found, NONFINITE: odd} if odd else found


def restored(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row that `plain` got."""
    odd = {key: _NAMES[name] for key, name in row.get(NONFINITE, {}).items()}
    return {key: value for key, value in row.items() if key != NONFINITE} | odd


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

    Raises SteepestError for any other line that is damaged, and for a file that cannot be read.
    """
    for _, row in _lines(Path(path)):
        yield row


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                yield line, row_of(line, f"{path}:{number}")
    except OSError as error:
        raise SteepestError(f"{path}: this record of the run cannot be read ({error.strerror or error}).") from error


def row_of(line: bytes, where: str) -> dict[str, Any]:
    """The row of a line. Raises SteepestError with `where` for one that is damaged."""
    try:
        row = json.loads(line.decode("utf-8"))
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError("no object with a step")
        found = restored(row)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"not UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else str(error)
        raise SteepestError(
            f"{where}: this line is no row of a record ({reason}). Remove the line or move the file, then start again."
        ) from error
    return found


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the rows that are not wanted, and a line that is cut off."""
    lines = [(line, wanted(row)) for line, row in _lines(path)]
    kept = b"".join(line for line, keep in lines if keep)
    if all(keep for _, keep in lines[: kept.count(b"\n")]):
        os.truncate(path, len(kept))  # they are the end of the file; this needs no room on the disk
    else:
        replace_text(path, kept.decode("utf-8"), synced=True)


def _set_aside(path: Path) -> None:
    number = 1
    while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(target)
