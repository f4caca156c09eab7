"""A response whose reward failed is as good as absent: from the score to the gradients, with real actor and critic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from steepest.core.advantages import gae, grpo
from steepest.core.batch import Batch
from steepest.core.kl import AdaptiveKLController
from steepest.core.mismatch import mismatch_metrics
from steepest.learner.actor import ActorLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.reference import Reference
from steepest.rewards.api import RewardResult
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.kl_rewards import KLShapedRewards
from steepest.trainer.algorithm.old_log_probs import FromPass
from steepest.trainer.experience.scoring import place_scores
from steepest.trainer.run.metrics import batch_metrics
from tests.support.learner_parts import (
    CPU,
    make_actor,
    make_batch,
    make_critic,
    policy,
    record_gradients,
    same_bits,
    weights,
)

GAE = Advantages(partial(gae, gamma=0.9, lam=0.95), whitened=True)
GRPO = Advantages(partial(grpo, norm_by_std=True), whitened=False)
SCORES = [1.0, 0.0, 0.5, 0.0, 0.0, 2.0, -1.0, 0.25]


@dataclass
class Done:
    """What one step left behind."""

    batch: Batch
    metrics: dict[str, float]
    gradients: list[dict[str, Tensor]]
    coefficient: float
    after: dict[str, Tensor]


def responses(rows: list[int]) -> Batch:
    """Rows of eight responses of unequal length to two prompts, scored by `scored`."""
    whole = make_batch()
    picked = [
        (prompt[len(prompt) - p :], response[:t])
        for prompt, response, p, t in zip(
            whole.prompts.tolist(), whole.responses.tolist(), whole.prompt_lengths, whole.response_lengths, strict=True
        )
    ]
    prompts, answers = zip(*picked, strict=True)
    whole = Batch.from_sequences(prompts, answers, group_ids=[0] * 4 + [1] * 4, truncated=[False] * 8)
    return whole.select(torch.tensor(rows))


def step(rows: list[int], failed: set[int], advantages: Advantages, *, mini: int = 8) -> Done:
    batch = responses(rows)
    place_scores(batch, [RewardResult(None, {}, "boom") if r in failed else RewardResult(SCORES[r]) for r in rows])
    loss = ActorLossSettings(use_kl_loss=True, kl_loss_coef=0.3, entropy_coeff=0.2)
    actor, critic = make_actor(mini=mini, loss=loss), make_critic(mini=mini, zero_head=False)
    gradients = record_gradients(actor)
    critic_gradients = record_gradients(critic)
    FromPass(actor)(batch).write(batch)
    batch.rollout_log_probs = batch.old_log_probs - 0.01 * torch.arange(batch.responses.shape[1])
    batch.ref_log_probs = Reference(policy(seed=5), compute=CPU).log_probs(batch)
    batch.values, batch.final_values = critic.values(batch)
    controller = AdaptiveKLController(0.5, target_kl=0.01, horizon=100)
    metrics = KLShapedRewards(controller, "k1")(batch)
    advantages(batch)
    metrics |= critic.update(batch, step=1) | actor.update(batch, step=1)
    metrics |= mismatch_metrics(batch.rollout_log_probs, batch.old_log_probs, batch.loss_mask)
    metrics |= {name: value for name, value in batch_metrics(batch).items() if name.startswith("critic/")}
    return Done(batch, metrics, gradients + critic_gradients, controller.value, weights(actor) | {
        f"critic.{name}": value for name, value in weights(critic).items()
    })  # fmt: skip


@pytest.mark.parametrize("advantages", [GAE, GRPO], ids=["gae", "grpo"])
@pytest.mark.parametrize("failed", [{1, 6}, {0, 1, 2, 5}, {4, 5, 6, 7}], ids=["two", "three of one", "a whole group"])
def test_a_failed_row_is_as_good_as_absent(advantages, failed):
    with_them = step(list(range(8)), failed, advantages)
    kept = [row for row in range(8) if row not in failed]
    if failed == {0, 1, 2, 5} and advantages is GRPO:
        # row 3 is what is left of its group: no baseline, so it teaches nothing, but its tokens still are the policy's
        assert not with_them.batch.advantages[3].any()
        return
    without = step(kept, set(), advantages)
    assert torch.allclose(with_them.batch.advantages[kept], without.batch.advantages, atol=1e-6)
    assert not with_them.batch.advantages[sorted(failed)].any() and not with_them.batch.returns[sorted(failed)].any()
    assert len(with_them.gradients) == len(without.gradients) == 2
    for mine, theirs in zip(with_them.gradients, without.gradients, strict=True):
        assert max(g.abs().max().item() for g in theirs.values()) > 1e-3
        assert max((mine[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-6
    assert with_them.coefficient == pytest.approx(without.coefficient, abs=1e-9) and without.coefficient != 0.5
    assert with_them.metrics.keys() == without.metrics.keys()
    for name, value in without.metrics.items():
        assert with_them.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("advantages", [GAE, GRPO], ids=["gae", "grpo"])
def test_a_mini_batch_of_failed_rows_takes_no_step(advantages):
    """Two mini-batches of four rows, of which the second has no score: the step is that of the first alone."""
    both, first = step(list(range(8)), {4, 5, 6, 7}, advantages, mini=4), step([0, 1, 2, 3], set(), advantages, mini=4)
    assert len(both.gradients) == len(first.gradients) == 2  # one of the actor, one of the critic
    assert max((both.after[name] - first.after[name]).abs().max().item() for name in first.after) < 1e-6
    for name in ("actor/pg_loss", "actor/kl_loss", "critic/vf_loss", "actor/grad_norm"):
        assert both.metrics[name] == pytest.approx(first.metrics[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("advantages", [GAE, GRPO], ids=["gae", "grpo"])
def test_a_step_without_any_score_changes_nothing(advantages):
    done = step(list(range(8)), set(range(8)), advantages, mini=4)
    assert done.gradients == [] and done.coefficient == 0.5
    assert same_bits(done.after, weights(make_actor()) | {
        f"critic.{name}": value for name, value in weights(make_critic(zero_head=False)).items()
    })  # fmt: skip
    assert not done.batch.advantages.any()
    assert all(value == value for value in done.metrics.values())  # no NaN
    assert "critic/score/mean" not in done.metrics and "actor/pg_loss" not in done.metrics


def test_all_equal_rewards_give_no_gradient_through_grpo():
    """Trap 12: zero variance in every group. Not small: exactly zero, in every parameter."""
    batch = responses(list(range(8)))
    place_scores(batch, [RewardResult(0.1)] * 4 + [RewardResult(1.0)] * 4)
    actor = make_actor(micro=MicroBatches(rows=2))
    gradients = record_gradients(actor)
    batch.old_log_probs, batch.entropies = actor.log_probs(batch)
    batch.token_level_rewards = batch.token_level_scores
    GRPO(batch)
    metrics = actor.update(batch, step=1)
    assert metrics["actor/grad_norm"] == 0.0 and metrics["actor/pg_loss"] == 0.0
    assert gradients[0] and all(not g.any() for g in gradients[0].values())
