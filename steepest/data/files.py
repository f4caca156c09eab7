"""Reads parquet, jsonl and json files as lists of rows, and writes parquet. Errors name file, row and column."""

from __future__ import annotations

import json
import os
from codecs import BOM_UTF8
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.errors import DataError

SUFFIXES = (".parquet", ".jsonl", ".json")
MAKE_DATA = "`steepest prepare gsm8k --local_save_dir DIR` makes the GSM8K files"


@dataclass(frozen=True)
class Table:
    """One file's rows. `name` is the path as the user wrote it; `stem` is unique among the files read together."""

    name: str
    stem: str
    columns: list[str]
    rows: list[dict[str, Any]]

    def error(self, row: int, column: str, found: Any, expected: str, remedy: str = "") -> DataError:
        """The error of one cell. A string in `found` is shown as it is, another value as Python writes it; long ones
        are cut."""
        tail = f" {remedy}" if remedy else ""
        return DataError(
            f"{self.name}, row {row} (counted from 0), column {column!r}: found {shown(found)}; expected "
            f"{expected}.{tail}"
        )


def shown(value: Any) -> str:
    """A value with its type for an error message, cut to about 80 characters."""
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def read_tables(files: str | Sequence[str], *, key: str, columns: Collection[str] | None = None) -> list[Table]:
    """Read all files of the configuration key `key`, in order; only `columns` where a parquet file has more.

    A stem that occurs twice gets `#2`, `#3`, so `f"{stem}:{row}"` names one row of all.
    Raises DataError: no file named, file missing, empty, broken, of an unknown kind, or without rows.
    """
    names = [files] if isinstance(files, str) else [str(name) for name in files]
    if not names:
        raise DataError(f"{key} is empty: name at least one {', '.join(SUFFIXES)} file. {MAKE_DATA}.")
    seen: dict[str, int] = {}
    tables = []
    for name in names:
        stem = Path(name).stem
        seen[stem] = seen.get(stem, 0) + 1
        tables.append(_read_table(name, stem if seen[stem] == 1 else f"{stem}#{seen[stem]}", key, columns))
    return tables


def _read_table(name: str, stem: str, key: str, columns: Collection[str] | None) -> Table:
    path = Path(name).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that holds NUL
        pass
    except OSError as error:  # too long, a loop of links, a folder without permission
        raise DataError(f"{key}={name!r}: cannot be read: {error.strerror}.") from error
    if path.is_dir():
        raise DataError(f"{key}={name!r} is a folder; name the {', '.join(SUFFIXES)} files in it.")
    if not path.is_file():
        raise DataError(f"{key}={name!r}: there is no such file (looked for {path.absolute()}). {MAKE_DATA}.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{key}={name!r}: cannot read files of kind {path.suffix!r}; known are {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{key}={name!r}: the file is empty (0 bytes). Make it again; {MAKE_DATA}.")
    try:
        if path.suffix.lower() == ".parquet":
            found, rows = _parquet_rows(path, name, key, columns)
        else:
            rows = _jsonl_rows(path, name) if path.suffix.lower() == ".jsonl" else _json_rows(path, name)
            found = list(dict.fromkeys(column for row in rows for column in row))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}={name!r}: cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{key}={name!r}: the file has no rows.")
    return Table(name, stem, found, rows)


def _parquet_rows(
    path: Path, name: str, key: str, columns: Collection[str] | None
) -> tuple[list[str], list[dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = list(file.schema_arrow.names)
            wanted = found if columns is None else [column for column in found if column in columns]
            # a file without any wanted column still has its row count: the caller says which column is missing
            return found, file.read(columns=wanted).to_pylist() or [{}] * file.metadata.num_rows
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{key}={name!r}: not a readable parquet file ({reason}). It may be cut off: make or download it again."
        ) from error


def _jsonl_rows(path: Path, name: str) -> list[dict[str, Any]]:
    rows = []
    with path.open("rb") as lines:
        for number, read in enumerate(lines, start=1):
            where = f"{name}, line {number} (counted from 1)"
            line = _text(read.removeprefix(BOM_UTF8) if number == 1 else read, where)
            if not line.strip():
                continue
            try:
                row = _json(line, where)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not JSON: {error.msg} at character {error.colno}; "
                    f"found {shown(line.strip())}. A .jsonl file holds one JSON object a line."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: found {shown(row)}; expected a JSON object with named columns.")
            rows.append(row)
    return rows


def _json_rows(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        rows = _json(_text(path.read_bytes().removeprefix(BOM_UTF8), name), name)
    except json.JSONDecodeError as error:
        remedy = "One JSON object a line is a .jsonl file: rename it." if error.msg == "Extra data" else ""
        raise DataError(
            f"{name}, line {error.lineno} (counted from 1): not JSON: {error.msg}. A .json file holds one list of "
            f"objects." + (f" {remedy}" if remedy else "")
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{name}: found {shown(rows)}; expected a JSON list of objects, one object a row.")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {index} (counted from 0): found {shown(row)}; expected a JSON object.")
    return rows


def _text(read: bytes, where: str) -> str:
    try:
        return read.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = read[error.start]
        raise DataError(
            f"{where}: not UTF-8: byte 0x{byte:02x} at position {error.start}. Save the file as UTF-8, for example by "
            "`iconv -t UTF-8`."
        ) from error


def _json(text: str, where: str) -> Any:
    """Raises JSONDecodeError for what is no JSON, DataError for JSON that no row can be made of."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataError(f"{where}: not readable as JSON: {error}.") from error
    if "\\ud" in text.lower():  # an escape, perhaps of one half of a pair
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise DataError(
                f"{where}: {half} is one half of a surrogate pair, and no character: no tokenizer reads it. Write the "
                "text as UTF-8 with what cannot be read replaced."
            ) from error
    return found


@dataclass(frozen=True)
class WrittenFile:
    """A file that a `prepare` command wrote."""

    path: Path
    num_rows: int


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: Any) -> WrittenFile:
    """Write rows in the pyarrow schema. The file is written under another name and renamed, so it is never half
    written."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows, schema=schema)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, beside)
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}. Choose another folder or make room.") from error
    finally:
        if beside.is_file():
            beside.unlink()
    return WrittenFile(path, len(rows))
