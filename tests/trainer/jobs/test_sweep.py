"""Sweeps: what is run, what is run again after a stop, and what the table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from steepest.__main__ import app
from steepest.errors import ConfigError
from steepest.loggers.rows import RowFile
from steepest.trainer.jobs.sweep import Outcome, plan, run_command, run_sweep, seeds_of, table
from tests.support.toy_run import make_toy, toy_overrides

WORDS = ["--config-name", "grpo", "data.train_files=[a.parquet,b.parquet]", "actor.lr=1e-6,3e-6", "trainer.n=2"]


def test_the_plan_is_every_setting_by_every_seed(tmp_path):
    runs = plan(WORDS, [0, 7], tmp_path)
    assert [(run.setting, run.seed, run.name) for run in runs] == [
        ("lr=1e-6", 0, "lr=1e-6_seed=0"),
        ("lr=1e-6", 7, "lr=1e-6_seed=7"),
        ("lr=3e-6", 0, "lr=3e-6_seed=0"),
        ("lr=3e-6", 7, "lr=3e-6_seed=7"),
    ]
    assert runs[3].words == (
        "--config-name", "grpo", "data.train_files=[a.parquet,b.parquet]", "actor.lr=3e-6", "trainer.n=2",
        "data.seed=7", "actor_rollout_ref.rollout.seed=7", f"trainer.default_local_dir={tmp_path}/lr=3e-6_seed=7",
    )  # fmt: skip
    assert [run.name for run in plan(["a=1"], [3], tmp_path)] == ["seed=3"]
    assert len(plan(["a=1,2", "b=x,y,z"], [0, 1], tmp_path)) == 12
    lists = plan(["a=[1,2],[3]", "b='x,y',z", "c=range(1,3)", "d={e: 1, f: 2}"], [0], tmp_path)
    assert [run.words[:3] for run in lists[::2]] == [
        ("a=[1,2]", "b='x,y'", "c=1"), ("a=[1,2]", "b=z", "c=1"), ("a=[3]", "b='x,y'", "c=1"), ("a=[3]", "b=z", "c=1"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "seeds", "message"),
    [
        (["data.seed=1"], [0], "data.seed: the sweep sets it for each run"),
        (["trainer.default_local_dir=x"], [0], "Use --seeds, or --folder"),
        (["a=1"], [0, 0], "--seeds 0,0: a seed is given twice"),
        (["a=interval(1,4)"], [0], r"a=interval\(1,4\): an interval is no list of values. Write them out: a=1,2,4."),
        (["x.lr=1,2", "y.lr=1,2"], [0], None),
    ],
)
def test_what_cannot_be_planned(tmp_path, words, seeds, message):
    if message is None:
        assert [run.setting for run in plan(words, seeds, tmp_path)][1] == "lr=1 lr=2"
        return
    with pytest.raises(ConfigError, match=message):
        plan(words, seeds, tmp_path)


def test_seeds():
    assert seeds_of("3,1") == [3, 1]
    with pytest.raises(ConfigError, match="--seeds 1-3: expected whole numbers"):
        seeds_of("1-3")


def test_what_has_ended_well_is_not_run_again(tmp_path):
    calls: list[str] = []

    def execute(words: list[str], log: Path) -> int:
        folder = Path(words[-1].partition("=")[2])
        calls.append(folder.name)
        folder.mkdir(exist_ok=True)
        with_rows = RowFile(folder / "metrics.jsonl")
        for step, score in enumerate((0.1, 0.5, 0.4)):
            with_rows.write({"step": step, "val/accuracy": score})
        with_rows.close()
        return 2 if folder.name == "lr=2_seed=0" and len(calls) < 4 else 0

    found = run_sweep(plan(["x.lr=1,2"], [0, 1], tmp_path), tmp_path, execute)
    assert calls == ["lr=1_seed=0", "lr=1_seed=1", "lr=2_seed=0", "lr=2_seed=1"]
    assert [one.exit_code for one in found] == [0, 0, 2, 0] and (found[0].best, found[0].last) == (0.5, 0.4)
    again = run_sweep(plan(["x.lr=1,2"], [0, 1], tmp_path), tmp_path, execute)
    assert calls[4:] == ["lr=2_seed=0"] and [one.exit_code for one in again] == [0] * 4
    more = run_sweep(plan(["x.lr=1,2"], [0, 1, 2], tmp_path), tmp_path, execute)
    assert calls[5:] == ["lr=1_seed=2", "lr=2_seed=2"] and len(more) == 6
    run_sweep(plan(["x.lr=1,2", "y=3"], [0], tmp_path), tmp_path, execute)
    assert len(calls) == 9, "with another key every run is another one"
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ConfigError, match="sweep.json cannot be read"):
        run_sweep(plan(["x.lr=1,2"], [0], tmp_path), tmp_path, execute)


def test_the_table_by_hand():
    """Three seeds at 0.5, 0.6, 0.7: mean 0.6, standard deviation 0.1, t 4.303, so +- 0.2484."""
    rows = [Outcome("lr=1", seed, [], 0, 0.1, 0.7, 0.5 + seed / 10) for seed in range(3)]
    rows.append(Outcome("lr=2", 0, [], 2))
    assert table(rows).splitlines() == [
        "setting  seeds  first                   best                    last",
        "lr=1         3  0.1000 ± 0.0000         0.7000 ± 0.0000         0.6000 ± 0.2484",
        "lr=2         1  -                       -                       -",
        "failed: lr=2 seed=0, exit code 2; its .log file says why. The same command tries again.",
    ]


def test_the_command_reads_the_record(tmp_path):
    """With all runs in the record nothing is run, and an exit code that is not 0 is the command's own."""
    job = ["data.train_files=a.parquet", "data.val_files=a.parquet", "actor_rollout_ref.model.path=m"]
    words = [f"--folder={tmp_path}", "--seeds=0", *job]
    (planned,) = plan(job, [0], tmp_path)
    record = [vars(Outcome("", 0, list(planned.words), 0, 0.1, 0.3, 0.2))]
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    done = CliRunner().invoke(app, ["sweep", "--json", *words])
    assert done.exit_code == 0 and json.loads(done.stdout) == record
    assert "0.3000" in CliRunner().invoke(app, ["sweep", *words]).stdout
    assert CliRunner().invoke(app, ["sweep", "--seeds=0,0", *job]).exit_code == 2
    refused = CliRunner().invoke(app, ["sweep", *words, "actor_rollout_ref.actor.optim.rl=1e-6,3e-6"])
    assert refused.exit_code == 2 and "optim.rl" in refused.stderr and not (tmp_path / "rl=1e-6_seed=0.log").exists()


@pytest.mark.slow
def test_real_runs(tmp_path):
    words = [
        word
        for word in toy_overrides(make_toy(tmp_path / "toy", num_rows=128), tmp_path / "unused")
        if not word.startswith("trainer.default_local_dir")
    ]
    words += ["trainer.total_training_steps=1,2", "trainer.test_freq=1"]
    found = run_sweep(plan(words, [0, 1], tmp_path / "sweep"), tmp_path / "sweep", run_command)
    assert [(one.setting, one.exit_code) for one in found] == [
        ("total_training_steps=1", 0), ("total_training_steps=1", 0), ("total_training_steps=2", 0),
        ("total_training_steps=2", 0),
    ]  # fmt: skip
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [one["last"] for one in record] == [one.last for one in found] and None not in [one.first for one in found]
