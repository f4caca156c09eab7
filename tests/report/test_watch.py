"""The terminal view of a run folder: what it shows, and that it follows files that grow."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from steepest.__main__ import app
from steepest.errors import SteepestError
from steepest.loggers.rows import RowFile
from steepest.report.watch import Watcher, spark
from tests.support.report_run import make_run


def shown(watcher: Watcher, width: int = 100, now: float = 1030.0) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(watcher.screen(width, now))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_curves_health_and_answers(tmp_path):
    lines = shown(Watcher(make_run(tmp_path / "run", steps=12)))
    assert lines[0] == f"step 12   0:23 of training, the last row 0:05 ago   {tmp_path}/run"[:99] + "…"
    assert lines[2].split() == ["validation", "0.5", "▁▁▁▁", "0.5", "to", "0.5"]
    assert lines[3].split() == ["score", "1", "▁▂▂▃▄▄▅▅▆▇▇█", "0.0833", "to", "1"]
    assert lines[4].split()[:2] == ["entropy", "0.08333"] and lines[4].split()[-3:] == ["0.0833", "to", "1"]
    assert "█ ▃" in lines[4], "the step whose entropy is NaN is a blank"
    assert lines[-8:-4] == ["health", "  entropy_collapse: steps 4 to 5", "", "answers of step 12"]
    assert [line for line in lines if "\x1b" in line or "\u202e" in line] == []


def test_a_run_that_goes_on_is_read_again(tmp_path):
    watcher = Watcher(make_run(tmp_path / "run", steps=3))
    assert "step 3 " in shown(watcher)[0]
    file = RowFile(tmp_path / "run" / "metrics.jsonl")
    file.write({"step": 4, "time": 1008.0, "critic/score/mean": 0.5, "health/nan": 1.0})
    file.close()
    lines = shown(watcher)
    assert "step 4 " in lines[0] and "  nan: steps 4   (now)" in lines


def test_a_narrow_terminal_has_every_line_on_one_row(tmp_path):
    folder = make_run(tmp_path / "r")
    assert all(len(line) <= 50 for line in shown(Watcher(folder), width=50))
    assert len(shown(Watcher(folder), width=50)) == len(shown(Watcher(folder), width=200))


def test_more_steps_than_characters_are_means():
    assert spark([0.0, 0.0, 1.0, 1.0, 2.0, 4.0], 3) == "▁▃█"
    assert spark([float("nan"), 1.0], 2) == " ▁" and spark([float("inf")], 4) == " "


def test_the_command_prints_once_into_a_pipe(tmp_path):
    done = CliRunner().invoke(app, ["watch", str(make_run(tmp_path / "run"))])
    assert done.exit_code == 0 and "answers of step 12" in done.stdout
    with pytest.raises(SteepestError, match="metrics.jsonl"):
        Watcher(tmp_path).screen(80, 0.0)
