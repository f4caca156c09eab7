"""Scores of validations belong to the weights they were measured on, also in a run that went back a few steps."""

from __future__ import annotations

import shutil

import pytest

from steepest.config.load import load_config
from steepest.learner.checkpoint import CheckpointStore
from steepest.loggers.jsonl import read_metrics
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

SMALL = ("data.train_batch_size=32", "actor_rollout_ref.actor.ppo_mini_batch_size=32", "trainer.test_freq=1")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """(toy, folder of a run of three steps with all its checkpoints)."""
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    folder = tmp_path_factory.mktemp("earlier") / "run"
    run_ppo(load_config(toy_overrides(toy, folder, *SMALL, "trainer.total_training_steps=3", "trainer.save_freq=1")))
    return toy, folder


def test_a_run_that_went_back_gives_no_score_to_folders_of_before(earlier, tmp_path):
    toy, source = earlier
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    store = CheckpointStore(folder)
    for step, score in ((1, 0.0), (2, 0.5), (3, 0.75)):
        store.mark_best(step, score)
    # back to step 1, on another way, saving the third step only: global_step_2 stays what it was
    result = run_ppo(load_config(toy_overrides(
        toy, folder, *SMALL, "trainer.total_training_steps=3", "trainer.save_freq=3",
        "actor_rollout_ref.actor.optim.lr=0.1", "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={folder}/global_step_1",
    )))  # fmt: skip
    assert set(result.history) == {0, 1, 2, 3}
    scores = CheckpointStore(folder).scores()
    assert scores[2] == 0.5  # measured on the weights that lie there, not this run's step 2
    assert scores[3] == result.history[3] != 0.75  # saved again and measured again


def test_val_only_scores_the_newest_checkpoint_and_trains_nothing(earlier, tmp_path, capsys):
    toy, source = earlier
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    known = run_ppo(load_config(toy_overrides(toy, folder, *SMALL, "trainer.val_only=True"))).history
    assert "resuming from step 3" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in folder.rglob("*.safetensors")} == before
    # the same weights, the same prompts, greedy: the score that the run itself had found
    rows = CheckpointStore(source).scores()
    assert known[3] == rows[3]


def test_a_checkpoint_from_elsewhere_does_not_go_on_in_another_runs_records(earlier, tmp_path, capsys):
    """The folder holds a run of its own. Its curve must not become the first half of this one."""
    toy, source = earlier
    folder = tmp_path / "run"
    other = (*SMALL, "trainer.total_training_steps=3", "actor_rollout_ref.rollout.seed=9")
    run_ppo(load_config(toy_overrides(toy, folder, *other)))
    before = (folder / "metrics.jsonl").read_bytes()
    words = (*SMALL, "trainer.total_training_steps=3", "trainer.save_freq=3", "trainer.resume_mode=resume_path",
             f"trainer.resume_from_path={source}/global_step_2")  # fmt: skip
    result = run_ppo(load_config(toy_overrides(toy, folder, *words)))
    assert f"was moved to {folder}.old-1" in capsys.readouterr().out
    assert (tmp_path / "run.old-1" / "metrics.jsonl").read_bytes() == before
    assert set(result.history) == {2, 3}  # step 2 is measured, not taken over from the other run
    assert set(read_metrics(folder / "metrics.jsonl")) == {2, 3}
    # the same command again is the same run: it starts from the same checkpoint in the same folder
    again = run_ppo(load_config(toy_overrides(toy, folder, *words)))
    assert again.history == result.history and not (tmp_path / "run.old-2").exists()


def test_val_only_on_an_earlier_checkpoint_deletes_no_record_of_later_steps(earlier, tmp_path):
    toy, source = earlier
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    before = read_metrics(folder / "metrics.jsonl")
    words = (*SMALL, "trainer.val_only=True", "trainer.resume_mode=resume_path",
             f"trainer.resume_from_path={folder}/global_step_1", "trainer.log_val_generations=2")  # fmt: skip
    result = run_ppo(load_config(toy_overrides(toy, folder, *words)))
    after = read_metrics(folder / "metrics.jsonl")
    assert result.history[1] == before[1]["val/accuracy"]
    assert list(after) == [0, 1, 2, 3] and after[2] == before[2] and after[3] == before[3]
