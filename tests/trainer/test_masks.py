"""Masks over a whole step: who writes row_status and loss_mask, and that nobody writes response_mask."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from steepest.core.advantages import AdvantageInputs, gae, grpo
from steepest.core.advantages.groups import total_rewards
from steepest.core.batch import Batch, RowStatus
from steepest.core.kl import FixedKLController
from steepest.core.rollout_correction import Rejection, Weighting
from steepest.learner.actor import ActorLossSettings
from steepest.learner.critic import CriticLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.rewards.api import RewardResult
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.correction import CorrectedRewards
from steepest.trainer.algorithm.kl_rewards import KLShapedRewards, plain_rewards
from steepest.trainer.algorithm.row_selection import (
    DrawnRows,
    PretrainingReturns,
    mask_equal_groups,
    mask_truncated,
)
from steepest.trainer.experience.api import Experience
from steepest.trainer.experience.greedy_baseline import GreedyBaseline
from steepest.trainer.experience.scoring import Scorer, StepScorer, place_scores
from steepest.trainer.run.metrics import batch_metrics
from tests.support.fake_parts import FakePool, NumberTokenizer, prompt
from tests.support.learner_parts import make_actor, make_batch, make_critic, same_bits, weights, with_log_probs

T, F = True, False
ROWS_OF = ("trained", "reward_failed", "truncated", "equal_group", "rejected")


def trajectory() -> Batch:
    """Policy, tool, policy, tool; and a row that ends in the policy's own token."""
    return Batch.from_sequences(
        [[1], [1]], [[2, 3, 4, 5], [6, 7]], response_mask=[[T, F, T, F], [T, T]], group_ids=[0, 1], truncated=[F, F]
    )


def test_a_trajectory_that_ends_in_tool_output_keeps_its_reward():
    batch = trajectory()
    place_scores(batch, [RewardResult(2.0), RewardResult(-1.0)])
    assert batch.token_level_scores.tolist() == [[0, 0, 2.0, 0], [0, -1.0, 0, 0]]
    batch.kl_log_probs, batch.values = torch.full((2, 4), -1.0), torch.zeros(2, 4)
    batch.ref_log_probs = torch.full((2, 4), -1.5)
    KLShapedRewards(FixedKLController(0.1), "k1")(batch)
    inputs = AdvantageInputs(batch.token_level_rewards, batch.trained_mask, group_ids=batch.group_ids)
    # k1 is 0.5 at each of two policy tokens, 0.05 after the coefficient
    assert total_rewards(inputs).tolist() == pytest.approx([2.0 - 0.1, -1.0 - 0.1])
    Advantages(partial(gae, gamma=1.0, lam=1.0), whitened=False)(batch)
    torch.testing.assert_close(batch.returns, torch.tensor([[1.9, 0, 1.95, 0], [-1.1, -1.05, 0, 0]]))


def test_without_a_kl_the_total_reward_is_the_score():
    batch = trajectory()
    place_scores(batch, [RewardResult(2.0), RewardResult(-1.0)])
    plain_rewards(batch)
    inputs = AdvantageInputs(batch.token_level_rewards, batch.trained_mask, group_ids=batch.group_ids)
    assert total_rewards(inputs).tolist() == [2.0, -1.0]


def test_a_row_without_a_policy_token_has_its_score_nowhere_and_counts_in_no_group():
    batch = Batch.from_sequences(
        [[1]] * 3,
        [[2, 3]] * 3,
        response_mask=[[T, T], [T, T], [F, F]],
        group_ids=[0] * 3,
        truncated=[F] * 3,
        rollout_log_probs=[[-1.0, -1.0]] * 3,
    )
    batch.old_log_probs = torch.full((3, 2), -1.0)
    place_scores(batch, [RewardResult(1.0), RewardResult(0.0), RewardResult(9.0)])
    assert batch.token_level_scores.tolist() == [[0, 1.0], [0, 0], [0, 0]]
    CorrectedRewards(None, (Rejection("token_k1", 2.0),), plain_rewards)(batch)
    assert batch.row_status.tolist() == [0, 0, 0], "nothing of it was rejected"
    Advantages(partial(grpo, norm_by_std=False), whitened=False)(batch)
    assert batch.advantages.tolist() == [[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]]
    assert batch_metrics(batch)["critic/score/mean"] == 0.5


def failing_greedy() -> StepScorer:
    """Scores the greedy response to prompt 3 with an error, all others with 0."""

    def value(request) -> RewardResult:
        return RewardResult(None, {}, "no") if request.solution == "3" else RewardResult(0.0)

    return StepScorer(Scorer(FakePool(value), NumberTokenizer()))


def whole_batch() -> Batch:
    """Seven groups of two rows; row 0 has a tool token, the fates of the others are in `after_all_writers`."""
    mask = [[T, F, T], *[[T, T, T]] * 13]
    batch = Batch.from_sequences(
        [[1]] * 14,
        [[2, 3, 4]] * 14,
        response_mask=mask,
        group_ids=[g for g in range(7) for _ in range(2)],
        truncated=[row in (2, 4) for row in range(14)],
        rollout_log_probs=[[-1.0, -1.0, -1.0]] * 14,
        samples=[prompt(g) for g in range(7) for _ in range(2)],
    )
    batch.old_log_probs, batch.values = torch.full((14, 3), -1.0), torch.zeros(14, 3)
    batch.kl_log_probs, batch.ref_log_probs = batch.old_log_probs, batch.old_log_probs - 0.5
    batch.rollout_log_probs[11] = -9.0
    batch.rollout_log_probs[0, 2] = batch.rollout_log_probs[12, 1] = -9.0
    return batch


SCORES = [1.0, 0.0, None, 0.0, 1.0, 0.0, 1.0, 0.0, 0.5, 0.5, 1.0, 0.0, 1.0, 0.0]


def greedy_responses(prompts) -> Batch:
    """One response a prompt: its number."""
    numbers = [int(one.ground_truth) for one in prompts]
    return Batch.from_sequences(
        [[1]] * 7, [[n] for n in numbers], group_ids=range(7), truncated=[F] * 7, samples=list(prompts)
    )


def after_all_writers(check=lambda batch: None) -> Batch:
    """The batch after every writer of row_status and loss_mask, in the order of a step; `check` sees it after each."""

    def collect(step: int) -> Experience:
        scored = whole_batch()
        place_scores(scored, [RewardResult(s, {}, None if s is not None else "no") for s in SCORES])
        check(scored)
        return Experience(scored, [])

    batch = GreedyBaseline(collect, greedy_responses, failing_greedy(), lambda batch: 0.0)(1).batch
    check(batch)
    correct = CorrectedRewards(
        Weighting("token", 3.0), (Rejection("token_k1", 2.0),), KLShapedRewards(FixedKLController(0.1), "k1")
    )
    for write in (
        lambda: mask_truncated(batch),
        lambda: mask_equal_groups(batch),
        lambda: correct(batch),
        lambda: Advantages(partial(gae, gamma=1.0, lam=1.0), whitened=True)(batch),
    ):
        write()
        check(batch)
    return batch


def test_no_writer_of_a_step_changes_response_mask():
    written = whole_batch().response_mask

    def check(batch: Batch) -> None:
        assert torch.equal(batch.response_mask, written)
        assert not (batch.loss_mask & ~batch.trained_mask).any()

    batch = after_all_writers(check)
    for update in (make_actor(micro=MicroBatches(rows=3)), make_critic(micro=MicroBatches(rows=3))):
        update.update(batch, step=1)
        check(batch)


def test_each_row_has_the_first_reason_it_was_left_out_for():
    batch = after_all_writers()
    status = {
        2: RowStatus.REWARD_FAILED,
        4: RowStatus.TRUNCATED,
        6: RowStatus.REWARD_FAILED,
        7: RowStatus.REWARD_FAILED,
    }
    status |= {8: RowStatus.EQUAL_GROUP, 9: RowStatus.EQUAL_GROUP, 11: RowStatus.REJECTED}
    status |= {3: RowStatus.EQUAL_GROUP, 5: RowStatus.EQUAL_GROUP}  # alone in their groups
    assert batch.row_status.tolist() == [status.get(row, RowStatus.TRAINED) for row in range(14)]
    trained = [0, 1, 10, 12, 13]
    assert batch.trained_mask.any(1).nonzero()[:, 0].tolist() == trained
    wanted = torch.zeros(14, 3, dtype=torch.bool)
    wanted[trained] = True
    wanted[0, 1] = wanted[0, 2] = wanted[12, 1] = False  # a tool token, two rejected ones
    assert torch.equal(batch.loss_mask, wanted)
    assert batch.advantages[~wanted].eq(0).all() and batch.returns[~wanted].eq(0).all()
    assert batch.returns[0, 0] == pytest.approx(1.0 - 0.1), "the reward on the rejected token and both KL terms arrive"


def test_metrics_count_rows_by_status():
    metrics = batch_metrics(after_all_writers())
    assert [metrics[f"rows/{name}"] for name in ROWS_OF] == [5.0, 3.0, 1.0, 4.0, 1.0]
    assert all(isinstance(metrics[f"rows/{name}"], float) for name in ROWS_OF)


def test_value_pretraining_on_drawn_rows_reads_the_masks_of_those_rows():
    """PF-PPO draws row 1 alone, whose only policy tokens are the outer two: its returns have its own mask."""
    batch = Batch.from_sequences(
        [[1], [1]], [[2, 3, 4], [2, 3, 4]], response_mask=[[T, T, T], [T, F, T]], group_ids=[0, 1], truncated=[F, F]
    )
    place_scores(batch, [RewardResult(0.0), RewardResult(4.0)])
    plain_rewards(batch)
    drawn, _ = DrawnRows("pow", 2.0, seed=3)(batch, 1)
    assert drawn.group_ids.tolist() == [1, 1], "a score of 0 has no weight"
    assert PretrainingReturns(num_steps=2, gamma=0.5)(drawn, 1).returns.tolist() == [[2.0, 0.0, 4.0]] * 2


def test_correction_measures_and_normalises_over_trained_rows_alone():
    """Row 1 has no score, and the engine is far off there: neither metrics nor the mean of the weights know it."""
    batch = Batch.from_sequences(
        [[1]] * 2, [[2, 3]] * 2, group_ids=[0, 1], truncated=[F, F], rollout_log_probs=[[-1.0, -1.5], [-9.0, -9.0]]
    )
    batch.old_log_probs = torch.full((2, 2), -1.0)
    place_scores(batch, [RewardResult(1.0), RewardResult(None, {}, "no")])
    metrics = CorrectedRewards(Weighting("token", 3.0, None, True), (), plain_rewards)(batch)
    assert metrics["mismatch/max_abs_diff"] == pytest.approx(0.5)
    # weights 1 and e^0.5, divided by their mean
    half = torch.tensor(0.5).exp()
    torch.testing.assert_close(batch.rollout_is_weights[0], torch.stack([torch.ones(()), half]) / ((1 + half) / 2))


@pytest.mark.parametrize("micro", [MicroBatches(), MicroBatches(rows=3)], ids=["whole", "rows"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_updates_treat_a_rejected_token_as_tool_output(micro, mode):
    """Same tokens, once left out of loss_mask and once written by the rollout as not the policy's: the same bits."""
    batch = with_log_probs(make_batch(), make_actor(), shift=0.1)
    keep = torch.rand(batch.responses.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    rejected = replace(batch, loss_mask=batch.loss_mask & keep)
    tool = replace(batch, response_mask=batch.response_mask & keep, loss_mask=batch.loss_mask & keep)
    assert rejected.trained_mask.sum() > rejected.loss_mask.sum() == tool.trained_mask.sum()
    found = []
    for given in (rejected, tool):
        actor = make_actor(micro=micro, loss=ActorLossSettings(mode, use_kl_loss=True, entropy_coeff=0.1))
        critic = make_critic(micro=micro, zero_head=False, loss=CriticLossSettings(loss_agg_mode=mode))
        metrics = actor.update(replace(given), step=1) | critic.update(replace(given), step=1)
        found.append((metrics, weights(actor), weights(critic)))
    assert found[0][0] == found[1][0] and found[0][0]["actor/grad_norm"] > 0
    assert same_bits(found[0][1], found[1][1]) and same_bits(found[0][2], found[1][2])


def test_pf_ppo_draws_no_row_that_is_left_out():
    batch = trajectory()
    place_scores(batch, [RewardResult(1.0), RewardResult(100.0)])
    batch.leave_out(torch.tensor([F, T]), RowStatus.TRUNCATED)
    assert DrawnRows("pow", 2.0, seed=3)(batch, 1)[0].group_ids.tolist() == [0, 0]
