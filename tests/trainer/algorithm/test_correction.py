"""Rollout correction in the step: what leaves a batch, what an update makes of weights, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from steepest.config.load import load_config
from steepest.core.advantages import gae, grpo
from steepest.core.batch import Batch, RowStatus
from steepest.core.rollout_correction import Rejection, Weighting
from steepest.learner.critic import CriticLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.loggers.jsonl import read_metrics
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.correction import CorrectedRewards
from steepest.trainer.algorithm.kl_rewards import plain_rewards
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.learner_parts import make_actor, make_batch, make_critic, weights, with_log_probs
from tests.support.toy_run import make_toy, toy_overrides
from tests.trainer.algorithm.test_old_log_probs import difference, work

CORRECTION = "algorithm.rollout_correction"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def scored() -> Batch:
    """Two groups of two responses of two tokens; scores 1, 0, 1, 1; the engine is right but where a test says."""
    made = Batch.from_sequences(
        [[1]] * 4, [[2, 3]] * 4, group_ids=[0, 0, 1, 1], truncated=[False] * 4, rollout_log_probs=[[-1.0, -1.0]] * 4
    )
    made.token_level_scores = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    made.old_log_probs, made.values = torch.full((4, 2), -1.0), torch.zeros(4, 2)
    return made


def test_a_reward_on_a_rejected_token_is_not_lost():
    # the last token of row 0 is rejected: its reward 1 still makes the advantage of the first
    batch = scored()
    batch.rollout_log_probs[0, 1] = -5.0
    metrics = CorrectedRewards(Weighting("token", 3.0), (Rejection("token_k1", 2.0),), plain_rewards)(batch)
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(1 / 8)
    assert metrics["mismatch/max_abs_diff"] == pytest.approx(4.0), "measured before it was left out"
    assert batch.trained_mask.all() and batch.rollout_is_weights[0].tolist() == [1.0, 0.0]
    Advantages(partial(grpo, norm_by_std=False), whitened=False)(batch)
    assert batch.advantages.tolist() == [[0.5, 0.0], [-0.5, -0.5], [0.0, 0.0], [0.0, 0.0]]
    assert batch.loss_mask.tolist() == [[True, False], [True, True], [True, True], [True, True]]
    assert batch.trained_mask.all() and batch.row_status.tolist() == [0, 0, 0, 0]


def test_whitening_and_returns_are_those_of_the_tokens_that_stay():
    batch = scored()
    batch.rollout_log_probs[0, 1] = -5.0
    CorrectedRewards(None, (Rejection("token_k1", 2.0),), plain_rewards)(batch)
    Advantages(partial(gae, gamma=1.0, lam=1.0), whitened=True)(batch)
    kept = batch.advantages[batch.loss_mask]
    assert float(kept.mean()) == pytest.approx(0.0, abs=1e-6) and float(kept.var()) == pytest.approx(1.0, abs=1e-5)
    assert batch.returns.tolist() == [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    assert batch.advantages[0, 1] == 0.0


def test_a_rejected_response_is_in_no_group():
    # without row 1 the group of row 0 is row 0 alone: nothing to compare with
    batch = scored()
    batch.rollout_log_probs[1] = -9.0
    CorrectedRewards(None, (Rejection("seq_max_k2", 1.0),), plain_rewards)(batch)
    assert batch.trained_mask.tolist() == [[True, True], [False, False], [True, True], [True, True]]
    assert batch.row_status.tolist() == [0, RowStatus.REJECTED, 0, 0] and torch.equal(
        batch.loss_mask, batch.trained_mask
    )
    Advantages(partial(grpo, norm_by_std=False), whitened=False)(batch)
    assert bool((batch.advantages == 0).all())


def prepared(actor) -> Batch:
    batch = with_log_probs(make_batch(), actor, shift=0.1)
    return replace(batch, rollout_log_probs=batch.old_log_probs.clone(), token_level_scores=batch.returns)


def test_an_update_on_a_batch_with_a_rejected_row_is_one_on_a_batch_without_it():
    """Trap 10, for actor and critic: weights after the step, denominators included."""
    batch = prepared(make_actor())
    batch.rollout_log_probs[3] -= 9.0
    others = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    rejecting = CorrectedRewards(
        Weighting("sequence", 2.0, None, True), (Rejection("seq_mean_k3", 1.0),), plain_rewards
    )
    estimate = Advantages(partial(gae, gamma=1.0, lam=0.9), whitened=True)
    found = []
    for rows in (torch.arange(8), others):
        given = batch.select(rows)
        rejecting(given)
        estimate(given)
        actor, critic = make_actor(), make_critic(loss=CriticLossSettings(loss_agg_mode="seq-mean-token-mean"))
        actor.update(given, step=1)
        critic.update(given, step=1)
        found.append(weights(actor) | {f"critic {k}": v for k, v in weights(critic).items()})
    assert difference(*found) < 1e-6
    started = weights(make_actor())
    assert max(float((found[0][name] - started[name]).abs().max()) for name in started) > 1e-4


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_weights_multiply_the_policy_loss_token_by_token_whatever_the_micro_batches(rows):
    """Weights of 2 double loss and gradient; weights as advantages of another size are the same update."""
    batch = prepared(make_actor())
    factor = torch.rand(batch.advantages.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    micro = MicroBatches(rows=rows)
    weighed, scaled = make_actor(micro=micro), make_actor(micro=micro)
    a = weighed.update(replace(batch, rollout_is_weights=factor), step=1)
    b = scaled.update(replace(batch, advantages=batch.advantages * factor), step=1)
    assert a["actor/pg_loss"] == pytest.approx(b["actor/pg_loss"], abs=1e-6)
    assert a["actor/grad_norm"] == pytest.approx(b["actor/grad_norm"], rel=1e-4)
    plain = make_actor(micro=micro).update(batch, step=1)
    double = make_actor(micro=micro).update(replace(batch, rollout_is_weights=torch.full_like(factor, 2.0)), step=1)
    assert double["actor/pg_loss"] == pytest.approx(2 * plain["actor/pg_loss"], rel=1e-4)
    assert double["actor/grad_norm"] == pytest.approx(2 * plain["actor/grad_norm"], rel=1e-4)


RUN = (
    "trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.val_before_train=False",
    "data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=32",
)  # fmt: skip
HALF = "actor_rollout_ref.rollout.dtype=bfloat16"


def run(toy, folder, *more: str, observers=()):
    from safetensors.torch import load_file

    run_ppo(load_config(toy_overrides(toy, folder, *RUN, *more)), observers=observers)
    tensors = load_file(folder / "global_step_2/actor/model.safetensors")
    return read_metrics(folder / "metrics.jsonl"), tensors


def test_a_run_with_weights_and_rejection_takes_the_pass_it_compares_with(toy, tmp_path, capsys):
    batches: list[Batch] = []
    rows, _ = run(
        toy, tmp_path / "a", HALF, f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_batch_normalize=True",
        f"{CORRECTION}.rollout_rs=[token_k1,seq_mean_k3]", f"{CORRECTION}.rollout_rs_threshold=[0.998_1.002,0.001]",
        observers=[lambda step, experience: batches.append(experience.batch)],
    )  # fmt: skip
    for batch in batches:
        assert batch.recomputed is None and batch.entropies is not None, "the pass is one of all rows"
        differs = (batch.old_log_probs != batch.rollout_log_probs)[batch.response_mask]
        assert differs.float().mean() > 0.9, "not the engine's own, against which every weight would be 1"
    assert work(rows[1]) == pytest.approx(work(rows[2])) and len(batches) == 2
    note = "Old log-probs are computed by a pass of their own: algorithm.rollout_correction compares the engine's"
    assert note in capsys.readouterr().out
    for step in (1, 2):
        row = rows[step]
        assert 0 < row["rollout_corr/rollout_rs_token_k1_masked_fraction"] < 1, (
            "bfloat16 is off by more than 0.2 % in places"
        )
        assert row["mismatch/max_abs_diff"] > 0.01 and row["rollout_corr/k3_kl"] > 0
        assert 0.5 < row["rollout_corr/rollout_is_batch_norm_factor"] < 1.5
        assert row["rollout_corr/rollout_rs_masked_fraction"] > 0 and row["actor/grad_norm"] > 0
        assert row["rollout_corr/rollout_is_mean"] != 1.0


def test_where_engine_and_trainer_agree_correction_changes_nothing(toy, tmp_path):
    """The builtin engine in float32: the plan's pass is there, the weights are 1 up to rounding."""
    plain, without = run(toy, tmp_path / "without", "actor_rollout_ref.actor.old_log_probs=recompute")
    rows, corrected = run(
        toy, tmp_path / "with", f"{CORRECTION}.rollout_is=sequence", f"{CORRECTION}.rollout_is_threshold=0.5_2.0",
        f"{CORRECTION}.rollout_rs=seq_sum_k1", f"{CORRECTION}.rollout_rs_threshold=1.5",
    )  # fmt: skip
    assert difference(without, corrected) < 2e-5
    assert rows[2]["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-4)
    assert rows[2]["rollout_corr/rollout_rs_masked_fraction"] == 0.0
    assert plain[1]["rollout_corr/kl"] == pytest.approx(rows[1]["rollout_corr/kl"], abs=1e-7)
    assert "mismatch/rows_compared" in plain[1], "without correction the finished batch is measured"


def test_bypass_takes_no_pass_and_is_the_plain_run_where_the_two_agree(toy, tmp_path, capsys):
    batches: list[Batch] = []
    full, plain = run(toy, tmp_path / "plain", "actor_rollout_ref.actor.old_log_probs=recompute")
    observers = [lambda step, experience: batches.append(experience.batch)]
    rows, bypass = run(toy, tmp_path / "bypass", f"{CORRECTION}.bypass_mode=True", observers=observers)
    assert work(rows[1]) == work(rows[2]) == 0 < work(full[1]), "no pass before the update"
    assert all(batch.old_log_probs is batch.kl_log_probs is batch.rollout_log_probs for batch in batches)
    assert len(batches) == 2 and "The rollout's log-probs are the old ones, unchecked" in capsys.readouterr().out
    assert difference(plain, bypass) < 2e-4  # a KL of rounding at the first step, of which Adam makes a part of a step
    assert "mismatch/kl" not in rows[1], "there are no two log-probs to compare"


def test_bypass_with_reinforce(toy, tmp_path):
    rows, _ = run(
        toy, tmp_path / "r", HALF, f"{CORRECTION}.bypass_mode=True", f"{CORRECTION}.loss_type=reinforce",
        f"{CORRECTION}.rollout_is=token",
    )  # fmt: skip
    assert rows[2]["actor/grad_norm"] > 0 and "actor/pg_clipfrac" not in rows[2], "there is no clip"
    assert rows[1]["actor/ratio_max_dev_first"] > 1e-3, "training over rollout"


def test_a_step_that_is_rejected_whole_trains_nothing_and_says_so(toy, tmp_path, capsys):
    rows, _ = run(
        toy, tmp_path / "n", HALF, f"{CORRECTION}.rollout_rs=seq_max_k3", f"{CORRECTION}.rollout_rs_threshold=1e-12",
        "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2",
    )  # fmt: skip
    assert rows[1]["rollout_corr/rollout_rs_masked_fraction"] > 0.99
    assert "of the tokens were rejected" in capsys.readouterr().out
