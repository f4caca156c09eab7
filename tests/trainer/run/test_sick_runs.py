"""Every sickness that a health check knows, made to happen in a tiny real run; and a healthy run that hears nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from steepest.errors import HealthError
from steepest.loggers.jsonl import read_metrics
from steepest.process.entry import guarded
from tests.support.sick_runs import EndlessEngine, HotEngine, StaleEngine, make_world, run, words

ACTOR = "actor_rollout_ref.actor"
GROUPS = (
    "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "data.train_batch_size=8",
    f"{ACTOR}.ppo_mini_batch_size=8",
)  # fmt: skip


def steps(number: int) -> str:
    return f"trainer.total_training_steps={number}"


@dataclass(frozen=True)
class Case:
    """A run, and which checks speak in it, in which step first."""

    reward: str
    words: tuple[str, ...]
    speak: dict[str, int]
    engine: Callable[..., Any] | None = None


HEALTHY = Case("digit", (steps(8), "trainer.test_freq=4", "data.train_batch_size=20", f"{ACTOR}.ppo_mini_batch_size=20",
                         "data.max_response_length=32"), {})  # fmt: skip
CASES = {
    "healthy": HEALTHY,
    "a constant reward and a short limit": Case(
        "nothing", (steps(6), "data.max_response_length=2"), {"cut_answers": 3, "constant_reward": 5}
    ),
    "equal groups and a reward that errs": Case(
        "of_the_prompt", (steps(5), *GROUPS, "reward.max_error_rate=0.9"), {"equal_groups": 5, "reward_errors": 3}
    ),
    "another temperature": Case("digit", (steps(1),), {"temperature": 1}, HotEngine),
}
SLOW = {
    "a healthy run that is longer": Case(
        "digit", (*HEALTHY.words[1:], steps(24), "trainer.test_freq=8"), {}
    ),
    "no end token": Case("digit", (steps(1),), {"end_token": 1}, EndlessEngine),
    "old weights": Case("digit", (steps(2), f"{ACTOR}.optim.lr=1e-2"), {"stale_engine": 2}, StaleEngine),
    "scores that overflow": Case("huge", (steps(3),), {"skipped_updates": 1, "nan": 3}),
    "a learning rate of 1, one update a step": Case(
        "digit", (steps(4), f"{ACTOR}.optim.lr=1"), {"learning_rate": 2, "kl_runaway": 4}
    ),
    "a learning rate of 1, four updates a step": Case(
        "digit", (steps(4), f"{ACTOR}.optim.lr=1", f"{ACTOR}.ppo_mini_batch_size=8"),
        {"learning_rate": 1, "cut_answers": 4, "entropy_collapse": 4},
    ),
    "a reward for length": Case(
        "length", (steps(10), f"{ACTOR}.optim.lr=2e-3", "data.max_response_length=48"),
        {"cut_answers": 7, "length_hacking": 10},
    ),
    "other answers in the validation, and a critic that stands still": Case(
        "digit",
        (
            steps(20), "trainer.test_freq=5", "data.train_batch_size=64", f"{ACTOR}.ppo_mini_batch_size=64",
            f"{ACTOR}.optim.lr=3e-3", "critic.optim.lr=1e-12", "data.val_files={wrong}", "data.val_max_samples=80",
            "data.max_response_length=1", "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
            "actor_rollout_ref.rollout.val_kwargs.temperature=1",
        ),
        {"learning_rate": 2, "cut_answers": 3, "kl_runaway": 13, "validation": 16, "dead_critic": 20},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def job(world, folder, case: Case, *more: str) -> list[str]:
    return words(world, folder, case.reward, *(word.format(**world) for word in case.words), *more)


@pytest.mark.parametrize(
    "case",
    [*(pytest.param(case, id=name) for name, case in CASES.items()),
     *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items())],
)  # fmt: skip
def test_the_checks_of_a_sickness_speak_and_no_others(world, tmp_path, capsys, case):
    rows = run(job(world, tmp_path / "run", case), case.engine)
    first: dict[str, int] = {}
    for step, row in rows.items():
        for name in (name for name, value in row.items() if name.startswith("health/") and value == 1.0):
            first.setdefault(name.removeprefix("health/"), step)
    assert first == case.speak
    spoken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step ")]
    assert [line.split(":")[1] for line in spoken] == [f" step {step}" for step in sorted(case.speak.values())]


def test_stop_saves_the_step_and_ends_with_3_and_a_resumed_run_speaks_as_an_unbroken_one(world, tmp_path, capsys):
    case = CASES["a constant reward and a short limit"]
    whole = run(job(world, tmp_path / "whole", case))
    stops = job(world, tmp_path / "run", case, "trainer.save_freq=-1", "trainer.on_problem=stop")
    capsys.readouterr()
    assert guarded(lambda: run(stops) and None) == HealthError.exit_code == 3
    out, err = capsys.readouterr()
    # 88 % of the answers are cut from step 3 on, which is no problem; the constant reward is one
    assert "the run ends early. Step 5 is saved; the same command resumes from it." in out
    assert err.startswith("error: step 5: in 5 steps in a row every response") and "trainer.on_problem=stop" in err
    rows = run(job(world, tmp_path / "run", case, "trainer.save_freq=-1"))
    assert "resuming from step 5" in (out := capsys.readouterr().out) and "warning: step" not in out
    assert list(rows) == list(whole) == [0, 1, 2, 3, 4, 5, 6]
    assert [_health(row) for row in rows.values()] == [_health(row) for row in whole.values()]


def test_the_last_step_has_nothing_to_end(world, tmp_path):
    case = CASES["another temperature"]
    run(job(world, tmp_path / "run", case, "trainer.on_problem=stop", "trainer.test_freq=1"), case.engine)
    assert "val/accuracy" in read_metrics(tmp_path / "run" / "metrics.jsonl")[1]


def _health(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("health/")}
