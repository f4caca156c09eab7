"""When a running job writes its report, and that it is never the report that ends the job."""

from __future__ import annotations

import pytest

from steepest.report.live import LiveReport
from tests.support.report_run import make_run


class Clock:
    """Stands still but for the seconds that each call adds."""

    def __init__(self) -> None:
        self.now, self.each = 0.0, 0.0

    def __call__(self) -> float:
        self.now += self.each
        return self.now


def written(report: LiveReport) -> bool:
    """Whether the page was written since the last call."""
    page = report.folder / "report.html"
    found = page.exists()
    page.unlink(missing_ok=True)
    return found


@pytest.fixture
def folder(tmp_path):
    return make_run(tmp_path / "run", steps=3)


def test_it_is_written_after_the_first_step_every_so_many_and_the_last(folder):
    report = LiveReport(folder, 10, 25, Clock())
    assert [step for step in range(26) if report.is_due(step)] == [0, 1, 10, 20, 25]
    found = []
    for step in range(26):
        report.after(step)
        found += [step] if written(report) else []
    assert found == [0, 1, 10, 20, 25]
    report.close()  # a run that ends early ends at any step
    assert written(report)


def test_with_0_there_is_none(folder):
    report = LiveReport(folder, 0, 25)
    report.after(0)
    report.after(25)
    report.close()
    assert not written(report) and not any(report.is_due(step) for step in range(26))


def test_a_slow_one_is_left_out_until_it_takes_one_percent_of_the_time(folder):
    clock = Clock()
    report = LiveReport(folder, 1, 100, clock)
    clock.each = 2.0  # one writing calls the clock twice, so that it takes 2 seconds
    report.after(1)
    clock.each = 0.0
    assert written(report) and clock.now == 6.0
    for now, expected in ((7.0, False), (205.9, False), (206.0, True)):  # 200 seconds after it ended
        clock.now = now
        report.after(2)
        assert written(report) is expected
    clock.now = 207.0
    report.close()
    assert written(report)


def test_a_report_that_cannot_be_written_is_told_once_and_ends_nothing(folder, capsys):
    (folder / "config.yaml").write_text("a: [")
    report = LiveReport(folder, 1, 9, Clock())
    report.after(1)
    report.after(2)
    report.close()
    said = capsys.readouterr().out
    assert said.count("warning: the report of the run could not be written (SteepestError: ") == 1
    assert said.endswith("The run goes on without it.\n") and not written(report)
