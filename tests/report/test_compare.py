"""The page of several runs: their names, what it holds of each, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from steepest.errors import SteepestError
from steepest.loggers.rows import read_rows
from steepest.report.compare import names_of, write_comparison
from tests.support.report_run import CONFIG, make_run


def script(page: str, name: str) -> str:
    return re.search(rf'<script id="{name}" type="[\w/-]+">(.*?)</script>', page, flags=re.S)[1]


def test_runs_have_the_shortest_names_that_tell_them_apart():
    assert names_of([Path("/a/ppo"), Path("/a/grpo")]) == ["ppo", "grpo"]
    assert names_of([Path("/a/x/ppo"), Path("/b/y/ppo"), Path("/b/grpo")]) == ["x/ppo", "y/ppo", "b/grpo"]
    assert names_of([Path("/a/x/ppo"), Path("/b/x/ppo")]) == ["a/x/ppo", "b/x/ppo"]
    with pytest.raises(SteepestError, match="a run folder is given twice"):
        names_of([Path("/a/ppo"), Path("/a/ppo")])


def test_the_page_holds_columns_settings_and_answers_of_each_run(tmp_path):
    runs = [make_run(tmp_path / "a", steps=12), make_run(tmp_path / "b", steps=6, config=CONFIG.replace("32", "64"))]
    page = write_comparison(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    data = json.loads(script(page, "data"))
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert [run["settings"]["data.train_batch_size"] for run in data["runs"]] == ["32", "64"]
    assert [len(run["metrics"]["critic/score/mean"]) for run in data["runs"]] == [12, 6]
    for place, run in enumerate(runs):
        rows = [json.loads(line) for line in script(page, f"validation-{place}").splitlines()]
        assert rows == list(read_rows(run / "samples.jsonl"))
    assert page.count("</script>") == 4  # three of data, one that runs


def test_a_page_of_six_long_runs_is_small(tmp_path):
    runs = [make_run(tmp_path / str(number), steps=3) for number in range(6)]
    row = json.dumps({f"metric/{number}": 0.123456789 for number in range(100)})
    for run in runs:
        lines = (row.replace("{", f'{{"step": {step}, ', 1) + "\n" for step in range(1, 330))
        (run / "metrics.jsonl").write_text("".join(lines))
        line = json.dumps({"step": 1, "split": "val", "id": "a", "response": "x" * 9000})
        lines = (line.replace('{"step": 1', f'{{"step": {step}') + "\n" for step in range(1, 100))
        (run / "samples.jsonl").write_text("".join(lines))
    assert 2_000_000 < write_comparison(runs, tmp_path / "all.html").stat().st_size < 5_000_000


def test_what_cannot_be_compared_is_an_error(tmp_path):
    run = make_run(tmp_path / "a", steps=3)
    with pytest.raises(SteepestError, match=re.escape("1 run(s) to compare. Give 2 to 6 run folders.")):
        write_comparison([run], tmp_path / "page.html")
    with pytest.raises(SteepestError, match="7 run"):
        write_comparison([tmp_path / str(number) for number in range(7)], tmp_path / "page.html")
    with pytest.raises(SteepestError, match="is no run folder"):
        write_comparison([run, tmp_path], tmp_path / "page.html")
