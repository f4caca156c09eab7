"""The outputs in docs/doctor.md: `python -m tests.doctor.documents` runs the command and writes them anew.

Below `<!-- output: NAME -->` stands what `steepest doctor` printed on the install of that name. Paths of the machine
that wrote them are replaced; of a broken install only the lines that are not ok are shown.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from steepest.checks import Check, Group
from steepest.doctor.report import Report
from steepest.doctor.text import render
from tests.support.installs import INSTALLS, NEW_RELEASE, ROOT, Ran, doctor

PAGE = ROOT / "docs" / "doctor.md"
WRITTEN_WITH = "2.13.0+cpu"
"""The torch of the outputs in the page; with another one, numbers in the messages differ."""
CPU, NPU = "CPU", "stand-in NPU"
CARDS = ("device", "versions", "engines")
_WIDTH = 110
_BLOCK = r"(<!-- output: {} -->\n```text\n)(.*?)(```)"


def report_of(printed: Mapping[str, Any], names: Mapping[str, str]) -> Report:
    """The report that the command printed as JSON, with some words replaced."""

    def plain(text: str | None) -> str | None:
        for found, name in names.items():
            text = None if text is None else text.replace(found, name)
        return text

    groups = [
        Group(group["name"], [Check(**{key: plain(value) for key, value in line.items()}) for line in group["lines"]])
        for group in printed["groups"]
    ]
    return Report(printed["steepest"], printed["device"], printed["devices"], groups, printed["seconds"])


def faults_of(report: Report) -> Report:
    """What is not ok with devices, versions and engines. That a package is newer than the tested one is no fault of
    the install: it happens on every machine as soon as the package has a new release."""

    def is_fault(line: Check) -> bool:
        return line.status != "ok" and NEW_RELEASE not in line.text

    kept = [Group(g.name, [line for line in g.lines if is_fault(line)]) for g in report.groups if g.name in CARDS]
    return replace(report, groups=[group for group in kept if group.lines])


def text_of(report: Report) -> str:
    """As the page shows it."""
    return "".join(f"{text}\n" for text, _ in render(report, _WIDTH))


def documented(name: str) -> str:
    """The output that the page shows under this name."""
    found = re.search(_BLOCK.format(re.escape(name)), PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert found is not None, f"{PAGE} shows no output: {name}"
    return found[2]


def words(text: str) -> str:
    """An output without its line breaks and its verdict, which holds the time."""
    return " ".join(text.rpartition("\n\n")[0].split())


def look(name: str, folder: Path) -> Ran:
    """Run the command on the install of this name."""
    home, site = folder / "home", folder / "site"
    home.mkdir(parents=True)
    site.mkdir()
    if name == NPU:
        from tests.npu.__main__ import environment

        kept = {name: value for name, value in environment().items() if name in ("PYTHONPATH", "HOME")}
        return doctor(home, **kept)
    if name in INSTALLS:
        INSTALLS[name](site)
    return doctor(home, site)


def main() -> None:
    """Write every output of the page anew."""
    page = PAGE.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- output: (.*?) -->", page):
        with tempfile.TemporaryDirectory() as folder:
            ran = look(name, Path(folder))
            names = {
                os.path.join(folder, "home"): "/home/user/work",
                str(Path.home()): "/home/user",
                sys.executable: "/home/user/steepest/.venv/bin/python",
                platform.release(): "6.8",
            }
        report = report_of(ran.json, names)
        text = text_of(faults_of(report) if name in INSTALLS else report)
        page = re.sub(
            _BLOCK.format(re.escape(name)), lambda found, text=text: found[1] + text + found[3], page, flags=re.S
        )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
