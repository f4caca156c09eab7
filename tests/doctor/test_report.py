"""The report's form as text and JSON, and the process that asks the devices when it dies or hangs."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from steepest.checks import Check, Group, ok, problem, warning
from steepest.doctor.probe_client import Probe
from steepest.doctor.report import Report, group
from steepest.doctor.text import render, show
from tests.support.processes import gone_within

LINES = [
    ok("good", "all is well"),
    warning("odd", "a word too many " * 12, "leave some out, " * 9),
    problem("a name that is longer than its column", "[bold]/a/path/that/is/long" + "/deep" * 20, "pip install x"),
]


def report(*lines: Check) -> Report:
    return Report("1.2.3", "cpu", {}, [Group("first", list(lines[:1])), Group("second", list(lines[1:]))], 1.26)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_lines_fit_the_width_and_no_word_is_lost(width: int) -> None:
    rows = [text for text, _ in render(report(*LINES), width)]
    assert all(len(row) <= width or "/deep/deep" in row for row in rows)
    words = " ".join(rows).split()
    for line in LINES:
        assert f"{line.text} {line.remedy or ''}".split()[0] in words
    assert words.count("word") == 12 and words.count("leave") == 9
    assert rows[-1].endswith("1 problem, 1 warning, 1.3 s.") or "1 problem, 1 warning, 1.3 s." in " ".join(rows[-2:])


def test_the_form_of_a_line() -> None:
    rows = [text for text, _ in render(report(ok("good", "all is well"), warning("odd", "one", "two")), 80)]
    assert rows == [
        "steepest 1.2.3 doctor",
        "",
        "first",
        "  ok       good                 all is well",
        "",
        "second",
        "  warning  odd                  one",
        "                                -> two",
        "",
        "no problems, 1 warning, 1.3 s. Runs can start here.",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    coloured, plain, pipe = Terminal(), Terminal(), io.StringIO()
    show(report(*LINES), coloured)
    assert "\x1b[1;31m" in coloured.getvalue() and "[bold]/a/path" in coloured.getvalue()
    show(report(*LINES), pipe)
    monkeypatch.setenv("NO_COLOR", "1")
    show(report(*LINES), plain)
    assert plain.getvalue() == pipe.getvalue() and "\x1b" not in plain.getvalue()
    bare = coloured.getvalue()
    for code in ("\x1b[0m", "\x1b[1m", "\x1b[33m", "\x1b[1;31m"):
        bare = bare.replace(code, "")
    assert bare == plain.getvalue()


def test_what_the_terminal_cannot_write_is_escaped() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    show(report(ok("folder", "/home/b\u00fccher")), out)
    out.flush()
    assert b"/home/b\\xfccher" in raw.getvalue()


def test_status_is_the_worst_and_warnings_do_not_fail() -> None:
    assert (report().status, report().exit_code) == ("ok", 0)
    assert (report(*LINES[:2]).status, report(*LINES[:2]).exit_code) == ("warning", 0)
    assert (report(*LINES).status, report(*LINES).exit_code) == ("problem", 1)
    assert report(*LINES).as_json()["counts"] == {"ok": 1, "warning": 1, "problem": 1}
    assert report(*LINES).as_json()["seconds"] == 1.26


def test_a_part_that_fails_is_a_line() -> None:
    def broken() -> list[Check]:
        raise KeyError("x")

    found = group("g", broken, lambda: [LINES[0]])
    assert found.lines[0].status == "problem" and found.lines[1] == LINES[0]
    assert found.lines[0].name == "broken" and found.lines[0].text == "this part of the report failed: KeyError: 'x'"


def probe(code: str) -> Probe:
    return Probe([sys.executable, "-c", f"import os, sys, time\n{code}"])


BEGUN = 'print(\'{"begin": "torch"}\\n{"stage": "torch", "threads": 2}\\n{"begin": "card"}\', flush=True)\n'


def test_a_probe_that_hangs_is_ended_and_what_it_said_is_kept(tmp_path: Path) -> None:
    hang = f"child = subprocess.Popen(['sleep', '3600'])\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    answers = probe(f"import subprocess\n{BEGUN}{hang}child.wait()").answers(time_limit=3)
    assert (answers.died, answers.died_at) == ("no answer within 3 s", "card")
    assert gone_within([int((tmp_path / "pid").read_text())], 60)  # the sleeping child holds the pipe, and is ended too
    assert answers.torch == {"threads": 2} and answers.devices == {}


def test_a_probe_that_dies_says_how() -> None:
    answers = probe(f"{BEGUN}print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)").answers()
    assert str(answers.died).startswith("the process that asked ended with signal 11") and answers.died_at == "card"
    assert str(answers.died).endswith("(last words)")
    answers = probe("print('{\"begin\": \"torch\"}'); print('half a li'); sys.exit(3)").answers()
    assert answers.died == "the process that asked ended with exit code 3"
    assert answers.torch == {"error": answers.died} and answers.choice == {}


def test_what_a_probe_finds_by_kind() -> None:
    said = '{"stage": "card checks", "versions": [{"name": "v"}], "setup": []}'
    answers = probe(f"print('''{said}''')").answers()
    assert answers.died is None and answers.devices == {}
    assert answers.checks("versions") == [{"name": "v"}] and answers.checks("setup") == []
