"""report.html is one file: what it holds, what it lets run, and that no text of a model becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from steepest.errors import SteepestError
from steepest.loggers.rows import read_rows
from steepest.report import write_report
from steepest.report.page import ASSETS
from tests.support.report_run import HOSTILE, make_run


class Elements(HTMLParser):
    """Every element of a page, and the text of each script by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: dict[str | None, str] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.inside = dict(attrs).get("id", "code")
            self.scripts[self.inside] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts[self.inside] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "a <b> run")
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Elements:
    return Elements((folder / "report.html").read_text(encoding="utf-8"))


def test_no_text_of_a_model_is_markup(folder, page):
    assert "<title>a &lt;b&gt; run: report of a run</title>" in (folder / "report.html").read_text(encoding="utf-8")
    assert sorted(page.scripts) == ["code", "data", "training", "validation"]
    assert page.names.count("script") == 4 and not {"img", "b", "i"} & set(page.names)


def test_the_page_holds_the_rows_of_the_files(folder, page):
    for name, file in (("training", "token_samples.jsonl"), ("validation", "samples.jsonl")):
        rows = [json.loads(line) for line in page.scripts[name].splitlines()]
        assert rows == list(read_rows(folder / file))
    shown = json.dumps([json.loads(line) for line in page.scripts["training"].splitlines()])
    assert all(json.dumps(text)[1:-1] in shown for text in HOSTILE)
    data = json.loads(page.scripts["data"])
    assert data["name"] == "a <b> run" and data["events"] == {"entropy_collapse": [[4, 5]]}
    assert data["left_out"] == {"training": 0, "validation": 0} and len(data["settings"]) == 7


def test_the_page_fetches_nothing_and_runs_only_its_own_scripts(page):
    policy = next(value for name, value in page.attributes if value and value.startswith("default-src"))
    digest = base64.b64encode(hashlib.sha256(page.scripts["code"].encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:")
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(link.startswith(("#", "data:")) for link in links) and len(links) > 5


def test_a_page_is_small_and_names_what_is_not_on_it(tmp_path):
    folder = make_run(tmp_path / "run")
    row = (folder / "token_samples.jsonl").read_text().splitlines()[0]
    with (folder / "token_samples.jsonl").open("w") as file:
        for step in range(2, 3000):
            file.write(row.replace('{"step": 2,', f'{{"step": {step},') + "\n")
    assert (folder / "token_samples.jsonl").stat().st_size > 4_000_000
    size = write_report(folder, tmp_path / "elsewhere" / "page.html").stat().st_size
    assert 1_500_000 < size < 5_000_000
    data = json.loads(Elements((tmp_path / "elsewhere" / "page.html").read_text()).scripts["data"])
    assert data["left_out"]["training"] > 1000


def test_a_reader_sees_a_whole_page(folder):
    reader = (folder / "report.html").open()
    before = reader.read(100)
    write_report(folder)
    assert before + reader.read() != "" and os.fstat(reader.fileno()).st_nlink == 0  # another file has its name
    assert [path.name for path in folder.iterdir() if "report" in path.name] == ["report.html"]
    reader.close()


def test_what_cannot_be_read_or_written_is_an_error(folder, tmp_path):
    with pytest.raises(SteepestError, match="is no run folder: it has no metrics.jsonl. Give the folder of a run."):
        write_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SteepestError, match="the report cannot be written"):
        write_report(folder, tmp_path / "file" / "page.html")


def test_the_command_writes_the_page(folder, tmp_path):
    words = [sys.executable, "-m", "steepest", "report", str(folder), "--to", str(tmp_path / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'page.html'}\n" and (tmp_path / "page.html").stat().st_size > 50_000


def test_the_copy_of_uplot_is_that_of_its_package():
    """Versions 1.6.32 of the npm package `uplot`: dist/uPlot.iife.min.js and dist/uPlot.min.css."""
    known = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    for name, digest in known.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest
    assert re.match(
        r"/\*! https://github.com/leeoniya/uPlot \(v1\.6\.32\) \*/", (ASSETS / "uPlot.iife.min.js").read_text()
    )
