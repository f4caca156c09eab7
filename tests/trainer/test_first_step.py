"""What the first step of a real run must say: engine, actor and reference hold the same weights at one temperature."""

from __future__ import annotations

import pytest
import torch

from steepest.config.load import load_config
from steepest.core.advantages import AdvantageInputs
from steepest.loggers.jsonl import read_metrics
from steepest.trainer import build_step
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

RUN = (
    "trainer.total_training_steps=2", "trainer.test_freq=-1", "trainer.val_before_train=False",
    "data.train_batch_size=32", "data.max_response_length=6", "actor_rollout_ref.actor.ppo_mini_batch_size=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def metrics(toy, folder, *more: str) -> dict[int, dict[str, float]]:
    run_ppo(load_config(toy_overrides(toy, folder, *RUN, *more)))
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(("old_log_probs", "rounding"), [("recompute", 0.0), ("auto", 1e-6)])
def test_on_the_first_step_nothing_has_moved_at_any_temperature(toy, tmp_path, old_log_probs, rounding):
    """Traps 2, 16, 18, 19: a temperature forgotten by engine, actor or reference shows in one of these numbers."""
    more = (f"actor_rollout_ref.actor.old_log_probs={old_log_probs}", "actor_rollout_ref.rollout.temperature=0.7")
    rows = metrics(toy, tmp_path, *more)
    first, second = rows[1], rows[2]
    assert abs(first["actor/reward_kl_penalty"]) <= rounding  # the reference is the policy, to the bit
    assert first["actor/ratio_max_dev_first"] < 1e-5
    assert second["actor/reward_kl_penalty"] != 0.0 and second["actor/ratio_max_dev_first"] < 1e-5
    for row in rows.values():
        assert abs(row["mismatch/kl"]) < 1e-5 and row["mismatch/mean_abs_diff"] < 1e-5
        assert row["mismatch/max_ratio"] == pytest.approx(1.0, abs=1e-4)
        assert row["mismatch/ess"] == pytest.approx(1.0, abs=1e-5)
    assert first["critic/values/max"] == first["critic/values/min"] == 0.0  # trap 24: a new critic knows nothing
    assert first["response_length/max"] > 1


def test_filtered_sampling_is_not_compared_with_the_whole_distribution(toy, tmp_path):
    """Trap 3: the engine's log-probs are then those of the filtered distribution, the trainer's are not."""
    for row in metrics(toy, tmp_path, "actor_rollout_ref.rollout.top_p=0.9").values():
        assert not [name for name in row if name.startswith(("mismatch/", "training/rollout_probs"))]
        assert row["actor/ratio_max_dev_first"] < 1e-5


def test_a_single_update_leaves_its_first_pass_out_and_still_compares_engine_and_trainer(toy, tmp_path, capsys):
    one = ("algorithm.use_kl_in_reward=False", "actor_rollout_ref.actor.ppo_mini_batch_size=32")
    rows = metrics(toy, tmp_path / "skips", *one)
    assert "the pass that would compute them first is left out" in capsys.readouterr().out
    full = metrics(toy, tmp_path / "full", *one, "actor_rollout_ref.actor.old_log_probs=recompute")
    for step in (1, 2):
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/entropy", "mismatch/mean_abs_diff", "critic/vf_loss"):
            assert rows[step][name] == pytest.approx(full[step][name], abs=2e-5), name


def config(toy, tmp_path, *more: str):
    return load_config(toy_overrides(toy, tmp_path, *more))


@pytest.mark.parametrize(
    ("key", "same"), [("top_p=0.9", False), ("top_k=5", False), ("temperature=0.3", True), ("n=2", True)]
)
def test_what_counts_as_filtered(toy, tmp_path, key, same):
    assert (
        build_step.unfiltered(build_step.train_sampling(config(toy, tmp_path, f"actor_rollout_ref.rollout.{key}")))
        is same
    )


def test_validation_samples_as_its_own_keys_say(toy, tmp_path):
    rollout = "actor_rollout_ref.rollout"
    made = config(toy, tmp_path, f"{rollout}.temperature=0.7", f"{rollout}.top_p=0.8", f"{rollout}.n=3",
                  f"{rollout}.seed=5", "data.max_response_length=9")  # fmt: skip
    plain = build_step.val_sampling(made)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.n, plain.seed, plain.max_tokens) == (0, 1, -1, 1, 5, 9)
    train = build_step.train_sampling(made)
    assert (train.temperature, train.top_p, train.n, train.seed, train.max_tokens) == (0.7, 0.8, 3, 5, 9)
    val = f"{rollout}.val_kwargs"
    asked = build_step.val_sampling(config(toy, tmp_path, f"{val}.temperature=0.6", f"{val}.n=4", f"{val}.top_k=7"))
    assert (asked.temperature, asked.n, asked.top_k) == (0.6, 4, 7)


def test_the_configuration_says_which_row_bootstraps(toy, tmp_path):
    """Trap 7: two rows, equal but for the finish reason. By default both end; with the key the cut one goes on."""
    inputs = AdvantageInputs(
        token_level_rewards=torch.zeros(2, 1),
        response_mask=torch.ones(2, 1, dtype=torch.bool),
        values=torch.tensor([[1.0], [1.0]]),
        final_values=torch.tensor([3.0, 3.0]),
        truncated=torch.tensor([False, True]),
    )
    estimate = build_step.build_advantages(config(toy, tmp_path)).estimator
    assert estimate(inputs)[1].tolist() == [[0.0], [0.0]]
    asked = build_step.build_advantages(
        config(toy, tmp_path, "algorithm.bootstrap_truncated=True", "algorithm.gamma=0.5")
    )
    assert asked.estimator(inputs)[1].tolist() == [[0.0], [1.5]]
    assert asked.whitened
    grpo = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2")
    assert not build_step.build_advantages(config(toy, tmp_path, *grpo)).whitened
