"""metrics.jsonl and samples.jsonl: strict JSON, every digit, whole after a kill, each step once."""

from __future__ import annotations

import json
import math
import os
import shutil
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
from tests.support.machine import files_of_at_most


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
    with pytest.raises(SteepestError, match="metrics.jsonl:2: this line is no row"):
        RowFile(file, start_step=3)
    assert file.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'


DAMAGED = {
    b'{"st': "Invalid control character",
    b"\xff\xfe": "not UTF-8: invalid start byte",
    b'{"step": 2, "x": "\xc3"}': "not UTF-8: invalid continuation byte",
    b"\x00\x00\x00": "Expecting value",
    b"[1]": "no object with a step",
    b"3": "no object with a step",
    b'{"x": 1}': "no object with a step",
    b'{"step": "2"}': "no object with a step",
    b'{"step": 2, "_nonfinite": {"x": "what"}}': "what",
    b'{"step": 2, "_nonfinite": 3}': "int",
    b"[" * 100_000: "recursion",
}


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:20]))
def test_a_damaged_line_is_named_with_its_fault(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    for call in (lambda: RowFile(file, start_step=3), lambda: read_metrics(file)):
        with pytest.raises(SteepestError, match="metrics.jsonl:2: this line is no row of a record ") as caught:
            call()
        assert DAMAGED[line] in str(caught.value)
    file.write_bytes(b'{"step": 1}\n' + line)  # cut off by a kill, or zeros after a loss of power: it is removed
    RowFile(file, start_step=3).close()
    assert file.read_bytes() == b'{"step": 1}\n'


def test_rows_after_the_checkpoint_are_cut_on_a_full_disk_too(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 8))
    rows = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with files_of_at_most(0):
        RowFile(tmp_path / "metrics.jsonl", start_step=4).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(rows[:4])


def test_rows_in_another_order_are_kept_by_their_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 9}\n{"step": 2}\n')
    RowFile(file, start_step=4).close()
    assert [row["step"] for row in read_rows(file)] == [1, 2]


def test_a_full_disk_is_told_once_and_costs_no_earlier_row(tmp_path: Path) -> None:
    said = (
        r"metrics.jsonl: cannot append to this record of the run \(File too large\). Make room or fix the folder, or "
    )
    with pytest.raises(SteepestError, match=said), files_of_at_most(150):
        log_steps(tmp_path, range(1, 9))
    left = (tmp_path / "metrics.jsonl").read_bytes()
    assert left.endswith(b"\n") and len(left) <= 150
    steps = sorted(read_metrics(tmp_path / "metrics.jsonl"))
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 2
    log_steps(tmp_path, range(2, 4), start_step=1)
    assert sorted(read_metrics(tmp_path / "metrics.jsonl")) == [1, 2, 3]


def test_a_file_that_was_removed_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with make_loggers([], folder, "p", "e", {}) as loggers:
        loggers.log(1, {"x": 1})
        shutil.rmtree(folder)
        loggers.log(2, {"x": 2})
        loggers.log(3, {"x": 3})
    assert sorted(read_metrics(folder / "metrics.jsonl")) == [2, 3]
    assert capsys.readouterr().out == (
        f"warning: {folder}/metrics.jsonl was removed while the run wrote to it. It is begun again.\n"
    )


@pytest.mark.parametrize("place", ["/proc/x/metrics.jsonl", "{tmp_path}/file/metrics.jsonl", "/dev/null/x"])
def test_a_place_that_takes_no_file(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SteepestError, match="cannot open this record of the run"):
        RowFile(place.format(tmp_path=tmp_path))
