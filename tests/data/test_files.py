"""Files: what is read, what is written, and the words for each way a file can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from steepest.data.files import read_tables, shown, write_parquet
from steepest.errors import DataError
from tests.support.machine import files_of_at_most

KEY = "data.train_files"
ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def message_of(files: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_tables(files, key=KEY)
    return str(caught.value)


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.json"])
def test_three_formats_give_the_same_rows(write_rows: Any, name: str) -> None:
    (table,) = read_tables(write_rows(ROWS, name), key=KEY)
    assert (table.rows, table.columns, table.stem) == (ROWS, ["a", "b"], "t")


def test_files_keep_their_order_and_equal_stems_are_told_apart(write_rows: Any) -> None:
    files = [write_rows(ROWS[:1], "x/t.jsonl"), write_rows(ROWS[1:], "y/t.json"), write_rows(ROWS, "z/t.parquet")]
    tables = read_tables(files, key=KEY)
    assert [table.stem for table in tables] == ["t", "t#2", "t#3"]
    assert [table.rows for table in tables] == [ROWS[:1], ROWS[1:], ROWS]


def test_only_wanted_parquet_columns_are_read_but_all_are_named(write_rows: Any) -> None:
    (table,) = read_tables(write_rows(ROWS, "t.parquet"), key=KEY, columns=["b", "c"])
    assert table.rows == [{"b": "x"}, {"b": "y"}] and table.columns == ["a", "b"]
    (table,) = read_tables(write_rows(ROWS, "t.parquet"), key=KEY, columns=["c"])
    assert table.rows == [{}, {}]


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}\n', encoding="utf-8")
    (table,) = read_tables(str(tmp_path / "t.jsonl"), key=KEY)
    assert table.rows == [{"a": 1}, {"a": 2}]


def test_missing_folder_unknown_kind_and_no_file(tmp_path: Path) -> None:
    assert message_of([]).startswith("data.train_files is empty: name at least one .parquet, .jsonl, .json, .csv, .tsv")
    missing = message_of(str(tmp_path / "no.parquet"))
    assert missing.startswith(f"data.train_files={str(tmp_path / 'no.parquet')!r}: there is no such file")
    assert "steepest prepare gsm8k" in missing
    assert "is a folder; name the .parquet, .jsonl, .json, .csv, .tsv files in it" in message_of(str(tmp_path))
    for name in ("t.xlsx", "t.parquet.gz"):
        (tmp_path / name).write_text("a,b")
        assert f"cannot read files of kind {name[1:]!r}; known are .parquet, .jsonl," in message_of(
            str(tmp_path / name)
        )


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.json"])
def test_empty_files(tmp_path: Path, write_rows: Any, name: str) -> None:
    (tmp_path / name).touch()
    assert "the file is empty (0 bytes)" in message_of(str(tmp_path / name))
    if name == "t.parquet":
        pyarrow.parquet.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("[]" if name == "t.json" else "\n\n")
    assert message_of(str(tmp_path / name)).endswith("the file has no rows.")


def test_broken_parquet(tmp_path: Path, write_rows: Any) -> None:
    path = Path(write_rows(ROWS, "t.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a readable parquet file (" in message_of(str(path)) and "cut off" in message_of(str(path))
    path.write_bytes(b"hello")
    assert "not a readable parquet file (" in message_of(str(path))


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2\n', encoding="utf-8")
    assert f"{path}, line 3 (counted from 1): not JSON: Expecting ',' delimiter at character" in message_of(str(path))
    path.write_text('{"a": 1}\n[1]\n', encoding="utf-8")
    assert "line 2 (counted from 1): found [1] (list); expected a JSON object" in message_of(str(path))
    path.write_bytes(b'{"a": "\xff"}\n')
    assert f"{path}, line 1 (counted from 1): not UTF-8: byte 0xff at position 7. Save" in message_of(str(path))
    path = tmp_path / "t.json"
    path.write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    (table,) = read_tables(str(path), key=KEY)
    assert table.rows == [{"a": 1}, {"a": 2}]  # many data sets call such a file .json
    path.write_text('{"a": 1}', encoding="utf-8")
    assert "expected a JSON list of objects" in message_of(str(path))
    path.write_text('[{"a": 1}, 5]', encoding="utf-8")
    assert "row 1 (counted from 0): found 5 (int); expected a JSON object." in message_of(str(path))


@pytest.mark.parametrize(
    "cell, said",
    [
        (b'"\\ud83d"', r"'\ud83d' is one half of a surrogate pair, and no character"),
        (b'{"b": ["x", "\\uDE00"]}', r"'\ude00' is one half of a surrogate pair"),
        (b"1" * 5000, "not readable as JSON: Exceeds the limit (4300 digits)"),
        (b"[" * 100_000, "not readable as JSON: maximum recursion depth exceeded"),
        ("\u00e4".encode("latin-1"), "not UTF-8: byte 0xe4 at position"),
    ],
)
def test_a_text_that_no_tokenizer_reads_is_named_with_its_line(tmp_path: Path, cell: bytes, said: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"a": 1}\n{"a": ' + cell + b"}\n")
    assert f"{tmp_path}/t.jsonl, line 2 (counted from 1): {said}" in message_of(f"{tmp_path}/t.jsonl")
    (tmp_path / "t.json").write_bytes(b'[{"a": ' + cell + b"}]")
    assert f"{tmp_path}/t.json: {said}" in message_of(f"{tmp_path}/t.json")


def test_a_whole_pair_and_other_escapes_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00 \\u0000 \\\\ud83d"}\r\n')
    [table] = read_tables(f"{tmp_path}/t.jsonl", key="k")
    assert table.rows == [{"a": "\U0001f600 \0 \\ud83d"}]


def test_paths_that_the_system_refuses(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert message_of(f"{tmp_path}/loop.jsonl").endswith("cannot be read: Too many levels of symbolic links.")
    assert message_of(f"{tmp_path}/{'n' * 300}.jsonl").endswith("cannot be read: File name too long.")
    assert "there is no such file" in message_of(f"{tmp_path}/a\0.jsonl")


def test_values_are_shown_short_and_with_their_type() -> None:
    assert shown(None) == "nothing (null)"
    assert shown("x") == "'x' (str)"
    assert shown("y" * 200) == "'" + "y" * 76 + "... (str)"


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64())])
    written = write_parquet(tmp_path / "new" / "t.parquet", [{"a": 1}], schema)
    assert written.num_rows == 1 and pyarrow.parquet.read_table(written.path).to_pylist() == [{"a": 1}]

    told = r"cannot write .*t.parquet: .*File too large.*make room"
    with files_of_at_most(100), pytest.raises(DataError, match=told):
        write_parquet(written.path, [{"a": 2}], schema)
    assert pyarrow.parquet.read_table(written.path).to_pylist() == [{"a": 1}]
    assert [entry.name for entry in written.path.parent.iterdir()] == ["t.parquet"]


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    # the new file takes the old one's place at once; the old one's content is never written over
    schema = pa.schema([("a", pa.int64())])
    path = write_parquet(tmp_path / "t.parquet", [{"a": 1}], schema).path
    before = path.read_bytes()
    with path.open("rb") as reader:
        write_parquet(path, [{"a": 2}], schema)
        assert reader.read() == before
    assert pyarrow.parquet.read_table(path).to_pylist() == [{"a": 2}]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_parquet(tmp_path / "file" / "t.parquet", [{"a": 1}], pa.schema([("a", pa.int64())]))
