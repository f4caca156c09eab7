"""scripts/card_check: what it brings along, what it reads from its runs, and the whole of it on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.card import TINY, Check, Sizes, environment_for, steps_row, told, unpacked
from bench.measure import BenchError, Measured

ROOT = Path(__file__).parents[2]


def check_in(folder: Path, **logs: str) -> Check:
    (folder / "logs").mkdir()
    for name, text in logs.items():
        (folder / "logs" / f"{name}.log").write_text(text)
    return Check("cpu", folder, TINY, {}, deadline=0.0)


def ended(code: int = 0, *, timed_out: bool = False) -> Measured:
    return Measured(code, timed_out, 0.0, 61.5, 0, 0, 1)


def test_what_is_missing_comes_from_the_wheels(tmp_path):
    with zipfile.ZipFile(tmp_path / "made-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made/__init__.py", "NUMBER = 7\n")
        wheel.writestr("single.py", "")
    folder = unpacked(tmp_path, tmp_path / "packages", ["made", "single"])
    assert (folder / "made" / "__init__.py").read_text() == "NUMBER = 7\n"
    with pytest.raises(
        BenchError, match="^not installed here: other, and .* has no wheel of it. Run scripts/card_check"
    ):
        unpacked(tmp_path, tmp_path / "packages", ["made", "other"])


def test_nothing_is_unpacked_where_nothing_is_missing(tmp_path):
    found = environment_for(tmp_path / "none", tmp_path / "packages")
    assert found["PYTHONPATH"] == str(ROOT) and not (tmp_path / "packages").exists()
    assert found["OMP_WAIT_POLICY"] is None  # the trainer sets waiting threads up itself


def write_metrics(folder: Path, seconds: list[float]) -> None:
    rows = [
        {"training/global_step": i, "perf/time_per_step": s, "perf/throughput/gen": 1000.0 / s,
         "perf/throughput/update": 500.0, "perf/mfu": 0.25, "perf/max_memory_gb": 10.0 + i}
        for i, s in enumerate(seconds, 1)
    ]  # fmt: skip
    folder.mkdir()
    lines = [json.dumps(row) for row in [*rows, {"step": 3, "val/accuracy": 0.5}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_runs_row_is_of_its_later_steps(tmp_path):
    check = check_in(tmp_path, ppo="", resume="")
    write_metrics(tmp_path / "ppo", [9.0, 4.0, 2.0])
    row = steps_row(check, "ppo", ended(), "ppo")
    assert row == {
        "part": "ppo", "result": "ok; 3 step(s)", "s in all": 61.5, "s a step": 3.0, "generated tokens/s": 375.0,
        "trained tokens/s": 500.0, "share of the limit": 0.25, "peak GiB": 13.0,
    }  # fmt: skip
    later = steps_row(check, "resume", ended(timed_out=True), "ppo", after=2)
    assert (later["result"], later["s a step"]) == ("out of time; 1 step(s)", 2.0)


def test_a_run_that_failed_says_its_last_line(tmp_path):
    check = check_in(tmp_path, grpo="some line\nerror: out of memory\n\n")
    row = steps_row(check, "grpo", ended(2), "grpo")
    assert (row["result"], row["s a step"]) == ("FAILED: error: out of memory", None)


def test_the_table():
    said = told({"device": "cuda: Card 9", "memory GiB": 139.03}, [{"part": "ppo", "peak GiB": 13.0}], Sizes())
    assert said == (
        "device cuda: Card 9, memory GiB 139\n\n| part | peak GiB |\n|---|---|\n| ppo | 13 |\n\n256 responses of 256 "
        "tokens a step, bfloat16, the built-in engine; the first step of a run is not in the figures of its steps, "
        "unless it is the only one."
    )


@pytest.mark.slow
def test_a_dry_run_on_the_cpu(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [
        "--device",
        "cpu",
        "--tiny",
        "--out",
        tmp_path / "out",
        "--json",
        tmp_path / "found.json",
        "--seconds",
        "900",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "card_check", *words], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["part"]: row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    results = {part: row["result"] for part, row in rows.items()}
    assert results.pop("tests/gpu").startswith("ok; 0 passed, ")  # they need a card
    assert results == {
        "inputs": "ok; model, tokenizer, rows", "ppo": "ok; 3 step(s)", "grpo": "ok; 2 step(s)",
        "resume": "ok; 1 step(s)",
    }  # fmt: skip
    assert "| resume | ok; 1 step(s) |" in done.stdout
