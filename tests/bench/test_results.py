"""Comparisons, their line for scripts, the page that is made of them, and watching a process tree."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest

from bench import table
from bench.compare import Comparison, markdown, parse_line, write_results
from bench.measure import BenchError, run_measured
from bench.workload import gold, read_questions, rule_reward, write_questions
from tests.support.processes import gone_within

SPEED = Comparison(
    "rollout_vs_vllm", "tokens/s", ours=(300.0, 330.0, 310.0), peer=(200.0, 210.0, 190.0), limit_share=0.5
)
TIME = Comparison("ppo_w1_vs_trl", "s", ours=(40.0,), peer=(90.0, 100.0), limit_share=0.625)


def test_a_ratio_says_how_many_times_faster_ours_is():
    assert SPEED.line() == "bench: rollout_vs_vllm ours=310 peer=200 ratio=1.55 limit_share=0.5"
    assert TIME.line() == "bench: ppo_w1_vs_trl ours=40 peer=95 ratio=2.38 limit_share=0.625"
    assert SPEED.spread == pytest.approx((300 / 210, 330 / 190))
    assert TIME.spread == pytest.approx((90 / 40, 100 / 40))


def test_the_line_can_be_read_again_and_nothing_else_can():
    assert parse_line(TIME.line() + "\n") == {
        "name": "ppo_w1_vs_trl", "ours": 40.0, "peer": 95.0, "ratio": 2.38, "limit_share": 0.625,
    }  # fmt: skip
    for text in ("bench: a ours=1 peer=2 ratio=2", "x bench: a ours=1 peer=2 ratio=2 limit_share=1", ""):
        with pytest.raises(ValueError, match="not a bench line"):
            parse_line(text)


def test_a_table_has_every_column_once_and_dashes_for_what_is_missing():
    rows = [{"a": 1234.5, "b": "x|y"}, {"a": 0.12345, "c": None}]
    assert markdown(rows).splitlines() == [
        "| a | b | c |", "|---|---|---|", "| 1,234 | x\\|y | - |", "| 0.123 | - | - |",
    ]  # fmt: skip


def results(folder: Path, processor: str = "P") -> None:
    machine = {"processor": processor, "cores": 2, "torch": "2", "date": "2026-01-02"}
    write_results(
        folder, "grpo", machine=machine, about={"rounds": 1}, comparisons=[TIME], tables={"grpo": [{"s a step": 40.0}]}
    )
    write_results(folder, "threads", machine={**machine, "processor": "P"}, about={}, text="no table")


def test_the_page_is_made_of_the_results_and_keeps_what_has_none(tmp_path: Path):
    results(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- bench:grpo -->\nold\n<!-- /bench:grpo -->\nbetween\n"
        "<!-- bench:ppo -->\nkept\n<!-- /bench:ppo -->\n"
        "<!-- bench:comparisons -->\n<!-- /bench:comparisons -->\n<!-- bench:threads -->\n<!-- /bench:threads -->\n"
    )
    filled, missing = table.fill(page.read_text(), table.blocks(table.read_results(tmp_path)))
    assert missing == ["ppo"]
    assert "old" not in filled and "before\n" in filled and "between\n" in filled and "kept" in filled
    assert "| s a step |\n|---|\n| 40 |\n\nrounds: 1; measured 2026-01-02.\n<!-- /bench:grpo -->" in filled
    assert "| ppo_w1_vs_trl | s | 40 | 95 | 2.38 | 2.25 to 2.50 | 0.625 |" in filled
    assert TIME.line() in filled and "```text\nno table\n```\n<!-- /bench:threads -->" in filled
    again, _ = table.fill(filled, table.blocks(table.read_results(tmp_path)))
    assert again == filled


def test_results_of_two_machines_make_no_page(tmp_path: Path):
    results(tmp_path, processor="Q")
    with pytest.raises(BenchError, match=r"different machines or versions \(processor: Q and P\)"):
        table.blocks(table.read_results(tmp_path))
    with pytest.raises(BenchError, match="no results in"):
        table.read_results(tmp_path / "none")


def test_every_block_of_the_page_has_a_benchmark():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    known = {"machine", "comparisons", "limits", "rollout", "ppo", "grpo", "scaling", "memory_head", "memory_step",
             "startup", "overhead", "threads"}  # fmt: skip
    assert {found[2] for found in table._BLOCK.finditer(page)} == known


def test_watching_a_tree_sees_children_memory_and_time(tmp_path: Path):
    # so long that a sample falls into the child's work however late it is taken
    child = "import time; x = bytearray(80 << 20)\nwhile time.process_time() < 1.5: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    start, used = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    seen = run_measured([sys.executable, "-c", parent], log=tmp_path / "log", interval=0.05)
    assert (seen.returncode, seen.timed_out, seen.processes) == (0, False, 2)
    assert (tmp_path / "log").read_text() == "done\n"
    assert 80 << 20 < seen.peak_pss < 160 << 20
    own, others = seen.cpu_between(start, time.time())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = 4 / os.sysconf("SC_CLK_TCK")  # two processes, each with two numbers in whole ticks
    assert 0.05 < own < after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime + ticks and others >= 0


def test_a_run_that_takes_too_long_is_ended_with_its_children(tmp_path: Path):
    code = "import subprocess; child = subprocess.Popen(['sleep', '3600']); print(child.pid, flush=True); child.wait()"
    seen = run_measured([sys.executable, "-c", code], log=tmp_path / "log", timeout=5, interval=0.05)
    assert seen.timed_out and seen.returncode != 0
    assert gone_within([int((tmp_path / "log").read_text())], 60)


def test_questions_come_from_gsm8ks_own_file_and_from_prepare(tmp_path: Path):
    from bench.inputs import write_prompts

    rows = [{"question": f"q{i}", "answer": f"so\n#### 1,00{i}"} for i in range(3)]
    write_questions(tmp_path / "train.jsonl", rows)
    assert read_questions(tmp_path, 2) == rows[:2]
    write_prompts(tmp_path / "other" / "train.parquet", rows)
    assert read_questions(tmp_path / "other", 3) == rows
    with pytest.raises(BenchError, match="has 3 rows, and this benchmark needs 4"):
        read_questions(tmp_path / "train.jsonl", 4)
    with pytest.raises(BenchError, match=r"no GSM8K rows at .*nowhere"):
        read_questions(tmp_path / "nowhere", 1)
    assert (gold(rows[1]["answer"]), rule_reward("#### 5 or #### 1,001", "1001"), rule_reward("1001", "1001")) == (
        "1001", 1.0, 0.0,
    )  # fmt: skip
    assert json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0]) == rows[0]
