"""Rows of a program -> a file that a run can read again."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from steepest.errors import DataError
from steepest.python.rows import files_of

ROWS = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "3 + 3?", "answer": "6"}]


def written(file):
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


class Polars:
    """What polars' frames have of interest here."""

    def to_dicts(self):
        return ROWS


class Pandas:
    iloc = None

    def to_dict(self, orient):
        assert orient == "records"
        return ROWS


class Datasets:
    def to_list(self):
        return ROWS


@pytest.mark.parametrize("rows", [ROWS, iter(ROWS), pyarrow.Table.from_pylist(ROWS), Polars(), Pandas(), Datasets()])
def test_every_kind_of_table_gives_the_same_file(tmp_path, rows):
    (file,) = files_of(rows, tmp_path / "data", "train")
    assert file == f"{tmp_path}/data/d56bba6345bb/train.jsonl"
    assert written(file) == ROWS


def test_paths_and_ids_stay_as_they_are(tmp_path):
    for names in ("openai/gsm8k:main:train", tmp_path / "a.csv", [tmp_path / "a.csv", "b.jsonl"]):
        found = files_of(names, tmp_path, "train")
        assert found == [str(name) for name in (names if isinstance(names, list) else [names])]
    assert list(tmp_path.iterdir()) == []


def test_values_of_numpy_and_dates_are_written_as_json_has_them(tmp_path):
    row = {"a": np.float32(0.5), "b": np.arange(2), "c": datetime.date(2026, 12, 1), "d": np.bool_(True), "e": "ü"}
    (file,) = files_of([row], tmp_path, "val")
    assert written(file) == [{"a": 0.5, "b": [0, 1], "c": "2026-12-01", "d": True, "e": "ü"}]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "train: it has no rows"),
        (7, "train: found int; expected a datasets.Dataset, a pandas or polars frame"),
        ({"train": ROWS, "test": ROWS}, "It has the parts 'train', 'test': give one of them."),
        ([*ROWS, "text"], r"train, row 2 \(counted from 0\): found str; expected a dict"),
        ([{"a": 1, "b": object()}], "row 0 .*column 'b': found object, which JSON does not have"),
        ([{"a": float("nan")}], "row 0 .*column 'a': Out of range float values are not JSON compliant"),
    ],
)
def test_what_no_run_could_read_is_named(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        files_of(rows, tmp_path, "train")
    assert list(tmp_path.iterdir()) == []
