"""The PPO job: what observers see, what a run leaves behind, and where a checkpoint says it stands."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from steepest.config.load import load_config
from steepest.config.sections.reward import functions_of
from steepest.core.batch import Batch
from steepest.data.prompts import Prompt
from steepest.errors import DataError
from steepest.loggers.jsonl import read_metrics
from steepest.loggers.rows import read_rows
from steepest.trainer.experience.api import Experience
from steepest.trainer.jobs.ppo import check_ground_truths, run_ppo
from tests.support.toy_run import make_toy, toy_overrides

SHORT = (
    "data.train_batch_size=32", "actor_rollout_ref.actor.ppo_mini_batch_size=16", "trainer.total_training_steps=2",
    "trainer.test_freq=-1",
)  # fmt: skip
DYNAMIC = (
    "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "algorithm.filter_groups.enable=True",
    "algorithm.filter_groups.max_num_gen_batches=40", "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8", "trainer.val_before_train=False", "trainer.test_freq=-1",
    "trainer.save_freq=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), num_rows=64)


def run(toy, folder, *words: str, observers=()):
    return run_ppo(load_config(toy_overrides(toy, folder, *words)), observers=observers)


def test_observers_see_every_step_with_every_field_before_it_is_saved_and_logged(toy, tmp_path):
    seen: list[tuple[str, int]] = []
    batches: list[Batch] = []
    folder = tmp_path / "run"

    def first(step: int, experience: Experience) -> None:
        assert not (folder / f"global_step_{step}").exists() and step not in read_metrics(folder / "metrics.jsonl")
        seen.append(("first", step))
        batches.append(experience.batch)
        assert len(experience.responses) == 1 and experience.prompts_taken is None
        assert experience.metrics["reward/error_rate"] == 0.0 and experience.flops["gen"] > 0

    result = run(
        toy, folder, *SHORT, "trainer.save_freq=1", observers=[first, lambda step, found: seen.append(("second", step))]
    )
    assert seen == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    never = {"rollout_is_weights"}
    for batch in batches:
        missing = {item.name for item in dataclasses.fields(Batch) if getattr(batch, item.name) is None}
        assert missing <= {*never, "recomputed", "entropies"} and len(batch) == 32
    assert missing == {*never, "entropies"}, "step 2 takes the engine's log-probs, checked on a sample"
    metrics = read_metrics(folder / "metrics.jsonl")
    for step, batch in enumerate(batches, 1):
        assert metrics[step]["critic/advantages/max"] == batch.advantages[batch.loss_mask].max().item()
    assert result.folder == folder and sorted(result.history) == [0] and (folder / "global_step_2").is_dir()


def test_an_observer_that_raises_ends_the_run_with_its_step_unsaved(toy, tmp_path):
    def fail(step: int, experience: Experience) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(toy, tmp_path / "run", *SHORT, "trainer.save_freq=1", observers=[fail])
    assert not (tmp_path / "run" / "global_step_1").exists()
    assert sorted(run(toy, tmp_path / "run", *SHORT).history) == [0], "the folder is free again"


def test_observers_change_no_number(toy, tmp_path):
    numbers = []
    for name, observers in (("plain", ()), ("observed", [lambda step, found: found.batch.advantages.sum()])):
        run(toy, tmp_path / name, *SHORT, observers=observers)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        numbers.append([{k: v for k, v in r.items() if not k.startswith(("timing", "perf/", "time"))} for r in rows])
    assert numbers[0] == numbers[1] and len(numbers[0]) == 3


def test_a_checkpoint_stores_the_prompts_that_were_learnt_and_a_resumed_run_draws_the_next_ones(toy, tmp_path):
    def ids(batch: Batch) -> list[str]:
        return [sample.uid for sample in batch.samples]

    whole: dict[int, Experience] = {}
    run(toy, tmp_path / "whole", *DYNAMIC, "trainer.total_training_steps=3", observers=[whole.__setitem__])
    for step in (1, 2, 3):
        (state,) = (tmp_path / "whole" / f"global_step_{step}").glob("*state*.json")
        assert json.loads(state.read_text())["prompts"] == {"taken": whole[step].prompts_taken}
    assert whole[3].prompts_taken > 3, "otherwise the position is the step, and nothing was tested"
    resumed: dict[int, Experience] = {}
    run(toy, tmp_path / "cut", *DYNAMIC, "trainer.total_training_steps=1")
    run(toy, tmp_path / "cut", *DYNAMIC, "trainer.total_training_steps=3", observers=[resumed.__setitem__])
    assert sorted(resumed) == [2, 3]
    for step, found in resumed.items():
        assert found.prompts_taken == whole[step].prompts_taken and ids(found.batch) == ids(whole[step].batch)
        assert torch.equal(found.batch.responses, whole[step].batch.responses)


def test_a_run_that_only_validates_trains_nothing(toy, tmp_path):
    seen: list[int] = []
    result = run(toy, tmp_path / "run", *SHORT, "trainer.val_only=True", observers=[lambda n, found: seen.append(n)])
    assert sorted(result.history) == [0] and seen == [] and list(read_metrics(tmp_path / "run/metrics.jsonl")) == [0]
    run(toy, tmp_path / "trained", *SHORT, "trainer.save_freq=2")
    assert sorted(run(toy, tmp_path / "trained", *SHORT, "trainer.val_only=True").history) == [0, 2]


def test_every_response_of_a_step_is_written_where_it_is_asked_for(toy, tmp_path):
    run(toy, tmp_path / "run", *SHORT, f"trainer.rollout_data_dir={tmp_path / 'responses'}")
    assert sorted(path.name for path in (tmp_path / "responses").iterdir()) == ["1.jsonl", "2.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "responses" / "2.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and {(row["step"], row["split"]) for row in rows} == {(2, "train")}


def test_a_ground_truth_that_no_answer_could_equal_is_named_by_its_row():
    good = Prompt("rows:0", [], "openai/gsm8k", "4", {}, (1,))
    check_ground_truths([good])
    bad = dataclasses.replace(good, uid="rows:1", ground_truth="")
    with pytest.raises(DataError, match=r"row rows:1 \(file:row, from 0\), column reward_model"):
        check_ground_truths([good, bad], functions_of(load_config([
            "data.train_files=a", "data.val_files=a", "actor_rollout_ref.model.path=m"
        ]).reward.functions))  # fmt: skip
