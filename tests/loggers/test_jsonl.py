"""metrics.jsonl and samples.jsonl: strict JSON, every digit, whole after a kill, each step once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steepest.errors import SteepestError
from steepest.loggers import SampleLog, make_loggers, read_metrics
from steepest.loggers.rows import RowFile, dumps, read_rows


def strict(line: str) -> dict[str, object]:
    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    row: dict[str, object] = json.loads(line, parse_constant=refuse)
    return row


def log_steps(folder: Path, steps: range, *, start_step: int = 0, value: float = 0.5) -> None:
    with make_loggers([], folder, "p", "e", {}, start_step=start_step) as loggers:
        for step in steps:
            loggers.log(step, {"x": value})


def test_numbers_keep_every_digit_and_nan_is_marked(tmp_path: Path) -> None:
    values = {"pi": math.pi, "lr": 1e-6, "n": 12345678901234567890, "nan": math.nan, "up": math.inf, "down": -math.inf}
    before = time.time()
    with make_loggers([], tmp_path, "p", "e", {}) as loggers:
        loggers.log(3, values)
        row = strict((tmp_path / "metrics.jsonl").read_text())  # flushed: it is there before the file is closed
    assert (row["step"], row["pi"], row["lr"], row["n"]) == (3, math.pi, 1e-6, 12345678901234567890)
    assert (row["nan"], row["up"], row["down"]) == (None, None, None)
    assert row["_nonfinite"] == {"nan": "nan", "up": "inf", "down": "-inf"}
    assert before - 1 <= float(str(row["time"])) <= time.time() + 1
    back = read_metrics(tmp_path / "metrics.jsonl")[3]
    assert math.isnan(back["nan"]) and (back["up"], back["down"]) == (math.inf, -math.inf)
    assert sorted(back) == sorted(values)


@given(st.dictionaries(st.text(), st.floats() | st.integers() | st.text(st.characters()), max_size=4))
def test_every_row_is_one_line_of_strict_json(row: dict[str, object]) -> None:
    line = dumps({**row, "inner": {"list": [math.nan, 1.5]}})
    assert "\n" not in line
    parsed = strict(line.encode("utf-8", "backslashreplace").decode())
    for key, value in row.items():
        if not isinstance(value, float) or math.isfinite(value):
            assert parsed[key] == value


def test_rows_of_one_step_are_joined(tmp_path: Path) -> None:
    with make_loggers([], tmp_path, "p", "e", {}) as loggers:
        loggers.log(1, {"a": 1.0})
        loggers.log(1, {"val": 0.25})
    assert read_metrics(tmp_path / "metrics.jsonl") == {1: {"a": 1.0, "val": 0.25}}


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 8), value=0.1)
    log_steps(tmp_path, range(5, 10), start_step=4, value=0.2)
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    assert [(row["step"], row["x"]) for row in rows] == [(s, 0.1 if s <= 4 else 0.2) for s in range(1, 10)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_keeps_nan_and_every_digit_of_earlier_rows(tmp_path: Path) -> None:
    with make_loggers([], tmp_path, "p", "e", {}) as loggers:
        loggers.log(1, {"x": math.nan, "y": 0.1 + 0.2})
    before = (tmp_path / "metrics.jsonl").read_text()
    log_steps(tmp_path, range(2, 3), start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)


def test_a_new_run_in_the_same_folder_sets_the_old_file_aside(tmp_path: Path) -> None:
    for value in (0.1, 0.2, 0.3):
        log_steps(tmp_path, range(1, 3), value=value)
    found = {file.name: read_metrics(file)[2]["x"] for file in tmp_path.iterdir()}
    assert found == {"metrics.1.jsonl": 0.1, "metrics.2.jsonl": 0.2, "metrics.jsonl": 0.3}


def test_a_line_cut_off_by_a_kill_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log_steps(tmp_path, range(1, 4))
    with file.open("a") as half:
        half.write('{"step": 4, "x": 0.')
    assert sorted(read_metrics(file)) == [1, 2, 3]
    log_steps(tmp_path, range(4, 5), start_step=3)
    assert [strict(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]


def test_what_was_logged_is_in_the_file_after_kill_9(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from steepest.loggers import make_loggers\n"
        "loggers = make_loggers(['console'], sys.argv[1], 'p', 'e', {})\n"
        "for step in range(1, 4): loggers.log(step, {'x': step})\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]  # into a pipe: lines arrive at once, not at the end
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert lines == ["step:1 - x:1\n", "step:2 - x:2\n", "step:3 - x:3\n"]
    assert read_metrics(tmp_path / "metrics.jsonl") == {1: {"x": 1}, 2: {"x": 2}, 3: {"x": 3}}


def test_samples_keep_the_text_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    log = SampleLog(file)
    response = 'line\nbreak "quoted" \u2028 \u4f60 \udc80 </script>'
    log.add(1, "train", prompt="p", response=response, score=0.0, ground_truth="72", uid="train:3")
    log.extend(2, "val", [{"prompt": "q", "response": "r", "score": None}])
    log.close()
    first, second = read_rows(file)
    assert first == {
        "step": 1, "split": "train", "prompt": "p", "response": response, "score": 0.0, "ground_truth": "72",
        "uid": "train:3",
    }  # fmt: skip
    assert second == {"step": 2, "split": "val", "prompt": "q", "response": "r", "score": None, "ground_truth": None}
    SampleLog(file, start_step=1).close()
    assert [row["step"] for row in read_rows(file)] == [1]


def test_a_ground_truth_that_is_no_json_is_written_as_text(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "samples.jsonl")
    log.add(1, "val", prompt="", response="", score=math.nan, ground_truth={"path": Path("a"), "p": math.inf})
    log.close()
    row = strict((tmp_path / "samples.jsonl").read_text())
    assert (row["score"], row["_nonfinite"]) == (None, {"score": "nan"})
    assert row["ground_truth"] == {"path": "a", "p": "inf"}


def test_a_damaged_line_in_the_middle_is_an_error_and_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(SteepestError, match="metrics.jsonl:2"):
        RowFile(file, start_step=3)
    assert file.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'
