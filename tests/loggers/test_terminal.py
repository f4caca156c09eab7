"""The table and the bars of a terminal, and what a start shows."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from steepest.loggers import LoggerContext
from steepest.loggers.outputs.brief import BriefLogger
from steepest.loggers.outputs.console import ConsoleLogger
from steepest.loggers.start_display import StartLines, StartSpinner, start_shown
from steepest.loggers.terminal import COLUMNS, Bars, Table
from steepest.progress import START, STEP

STEP_METRICS = {
    "critic/score/mean": 0.3125,
    "actor/reward_kl_penalty": 0.00217731,
    "actor/entropy": 1.5,
    "response_length/mean": 211.4,
    "response_length/clip_ratio": 0.25,
    "actor/pg_clipfrac": 0.031,
    "actor/grad_norm": 0.87654,
    "timing_s/step": 12.34,
    "perf/throughput": 5120.4,
    **{f"perf/more_{number}": 1.0 for number in range(80)},
}


def terminal(width: int = 100) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(force_terminal=True, width=width, file=stream, legacy_windows=False), stream


def plain(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")


def test_a_step_is_one_row_of_a_table() -> None:
    assert Table(120).lines(7, {**STEP_METRICS, "left": 754.0}) == [
        "  step    score       KL  entropy   length      cut     clip     grad   s/step     left",
        "     7   0.3125 0.002177      1.5      211      25%       3%   0.8765    12.34    12:34",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_row_fits_the_terminal_and_keeps_what_matters(width: int) -> None:
    heading, row = Table(width).lines(7, {**STEP_METRICS, "left": 754.0})
    assert len(heading) <= width and len(row) <= width
    assert {"step", "score", "left"} <= set(heading.split())


def test_the_heading_comes_again_after_twenty_rows_and_when_columns_change() -> None:
    table = Table(120)
    counts = [len(table.lines(step, STEP_METRICS)) for step in range(1, 42)]
    assert [step for step, count in enumerate(counts, 1) if count == 2] == [1, 21, 41]
    assert len(table.lines(42, {**STEP_METRICS, "left": 1.0})) == 2


def test_supervised_steps_and_validations_have_lines() -> None:
    table = Table(100)
    assert table.lines(50, {"train/loss": 1.25, "train/lr": 1e-5, "train/grad_norm": 2.0, "timing_s/step": 0.5}) == [
        "  step     loss     grad       lr   s/step",
        "    50     1.25        2    1e-05      0.5",
    ]
    assert table.lines(50, {"val/loss": 1.125, "val/num_target_tokens": 99.0}) == ["    50  validation: loss 1.125"]
    found = {"val/accuracy": 0.3125, "val-core/d/acc/mean@1": 0.3125, "val-aux/num_prompts": 1319.0,
             "val-aux/response_length/mean": 200.0, "timing_s/testing": 61.5}  # fmt: skip
    assert table.lines(10, found) == ["    10  validation: accuracy 0.3125, length 200, prompts 1,319, seconds 61.5"]


def test_every_metric_of_a_column_is_written_somewhere() -> None:
    source = "\n".join(path.read_text() for path in (Path(__file__).parents[2] / "steepest").rglob("*.py"))
    for column in COLUMNS:
        for name in column.metrics:
            stem = name.removesuffix("/mean").rpartition("/")[2]
            assert re.search(rf"\b{stem}\b", source), name


@pytest.mark.parametrize("kind", [ConsoleLogger, BriefLogger])
def test_on_a_terminal_both_loggers_write_the_table_and_a_bar(kind: type[ConsoleLogger]) -> None:
    console, stream = terminal()
    now = iter([100.0, 110.0, 120.0])
    logger = kind(LoggerContext(Path(), "p", "e", total_steps=5), console=console, clock=lambda: next(now))
    for step in (1, 2, 3):
        logger.log(step, STEP_METRICS)
    logger.close()
    text = plain(stream)
    assert re.search(r"^     3   0.3125 0.002177 +1.5 +211 +25% +3% +0.8765 +12.34 +0:2\d", text, re.MULTILINE)
    assert re.search(r"step 3/5 .*0:2\d left, 5,120 tokens/s", text)
    assert "perf/more_1" not in text


def test_a_generation_has_its_own_bar_which_goes_away() -> None:
    console, stream = terminal()
    bars = Bars(console, total=5, start=0)
    with STEP.activity("step"), STEP.activity("validation", 64), STEP.activity("gen", 256) as generating:
        generating.advance(100)
        bars.stand(0, "")
        assert [(t.description, t.completed, t.total, t.visible) for t in bars._progress.tasks] == [
            ("step", 0, 5, True), ("generating", 100, 256, True)
        ]  # fmt: skip
        assert bars._progress.tasks[1].fields["state"] == "validation" or bars._open[0].name == "step"
    assert not bars._progress.tasks[1].visible
    bars.close()
    assert STEP.listeners == []
    assert re.search(r"generating 100/256", plain(stream))


def test_lines_come_every_log_freq_steps_and_for_what_one_must_see() -> None:
    """The first step, the last, and validations."""
    for console in (None, terminal()[0]):
        stream = io.StringIO() if console is None else console.file
        context = LoggerContext(Path(), "p", "e", total_steps=23, start_step=2, log_freq=10)
        logger = ConsoleLogger(context, stream, console=console, clock=lambda: 0.0)
        for step in range(3, 24):
            logger.log(step, {"train/loss": 1.0, "timing_s/step": 1.0})
            if step == 15:
                logger.log(step, {"val/loss": 2.0})
        logger.close()
        pattern = r"^step:(\d+)" if console is None else r"^ +(\d+) "
        assert isinstance(stream, io.StringIO)
        steps = [int(found) for found in re.findall(pattern, plain(stream), re.MULTILINE)]
        assert list(dict.fromkeys(steps)) == [3, 10, 15, 20, 23]


def test_in_a_pipe_the_seconds_left_are_a_number_at_the_end() -> None:
    """What splits the line at ` - ` and its parts at the last colon reads it as any other number."""
    stream = io.StringIO()
    now = iter([100.0, 110.0, 120.0])
    logger = ConsoleLogger(LoggerContext(Path(), "p", "e", total_steps=3), stream, clock=lambda: next(now))
    for step in (1, 2, 3):
        logger.log(step, {"timing_s/step": 10.0, "actor/lr": 1e-6})
    lines = stream.getvalue().splitlines()
    assert lines == [
        "step:1 - actor/lr:1e-06 - timing_s/step:10 - eta_s:20",
        "step:2 - actor/lr:1e-06 - timing_s/step:10 - eta_s:10",
        "step:3 - actor/lr:1e-06 - timing_s/step:10",
    ]
    assert all(float(part.split(":")[1]) >= 0 for line in lines for part in line.split(" - "))


def test_a_start_in_a_pipe_is_a_line_for_each_long_part() -> None:
    lines: list[str] = []
    with START.heard_by(StartLines(lines.append)):
        with START.activity("reading the rows"):
            pass
        with START.activity("loading the models"), START.activity("the critic"):
            pass
    assert lines == ["reading the rows ...", "loading the models ..."]
    assert START.listeners == []


def test_a_start_on_a_terminal_is_a_spinner_with_what_is_done() -> None:
    console, stream = terminal()
    now = iter([0.0, 2.5, 3.0, 9.0])
    with START.heard_by(StartSpinner(console, clock=lambda: next(now))):
        with START.activity("reading the rows"):
            pass
        with START.activity("loading the models"):
            console.print("a note of the run")
    text = plain(stream)
    assert "reading the rows ..." in text
    assert "loading the models ...   (done: reading the rows 2.5 s)" in text
    assert "a note of the run" in text and "\x1b[?25h" in stream.getvalue()  # the cursor is shown again


def test_a_start_shown_in_a_pipe_writes_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with start_shown(io.StringIO()), START.activity("loading the models"):
        pass
    assert capsys.readouterr().out == "loading the models ...\n"
