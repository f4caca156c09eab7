"""The step and the loop with fakes: order, fields, warm-up, observers, times, and what a failing save costs."""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import torch

from steepest.core.batch import Batch
from steepest.trainer.algorithm.critic_values import NoCritic, Values
from steepest.trainer.algorithm.old_log_probs import FromUpdate, OldLogProbs
from steepest.trainer.build_step import after_warmup
from steepest.trainer.experience.api import Experience
from steepest.trainer.loop import Timer
from steepest.trainer.ppo import Learn, PPOStep

OPTIONAL = [item.name for item in dataclasses.fields(Batch) if item.default is None]
"""Fields that a step fills."""


def filled(batch: Batch) -> set[str]:
    return {name for name in OPTIONAL if getattr(batch, name) is not None}


def zeros(batch: Batch) -> torch.Tensor:
    return torch.zeros(batch.responses.shape)


class Fakes:
    """Every part of a step; each writes its name into `calls`, and into `found` which fields were filled then."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.found: dict[str, set[str]] = {}
        self.batches: dict[str, Batch] = {}
        self.updates: list[object] = []

    def see(self, name: str, batch: Batch, step: int | None = None) -> None:
        self.calls.append(name if step is None else f"{name} {step}")
        self.found[name], self.batches[name] = filled(batch), batch

    def collect(self, step: int) -> Experience:
        """Two rows; generation took 2 seconds and 7 operations."""
        batch = Batch.from_sequences(
            [[step]] * 2, [[3, 4]] * 2, group_ids=[0, 0], truncated=[False] * 2, rollout_log_probs=[[-1.0, -2.0]] * 2
        )
        batch.token_level_scores = zeros(batch)
        self.see("collect", batch, step)
        return Experience(batch, [], {"reward/error_rate": 0.0}, {"gen": 2.0, "reward": 1.0}, {"gen": 7.0})

    def old_log_probs(self, batch: Batch) -> OldLogProbs:
        self.see("old_log_probs", batch)
        return OldLogProbs(zeros(batch) - 1, zeros(batch) - 2, zeros(batch), extras={"sum_pi_squared": zeros(batch)})

    def ref_log_probs(self, batch: Batch) -> torch.Tensor:
        self.see("ref_log_probs", batch)
        return zeros(batch) - 3

    def shape_rewards(self, batch: Batch) -> dict[str, float]:
        self.see("shape_rewards", batch)
        batch.token_level_rewards = batch.token_level_scores
        return {"actor/reward_kl_penalty": 0.5}

    def estimate_advantages(self, batch: Batch) -> None:
        self.see("advantages", batch)
        batch.advantages, batch.returns = zeros(batch), zeros(batch)

    def select_rows(self, batch: Batch, step: int) -> tuple[Batch, dict[str, float]]:
        self.see("select_rows", batch, step)
        return batch.select(torch.tensor([1])), {"pf_ppo/distinct_ratio": 0.5}

    def critic_targets(self, batch: Batch, step: int) -> Batch:
        self.see("critic_targets", batch, step)
        return dataclasses.replace(batch, returns=zeros(batch) + 9)

    def values(self, batch: Batch) -> Values:
        self.see("values", batch)
        return Values(zeros(batch), torch.zeros(len(batch)), gradient=f"of {int(batch.prompts[0, 0])}")

    def update(self, batch: Batch, found: Values, step: int) -> dict[str, float]:
        """The critic's."""
        self.see("update_critic", batch, step)
        self.updates.append(found.gradient)
        return {"critic/vf_loss": 2.0}

    def update_actor(self, batch: Batch, step: int) -> dict[str, float]:
        self.see("update_actor", batch, step)
        return {"actor/pg_loss": 1.0}

    def describe(self, batch: Batch) -> dict[str, float]:
        self.see("describe", batch)
        return {"tokens": 4.0}

    def observe(self, step: int, experience: Experience) -> None:
        self.see("observe", experience.batch, step)


def make_learn(fakes: Fakes, **parts) -> Learn:
    made = {
        "old_log_probs": fakes.old_log_probs,
        "ref_log_probs": fakes.ref_log_probs,
        "shape_rewards": fakes.shape_rewards,
        "critic": fakes,
        "estimate_advantages": fakes.estimate_advantages,
        "select_rows": fakes.select_rows,
        "critic_targets": fakes.critic_targets,
        "update_actor": fakes.update_actor,
        "publish_weights": lambda step: fakes.calls.append(f"publish {step}"),
        "describe": fakes.describe,
    }
    return Learn(**{**made, **parts})


def make_step(fakes: Fakes, **parts) -> PPOStep:
    return PPOStep(fakes.collect, make_learn(fakes, **parts), [fakes.observe])


def test_a_step_runs_its_parts_in_order():
    fakes = Fakes()
    metrics = make_step(fakes)(3)
    assert fakes.calls == [
        "collect 3",
        "old_log_probs",
        "ref_log_probs",
        "shape_rewards",
        "values",
        "advantages",
        "select_rows 3",
        "critic_targets 3",
        "update_critic 3",
        "update_actor 3",
        "publish 3",
        "describe",
        "observe 3",
    ]
    assert metrics == {
        "reward/error_rate": 0.0,
        "actor/reward_kl_penalty": 0.5,
        "pf_ppo/distinct_ratio": 0.5,
        "critic/vf_loss": 2.0,
        "actor/pg_loss": 1.0,
        "tokens": 4.0,
    }


def test_each_part_finds_the_fields_that_it_reads():
    fakes = Fakes()
    make_step(fakes)(1)
    wanted = {"rollout_log_probs", "token_level_scores"}
    for part, more in (
        ("old_log_probs", set()),
        ("ref_log_probs", {"kl_log_probs", "old_log_probs", "entropies"}),
        ("shape_rewards", {"ref_log_probs"}),
        ("values", {"token_level_rewards"}),
        ("advantages", {"values", "final_values"}),
        ("select_rows", {"advantages", "returns"}),
        ("update_critic", set()),
        ("update_actor", set()),
        ("describe", set()),
        ("observe", set()),
    ):
        wanted = wanted | more
        assert fakes.found[part] == wanted, part
    batch = fakes.batches["observe"]
    assert [float(getattr(batch, f"{name}_log_probs")[0, 0]) for name in ("kl", "old", "ref")] == [-1, -2, -3]
    assert "sum_pi_squared" in batch.extras


def test_the_updates_read_the_chosen_rows_and_the_statistics_all():
    fakes = Fakes()
    make_step(fakes)(5)
    assert [len(fakes.batches[name]) for name in ("update_critic", "update_actor", "describe", "observe")] == [
        1,
        1,
        2,
        2,
    ]
    assert fakes.batches["update_critic"].returns.tolist() == [[9.0, 9.0]], "the critic's targets"
    assert fakes.batches["update_actor"].returns.tolist() == [[0.0, 0.0]], "are not the actor's returns"
    assert fakes.updates == ["of 5"], "the critic's update gets what its pass has left for it"


def test_without_critic_and_reference_the_step_is_the_same_code():
    fakes = Fakes()
    metrics = make_step(fakes, critic=NoCritic(), ref_log_probs=lambda batch: None)(1)
    assert "values" not in fakes.calls and "ref_log_probs" not in fakes.calls
    assert "critic/vf_loss" not in metrics and metrics["actor/pg_loss"] == 1.0
    assert not {"values", "final_values", "ref_log_probs"} & fakes.found["observe"]


def test_one_update_a_step_needs_no_pass_before_it():
    fakes = Fakes()
    assert make_step(fakes, old_log_probs=FromUpdate())(1)["actor/pg_loss"] == 1.0
    assert "old_log_probs" not in fakes.calls and "update_actor 1" in fakes.calls
    assert not {"kl_log_probs", "old_log_probs", "entropies"} & fakes.found["update_actor"]


def test_critic_warmup_leaves_the_actor_alone_for_its_steps():
    fakes = Fakes()
    step = make_step(fakes, update_actor=partial(after_warmup, fakes.update_actor, 2))
    losses = [step(number).get("actor/pg_loss") for number in (1, 2, 3)]
    assert [c for c in fakes.calls if c.startswith("update")] == [
        "update_critic 1",
        "update_critic 2",
        "update_critic 3",
        "update_actor 3",
    ]
    assert losses == [None, None, 1.0]


def test_a_step_may_be_collected_before_the_one_before_it_is_learnt():
    fakes = Fakes()
    learn = make_learn(fakes)
    first, second = fakes.collect(1), fakes.collect(2)
    assert filled(second.batch) == {"rollout_log_probs", "token_level_scores"}
    learn(first, 1)
    assert filled(second.batch) == {"rollout_log_probs", "token_level_scores"}, "learning touches its own alone"
    learn(second, 2)
    assert fakes.updates == ["of 1", "of 2"], "nothing of a step is kept in a part"


def test_observers_are_called_in_order_once_all_is_learnt_and_timed():
    fakes, seen = Fakes(), []
    learn = make_learn(fakes)

    def first(step: int, experience: Experience) -> None:
        seen.append(("first", step, experience.batch is fakes.batches["describe"], dict(learn.timed.seconds)))

    def second(step: int, experience: Experience) -> None:
        seen.append(("second", step, fakes.calls[-1], None))

    PPOStep(fakes.collect, learn, (first, second))(4)
    assert [call[:3] for call in seen] == [("first", 4, True), ("second", 4, "describe")]
    assert seen[0][3]["gen"] == 2.0 and "step" in seen[0][3], "the collector's seconds are merged by then"


def test_the_timer_names_every_part_and_parts_fit_into_the_step():
    fakes, timer = Fakes(), Timer()

    def collect(step: int) -> Experience:
        with timer("gen"):
            time.sleep(0.01)
        with timer("reward"):
            found = fakes.collect(step)
        return dataclasses.replace(found, seconds=dict(timer.seconds), flops={})

    step = PPOStep(collect, make_learn(fakes))
    step(1)
    times = step.learn.timed.flush()
    parts = "gen reward old_log_prob ref values adv update_critic update_actor update_weights describe step"
    assert set(times) == {f"timing_s/{name}" for name in parts.split()}
    assert times["timing_s/gen"] >= 0.01
    assert sum(v for k, v in times.items() if k != "timing_s/step") <= times["timing_s/step"]
    assert step.learn.timed.flush() == {}


def test_operations_of_the_collector_and_of_the_parts_make_up_the_step():
    fakes, counted = Fakes(), []

    def update_actor(batch: Batch, step: int) -> dict[str, float]:
        counted.append(20.0)
        return {}

    def take() -> float:
        taken = sum(counted)
        counted.clear()
        return taken

    rates = []
    timed = Timer(take_flops=take, rates=lambda seconds, flops: rates.append((dict(seconds), dict(flops))) or {})
    step = make_step(fakes, update_actor=update_actor, timed=timed)
    for number in (1, 2):
        step(number)
        step.learn.timed.flush()
        seconds, flops = rates[-1]
        assert seconds["gen"] == 2.0 and seconds["reward"] == 1.0, "of this step alone"
        assert flops["gen"] == 7.0 and flops["update_actor"] == 20.0 and flops["step"] == 27.0
        assert not any(value for name, value in flops.items() if name not in ("gen", "update_actor", "step"))
