"""The whole trainer must learn a task with a known optimum, and must not learn when the reward is shuffled."""

from __future__ import annotations

import pytest

from steepest.config.load import load_config
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8", "data.train_batch_size=32",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16", "actor_rollout_ref.actor.optim.lr=1e-3")  # fmt: skip
"""Larger groups and smaller steps than PPO's: else a run may become certain of wrong digits, whose groups all score the
same, and end at 0.78."""


OTHERS = {
    "dr_grpo": ("algorithm.norm_adv_by_std_in_grpo=False", "actor_rollout_ref.actor.loss_scale_factor=1",
                "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm"),
    "dapo": ("actor_rollout_ref.actor.clip_ratio_high=0.28", "algorithm.filter_groups.enable=True"),
    "gspo": ("actor_rollout_ref.actor.policy_loss.loss_mode=gspo",),
    "cispo": ("actor_rollout_ref.actor.policy_loss.loss_mode=cispo",),
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def accuracy(toy, folder, *more: str, reward: str = "digit", steps: int = 60) -> float:
    overrides = toy_overrides(
        toy, folder, f"trainer.total_training_steps={steps}", "trainer.test_freq=1000", *more, reward=reward
    )
    history = run_ppo(load_config(overrides)).history
    assert history[0] <= 0.3, "the untrained model must leave room"
    return history[steps]


@pytest.mark.parametrize("more", [(), GRPO], ids=["ppo", "grpo"])
def test_learns_the_digit(toy, tmp_path, more):
    assert accuracy(toy, tmp_path, *more, steps=90) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_algorithms_learn_the_digit(toy, tmp_path, name):
    """Each by its own keys. The functions of all of them learn in tests/core/test_must_learn.py."""
    assert accuracy(toy, tmp_path, *GRPO, *OTHERS[name], steps=90) >= 0.9


@pytest.mark.parametrize("more", [pytest.param((), id="ppo"), pytest.param(GRPO, id="grpo", marks=pytest.mark.slow)])
def test_does_not_learn_from_a_shuffled_reward(toy, tmp_path, more):
    # the validation still scores by the same random reward, so the policy itself is asked
    folder = tmp_path / "run"
    overrides = toy_overrides(toy, folder, "trainer.total_training_steps=90", "trainer.save_freq=90",
                              "trainer.val_before_train=False", *more, reward="shuffled")  # fmt: skip
    run_ppo(load_config(overrides))
    check = toy_overrides(toy, tmp_path / "check", "trainer.val_only=True")
    check = [o for o in check if not o.startswith("actor_rollout_ref.model.path")]
    check.append(f"actor_rollout_ref.model.path={folder}/global_step_90/actor")
    assert run_ppo(load_config(check)).history[0] <= 0.3
