"""The step and the loop with fakes: order, warm-up, what a failing save or validation costs. No model, no engine."""

from __future__ import annotations

import pytest
import torch

from steepest.core.batch import Batch
from steepest.trainer.loop import Schedule, Timer, run_steps
from steepest.trainer.ppo import ActorAfterWarmup, ActorOfOneUpdate, NoCritic, NoReference, PPOStep


def make_batch() -> Batch:
    return Batch.from_sequences([[1, 2]], [[3, 4]], group_ids=[0], truncated=[False], rollout_log_probs=[[-1.0, -2.0]])


class Fakes:
    """Every part of a step; each writes its name and what it may read into `calls`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def generate(self, step: int) -> Batch:
        self.calls.append(f"generate {step}")
        return make_batch()

    def score(self, batch: Batch, step: int) -> dict[str, float]:
        self.calls.append(f"score {step}")
        batch.token_level_scores = torch.zeros(1, 2)
        return {"reward/error_rate": 0.0}

    def log_probs(self, batch: Batch):
        assert batch.token_level_scores is not None
        self.calls.append("old_log_probs")
        return torch.zeros(1, 2), torch.ones(1, 2)

    def values(self, batch: Batch):
        self.calls.append("values")
        return torch.zeros(1, 2), torch.zeros(1)

    def shape_rewards(self, batch: Batch) -> dict[str, float]:
        assert batch.old_log_probs is not None
        self.calls.append("shape_rewards")
        batch.token_level_rewards = batch.token_level_scores
        return {}

    def estimate_advantages(self, batch: Batch) -> None:
        assert batch.token_level_rewards is not None
        self.calls.append("advantages")
        batch.advantages = batch.returns = torch.zeros(1, 2)

    def update(self, batch: Batch, *, step: int) -> dict[str, float]:
        assert batch.advantages is not None
        self.calls.append(f"update_actor {step}")
        return {"actor/pg_loss": 1.0}


class FakeCritic:
    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes

    def values(self, batch: Batch):
        return self.fakes.values(batch)

    def update(self, batch: Batch, *, step: int) -> dict[str, float]:
        self.fakes.calls.append(f"update_critic {step}")
        return {"critic/vf_loss": 2.0}


class FakeReference:
    def __init__(self, fakes: Fakes) -> None:
        self.fakes = fakes

    def log_probs(self, batch: Batch):
        self.fakes.calls.append("reference")
        return torch.zeros(1, 2)


def make_step(fakes: Fakes, *, warmup: int = 0, critic=None, reference=None) -> PPOStep:
    return PPOStep(
        generate=fakes.generate,
        score=fakes.score,
        actor=ActorAfterWarmup(fakes, warmup),
        critic=critic or FakeCritic(fakes),
        reference=reference or FakeReference(fakes),
        shape_rewards=fakes.shape_rewards,
        estimate_advantages=fakes.estimate_advantages,
        publish_weights=lambda step: fakes.calls.append(f"publish {step}"),
        describe=lambda batch: {"tokens": 4.0},
    )


def test_a_step_runs_its_parts_in_order():
    fakes = Fakes()
    metrics = make_step(fakes)(3)
    assert fakes.calls == [
        "generate 3",
        "score 3",
        "old_log_probs",
        "reference",
        "shape_rewards",
        "values",
        "advantages",
        "update_critic 3",
        "update_actor 3",
        "publish 3",
    ]
    assert metrics == {"reward/error_rate": 0.0, "critic/vf_loss": 2.0, "actor/pg_loss": 1.0, "tokens": 4.0}


def test_without_critic_and_reference_the_step_is_the_same_code():
    fakes = Fakes()
    metrics = make_step(fakes, critic=NoCritic(), reference=NoReference())(1)
    assert "values" not in fakes.calls and "reference" not in fakes.calls
    assert "critic/vf_loss" not in metrics and metrics["actor/pg_loss"] == 1.0


def test_one_update_a_step_needs_no_pass_before_it():
    fakes = Fakes()
    fakes.shape_rewards = lambda batch: setattr(batch, "token_level_rewards", batch.token_level_scores) or {}
    step = make_step(fakes)
    step.actor = ActorOfOneUpdate(fakes)
    assert step(1)["actor/pg_loss"] == 1.0
    assert "old_log_probs" not in fakes.calls and "update_actor 1" in fakes.calls


def test_critic_warmup_leaves_the_actor_alone_for_its_steps():
    fakes = Fakes()
    step = make_step(fakes, warmup=2)
    for number in (1, 2, 3):
        step(number)
    assert [c for c in fakes.calls if c.startswith("update")] == [
        "update_critic 1",
        "update_critic 2",
        "update_critic 3",
        "update_actor 3",
    ]


def test_the_timer_names_every_part_and_parts_fit_into_the_step():
    step = make_step(Fakes())
    step(1)
    times = step.timed.flush()
    parts = "gen reward old_log_prob ref values adv update_critic update_actor update_weights describe step"
    assert set(times) == {f"timing_s/{name}" for name in parts.split()}
    assert sum(v for k, v in times.items() if k != "timing_s/step") <= times["timing_s/step"]
    assert step.timed.flush() == {}


class RecordingHooks:
    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self.failing = failing

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise OSError(name)

    def before_training(self, start_step: int) -> None:
        self._call(f"before {start_step}")

    def save(self, step: int) -> None:
        self._call(f"save {step}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._call(f"log {step}")

    def validate(self, step: int) -> None:
        self._call(f"validate {step}")


def run(hooks: RecordingHooks, *, total: int, save: int, test: int, start: int = 0) -> None:
    run_steps(lambda step: {}, Timer(), Schedule(total, save, test), hooks, start)


def test_saving_and_validating_fall_on_their_steps_and_on_the_last():
    hooks = RecordingHooks()
    run(hooks, total=5, save=2, test=3)
    assert hooks.calls == [
        "before 0",
        "log 1",
        "save 2",
        "log 2",
        "log 3",
        "validate 3",
        "save 4",
        "log 4",
        "save 5",
        "log 5",
        "validate 5",
    ]


def test_minus_one_means_never():
    hooks = RecordingHooks()
    run(hooks, total=2, save=-1, test=-1)
    assert hooks.calls == ["before 0", "log 1", "log 2"]


def test_a_resumed_run_starts_after_its_step():
    hooks = RecordingHooks()
    run(hooks, total=4, save=-1, test=-1, start=2)
    assert hooks.calls == ["before 2", "log 3", "log 4"]


def test_a_failing_save_still_logs_the_step():
    hooks = RecordingHooks(failing="save 1")
    with pytest.raises(OSError, match="save 1"):
        run(hooks, total=2, save=1, test=-1)
    assert hooks.calls == ["before 0", "save 1", "log 1"]


def test_a_failing_validation_comes_after_the_save():
    hooks = RecordingHooks(failing="validate 1")
    with pytest.raises(OSError, match="validate 1"):
        run(hooks, total=1, save=1, test=1)
    assert hooks.calls == ["before 0", "save 1", "log 1", "validate 1"]
