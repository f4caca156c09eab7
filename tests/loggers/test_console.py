"""One line a step in a pipe, and what a terminal gets; its table is in test_terminal.py."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from steepest.loggers import LoggerContext
from steepest.loggers.outputs.brief import BriefLogger
from steepest.loggers.outputs.console import ConsoleLogger, Pace, format_number
from steepest.loggers.terminal import format_seconds


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"), (0.123456789, "0.12346"), (1e-6, "1e-06"), (123456.789, "1.2346e+05"), (0.0, "0"), (-2.5, "-2.5"),
        (1319, "1319"), (12345678, "12345678"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (3.0, "3"),
    ],
)  # fmt: skip
def test_numbers_have_at_most_five_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def lines_of(*rows: tuple[int, dict[str, float]]) -> list[str]:
    stream = io.StringIO()
    logger = ConsoleLogger(LoggerContext(Path(), "p", "e"), stream)
    for step, metrics in rows:
        logger.log(step, metrics)
    logger.close()
    return stream.getvalue().splitlines()


def test_the_line_has_the_form_of_the_reference() -> None:
    assert lines_of((7, {"actor/pg_loss": 0.0123456, "actor/lr": 1e-6, "critic/vf_loss": math.nan})) == [
        "step:7 - actor/pg_loss:0.012346 - actor/lr:1e-06 - critic/vf_loss:nan"
    ]


def test_the_order_is_the_same_each_step_validation_first_and_timings_last() -> None:
    names = [
        "timing_s/gen",
        "actor/b",
        "new/x",
        "actor/a",
        "perf/throughput",
        "critic/score/mean",
        "response_length/mean",
    ]
    names += ["val-core/d/acc/mean@1", "critic/vf_loss"]
    first, second = lines_of((1, dict.fromkeys(names, 1.0)), (2, dict.fromkeys(reversed(names), 1.0)))
    assert re.findall(r" - ([^:]+):1", first) == [
        "val-core/d/acc/mean@1", "critic/score/mean", "actor/b", "actor/a", "critic/vf_loss", "response_length/mean",
        "new/x", "perf/throughput", "timing_s/gen",
    ]  # fmt: skip
    assert second == first.replace("step:1", "step:2")


def test_brief_shows_only_what_one_looks_at_first() -> None:
    stream = io.StringIO()
    logger = BriefLogger(LoggerContext(Path(), "p", "e"), stream)
    logger.log(
        2, {"timing_s/step": 1.5, "timing_s/gen": 1.0, "actor/lr": 0.1, "critic/score/mean": 0.25, "val/accuracy": 0.5}
    )
    assert stream.getvalue() == "step:2 - val/accuracy:0.5 - critic/score/mean:0.25 - timing_s/step:1.5\n"


def test_time_left_is_the_recent_pace_times_the_steps_left() -> None:
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    pace.mark(4)
    assert pace.seconds_left(100) is None
    now[0] = 10.0
    pace.mark(5)
    assert pace.seconds_left(100) == pytest.approx(950.0)
    now[0] = 12.0
    pace.mark(5)  # validation after the step belongs to its time
    assert pace.seconds_left(100) == pytest.approx(95 * 12.0)
    assert pace.seconds_left(5) == 0 and pace.seconds_left(None) is None
    for step in range(6, 30):  # two seconds a step from here: the slow one is forgotten
        now[0] += 2.0
        pace.mark(step)
    assert pace.seconds_left(39) == pytest.approx(20.0)


def test_the_first_step_counts_when_its_time_is_known() -> None:
    pace = Pace(clock=lambda: 100.0)
    pace.mark(1, seconds=30.0)
    assert pace.seconds_left(11) == pytest.approx(300.0)


def test_durations() -> None:
    assert [format_seconds(s) for s in (0.4, 59.6, 61, 3600, 36_610)] == ["0:00", "1:00", "1:01", "1:00:00", "10:10:10"]


SCRIPT = """
import sys, tempfile, time
from steepest.loggers import make_loggers
with make_loggers(["console"], tempfile.mkdtemp(), "p", "e", {}, total_steps=4, start_step=1) as loggers:
    for step in (2, 3, 4):
        loggers.log(step, {"x[bold]": 0.5, ":smile:": step, "perf/throughput": 12345.6, "long/" + "n" * 150: 1.0})
        print("a note of the run", step)
        time.sleep(0.6)
"""
LINES = [f"step:{s} - x[bold]:0.5 - :smile::{s} - long/{'n' * 150}:1 - perf/throughput:12346" for s in (2, 3, 4)]


def test_in_a_pipe_there_are_the_lines_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    notes = [f"a note of the run {s}" for s in (2, 3, 4)]
    assert re.sub(r" - eta_s:\d+$", "", done.stdout, flags=re.MULTILINE).splitlines() == [
        text for pair in zip(LINES, notes, strict=True) for text in pair
    ]
    assert done.stderr == ""


def on_a_terminal(script: str, term: str) -> str:
    """What a program writes to a pseudo-terminal of 80 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "80"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    output = b""
    while select.select([master], [], [], 120)[0]:
        try:
            output += os.read(master, 65536)
        except OSError:  # the program has closed its side
            break
    os.close(master)
    assert process.wait(timeout=120) == 0, output
    return output.decode()


def test_on_a_terminal_rows_that_the_table_has_no_column_for_are_whole_lines_above_the_bar() -> None:
    output = on_a_terminal(SCRIPT, "xterm")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    for line in LINES:
        assert line in plain.replace("\r\n", "\n")  # in one piece: not wrapped, no markup, no emoji
    assert "a note of the run 3" in plain
    assert re.search(r"step 4/4 .*0:00 left, 12,346 tokens/s", plain)
    assert re.search(r"step 3/4 .*0:\d\d left, 12,346 tokens/s", plain)


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines() -> None:
    output = on_a_terminal(SCRIPT, "dumb")
    assert "\x1b" not in output
    lines = re.sub(r" - eta_s:\d+\r?$", "", output, flags=re.MULTILINE).splitlines()
    assert [line for line in lines if line.startswith("step:")] == LINES
