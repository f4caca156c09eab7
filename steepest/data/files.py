"""Reads parquet, jsonl, json and csv files as lists of rows, and writes parquet. Errors name file, row and column."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from steepest.data.csv_rows import csv_rows
from steepest.errors import DataError

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
GZIP = ".gz"
"""Also at the end of every one of SUFFIXES but parquet, which is compressed inside."""
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
    names = [found for name in ([files] if isinstance(files, str) else files) for found in expand(str(name))]
    if not names:
        raise DataError(f"{key} is empty: name at least one {', '.join(SUFFIXES)} file. {MAKE_DATA}.")
    seen: dict[str, int] = {}
    tables = []
    for name in names:
        stem = stem_of(name)
        seen[stem] = seen.get(stem, 0) + 1
        tables.append(_read_table(name, stem if seen[stem] == 1 else f"{stem}#{seen[stem]}", key, columns))
    return tables


def expand(name: str) -> list[str]:
    """The files that a pattern such as `data/train-*.parquet` names, in the order of the alphabet; another name as it
    is."""
    path = Path(name).expanduser()
    if not glob.has_magic(name) or os.path.exists(path):
        return [name]
    return sorted(glob.glob(str(path))) or [name]


def suffix_of(name: str) -> str:
    """The ending that says what a file holds, in small letters: `.jsonl` of `a.jsonl.gz`."""
    return Path(name.lower().removesuffix(GZIP)).suffix


def stem_of(name: str) -> str:
    """The file's name without folder and endings: `a` of `x/a.jsonl.gz` and of `a-00000-of-00002.parquet`."""
    bare = Path(name).name
    stem = Path(bare[: -len(GZIP)] if bare.lower().endswith(GZIP) else bare).stem
    return re.sub(r"(?<=.)-\d{5}-of-\d{5}$", "", stem)


def open_text(path: Path) -> TextIO:
    """The text of a file, unpacked if its name ends with `.gz`."""
    if path.name.lower().endswith(GZIP):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends with `.gz`."""
    return cast("BinaryIO", gzip.open(path)) if path.name.lower().endswith(GZIP) else path.open("rb")


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
    suffix = suffix_of(path.name)
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix.lower() == GZIP):
        raise DataError(
            f"{key}={name!r}: cannot read files of kind {''.join(path.suffixes[-2:])!r}; known are "
            f"{', '.join(SUFFIXES)}, and all but parquet with {GZIP} behind it."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{key}={name!r}: the file is empty (0 bytes). Make it again; {MAKE_DATA}.")
    try:
        if suffix == ".parquet":
            found, rows = _parquet_rows(path, name, key, columns)
        elif suffix in (".csv", ".tsv"):
            with open_text(path) as text:
                found, rows = csv_rows(text, name, tabs=suffix == ".tsv")
        else:
            rows = _jsonl_rows(path, name) if suffix == ".jsonl" else _json_rows(path, name)
            found = list(dict.fromkeys(column for row in rows for column in row))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
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
            if twice := [column for column, count in Counter(found).items() if count > 1]:
                raise DataError(f"{name}: two columns are called {twice[0]!r}. Rename one.")
            wanted = found if columns is None else [column for column in found if column in columns]
            # a file without any wanted column still has its row count: the caller says which column is missing
            return found, file.read(columns=wanted).to_pylist() or [{}] * file.metadata.num_rows
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{key}={name!r}: not a readable parquet file ({reason}). It may be cut off: make or download it again."
        ) from error


class _TwiceError(Exception):
    """An object of a JSON file has a name twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _TwiceError(f"an object has the name {twice!r} twice, so one of its values would be lost. Remove one.")
    return row


def _jsonl_rows(path: Path, name: str) -> list[dict[str, Any]]:
    rows = []
    with open_bytes(path) as lines:
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
        with open_bytes(path) as file:
            rows = _json(_text(file.read().removeprefix(BOM_UTF8), name), name)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, as many .json files of data sets have it
            return _jsonl_rows(path, name)
        raise DataError(
            f"{name}, line {error.lineno} (counted from 1): not JSON: {error.msg}. A .json file holds one list of "
            "objects, or one object a line."
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
        found = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except _TwiceError as error:
        raise DataError(f"{where}: {error}") from None
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
