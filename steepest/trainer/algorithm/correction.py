"""Rollout correction in a step: rejected rows and tokens are left out, importance weights go to the policy loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from steepest.config.schema import Config
from steepest.config.sections.correction import pair_thresholds
from steepest.core.batch import Batch, RowStatus
from steepest.core.mismatch import mismatch_metrics, off_policy_metrics
from steepest.core.rollout_correction import Rejection, Weighting, correct
from steepest.learner.metrics import Metrics


def build_rejections(config: Config) -> tuple[Rejection, ...]:
    """The rejections that the configuration asks for, in its order."""
    correction = config.algorithm.rollout_correction
    if not correction.rollout_rs:
        return ()
    assert correction.rollout_rs_threshold is not None, "checked by config.sections.correction"
    pairs = pair_thresholds(correction.rollout_rs, correction.rollout_rs_threshold)
    return tuple(Rejection(kind, high, low) for kind, low, high in pairs)


@dataclass
class CorrectedRewards:
    """Called in the place of `shape_rewards`: corrects the batch, then has its rewards shaped.

    A response whose tokens are all rejected is left out as REJECTED, so it counts in no group, no return and no mean.
    In the other responses the rejected tokens are removed from loss_mask alone: the reward may lie on one of them, and
    the estimators read trained_mask.

    The distance of engine and trainer is measured here over trained_mask, before anything is rejected.
    """

    weighting: Weighting | None
    rejections: tuple[Rejection, ...]
    shape_rewards: Callable[[Batch], Metrics]

    def __call__(self, batch: Batch) -> Metrics:
        assert batch.rollout_log_probs is not None and batch.old_log_probs is not None
        mask = batch.trained_mask
        metrics = compare(batch.rollout_log_probs, batch.old_log_probs, mask)
        found = correct(
            batch.rollout_log_probs,
            batch.old_log_probs,
            mask,
            weighting=self.weighting,
            rejections=self.rejections,
        )
        batch.leave_out(mask.any(1) & ~found.kept.any(1), RowStatus.REJECTED)
        batch.loss_mask, batch.rollout_is_weights = batch.loss_mask & found.kept, found.weights
        return metrics | found.metrics | self.shape_rewards(batch)


def compare(rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Metrics:
    """Every number about engine and trainer, over the true tokens of `mask`."""
    return mismatch_metrics(rollout_log_probs, old_log_probs, mask) | off_policy_metrics(
        rollout_log_probs, old_log_probs, mask
    )
