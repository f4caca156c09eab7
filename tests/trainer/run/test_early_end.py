"""Runs that a signal or a reward ends early: what is saved, and that the same command goes on from there."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from steepest.config.load import load_config, load_sft_config
from steepest.errors import RewardError
from steepest.learner.checkpoint import CheckpointStore
from steepest.loggers.rows import read_rows
from steepest.process.stopping import STOP, Stopped
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.jobs.sft import run_sft
from tests.support.toy_run import make_toy, toy_overrides
from tests.trainer.run.test_resume import STATEFUL, metrics, weights

WORDS = (*STATEFUL, "trainer.total_training_steps=4", "trainer.save_freq=-1")

REWARD = """
import os, signal
from pathlib import Path

FLAG = Path(__file__).parent / "flag"

def digit(data_source, solution_str, ground_truth, extra_info):
    if FLAG.exists():
        if FLAG.read_text() == "fail":
            raise RuntimeError("no answer")
        FLAG.unlink()
        for process in (os.getpid(), os.getppid()):  # as a scheduler does, which signals every process of a job
            os.kill(process, signal.SIGTERM)
    return float(solution_str.strip() == ground_truth)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    toy["reward"].write_text(REWARD)
    return toy


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_ppo(load_config(toy_overrides(toy, folder, *WORDS)))
    assert CheckpointStore(folder).steps() == [4]
    return folder


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    while STOP.requested is None:  # the thread that reads signals
        time.sleep(0.001)


def go_on(toy, folder, whole) -> None:
    """The same command again: weights and metrics are those of a run that nothing stopped."""
    run_ppo(load_config(toy_overrides(toy, folder, *WORDS)))
    assert weights(folder, 4) == weights(whole, 4)
    assert metrics(folder) == metrics(whole)


def test_a_signal_in_a_step_has_the_step_saved(toy, whole, tmp_path):
    folder = tmp_path / "run"
    act = lambda step, found: terminate() if step == 3 else None  # noqa: E731
    with pytest.raises(Stopped) as caught, STOP.watch():
        run_ppo(load_config(toy_overrides(toy, folder, *WORDS)), observers=[act])
    assert (caught.value.exit_code, caught.value.note) == (143, "Step 3 is saved; the same command resumes from it.")
    assert CheckpointStore(folder).steps() == [3]
    go_on(toy, folder, whole)


@pytest.mark.parametrize(("after", "saved"), [(0, None), (1, 2), (2, 2)])
def test_a_signal_that_reaches_the_workers_too_ends_neither_them_nor_the_step(toy, whole, tmp_path, after, saved):
    """It comes while responses are scored: of the first validation, of step 2, of step 3."""
    folder, flag = tmp_path / "run", toy["reward"].parent / "flag"
    scored = []

    def act(step, found):
        scored.append(found.metrics["reward/error_rate"])
        if step == after:
            flag.write_text("signal")

    if after == 0:
        flag.write_text("signal")
    with pytest.raises(Stopped) as caught, STOP.watch():
        run_ppo(load_config(toy_overrides(toy, folder, *WORDS)), observers=[act])
    assert caught.value.exit_code == 143 and set(scored) <= {0.0}
    assert CheckpointStore(folder).steps() == ([] if saved is None else [saved])
    go_on(toy, folder, whole)


def test_a_reward_that_fails_leaves_the_steps_before_it(toy, whole, tmp_path, capsys):
    folder, flag = tmp_path / "run", toy["reward"].parent / "flag"
    act = lambda step, found: flag.write_text("fail") if step == 1 else None  # noqa: E731
    try:
        with pytest.raises(RewardError, match="no answer"):
            run_ppo(load_config(toy_overrides(toy, folder, *WORDS)), observers=[act])
    finally:
        flag.unlink()
    assert "the run ends early. Step 1 is saved; the same command resumes from it." in capsys.readouterr().out
    go_on(toy, folder, whole)


def test_supervised_training_is_saved_at_its_end_and_owes_no_validation(toy, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i % 10}", "response": str(i % 10)}) + "\n" for i in range(20)))
    words = [
        f"data.train_files={rows}", f"data.val_files={rows}", "data.train_batch_size=5", "data.max_length=32",
        f"model.path={toy['model']}", "trainer.total_training_steps=4", "trainer.test_freq=2", "trainer.device=cpu",
        "trainer.logger=jsonl", f"trainer.default_local_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    folder = tmp_path / "run"
    first = run_sft(load_sft_config([*words, "trainer.save_freq=2"]))
    assert CheckpointStore(folder).steps() == [2, 4]
    before = metrics(folder)
    for cut, kept in ((4, [2, 4]), (2, [2])):  # killed before the last validation, and before the one in the middle
        lines = [row for row in read_rows(folder / "metrics.jsonl")]
        rewrite(
            folder / "metrics.jsonl",
            [r for r in lines if r["step"] <= cut and ("val/loss" not in r or r["step"] < cut)],
        )
        for step in {2, 4} - set(kept):
            os.rename(folder / f"global_step_{step}", tmp_path / "gone")
        (folder / "best.json").unlink()
        again = run_sft(load_sft_config([*words, "trainer.save_freq=2"]))
        assert again.history == first.history and metrics(folder) == before
        assert cut in CheckpointStore(folder).scores()
    capsys.readouterr()
    assert run_sft(load_sft_config(words)).history == first.history
    assert "the run is finished: it stands at step 4" in capsys.readouterr().out


def rewrite(path, rows) -> None:
    from steepest.loggers.rows import dumps

    path.write_text("".join(dumps(row) + "\n" for row in rows))
