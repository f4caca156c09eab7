"""The glue between batch and core: KL shaping with its controller, whitening, options by name."""

from __future__ import annotations

import torch

from steepest.core.batch import Batch, RowStatus
from steepest.core.kl import AdaptiveKLController, FixedKLController
from steepest.registry import with_options
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.kl_rewards import KLShapedRewards, plain_rewards


def batch() -> Batch:
    made = Batch.from_sequences([[1], [1]], [[2, 3], [2]], group_ids=[0, 1], truncated=[False, False])
    made.token_level_scores = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    made.kl_log_probs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    made.ref_log_probs = torch.tensor([[-1.5, -2.5], [-2.0, 0.0]])
    return made


def test_the_kl_penalty_is_taken_off_every_policy_token():
    made = batch()
    metrics = KLShapedRewards(FixedKLController(0.1), "k1")(made)
    # k1 = policy - ref: 0.5, 0.5 / -1
    assert torch.allclose(made.token_level_rewards, torch.tensor([[-0.05, 0.95], [0.6, 0.0]]))
    assert abs(metrics["actor/reward_kl_penalty"] - (0.5 - 1.0) / 2) < 1e-6
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.1


def test_the_adaptive_controller_moves_after_the_step_it_penalised():
    controller = AdaptiveKLController(0.1, 0.1, 100)
    made = batch()
    made.ref_log_probs = made.kl_log_probs - 1.0 * made.response_mask
    metrics = KLShapedRewards(controller, "k1")(made)
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.1
    # KL 1 against target 0.1: error clipped at 0.2, two rows of a horizon of 100
    assert abs(controller.value - 0.1 * (1 + 0.2 * 2 / 100)) < 1e-9


def test_the_adaptive_controller_counts_the_rows_that_its_kl_is_a_mean_of():
    controller = AdaptiveKLController(0.1, 0.1, 100)
    made = batch()
    made.ref_log_probs = made.kl_log_probs - 1.0 * made.response_mask
    made.leave_out(torch.tensor([False, True]), RowStatus.REWARD_FAILED)
    KLShapedRewards(controller, "k1")(made)
    assert abs(controller.value - 0.1 * (1 + 0.2 * 1 / 100)) < 1e-9
    made.leave_out(
        torch.tensor([True, False]), RowStatus.TRUNCATED
    )  # none is left: a KL of 0 would be far below target
    KLShapedRewards(controller, "k1")(made)
    assert abs(controller.value - 0.1 * (1 + 0.2 * 1 / 100)) < 1e-9


def test_without_kl_rewards_are_the_scores():
    made = batch()
    assert plain_rewards(made) == {}
    assert torch.equal(made.token_level_rewards, made.token_level_scores)


def test_advantages_are_whitened_only_where_asked():
    def estimator(inputs):
        return inputs.token_level_rewards * inputs.response_mask, inputs.token_level_rewards

    made = batch()
    plain_rewards(made)
    Advantages(estimator, whitened=False)(made)
    assert torch.equal(made.advantages, made.token_level_scores)
    Advantages(estimator, whitened=True)(made)
    picked = made.advantages[made.loss_mask]
    assert abs(float(picked.mean())) < 1e-6 and abs(float(picked.var()) - 1.0) < 1e-5


def test_a_function_gets_the_options_it_names_and_no_others():
    def loss(x, *, low, high=0.5):
        return x, low, high

    assert with_options(loss, {"low": 0.1, "other": 3})(1) == (1, 0.1, 0.5)
