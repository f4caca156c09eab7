"""From scores to rewards per token: the KL penalty to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from steepest.core.batch import Batch
from steepest.core.kl import apply_kl_penalty
from steepest.learner.metrics import Metrics


class KLController(Protocol):
    @property
    def value(self) -> float: ...
    def update(self, kl: float, num_rows: int) -> None: ...
    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state: dict[str, float]) -> None: ...


def plain_rewards(batch: Batch) -> Metrics:
    """No KL term in the reward: token_level_rewards are the scores."""
    batch.token_level_rewards = batch.token_level_scores
    return {}


@dataclass
class KLShapedRewards:
    """r_t = score_t - coef * kl(kl_log_probs_t, ref_log_probs_t), and the controller's update of coef.

    `actor/reward_kl_penalty` is the mean over rows of the row's mean KL (before this step's update), and
    `actor/reward_kl_penalty_coeff` the coefficient this step was penalised with. The controller counts the rows of
    that mean: those with a token of trained_mask. A step without one says nothing about the KL and moves nothing.
    """

    controller: KLController
    kind: str

    def __call__(self, batch: Batch) -> Metrics:
        assert batch.token_level_scores is not None
        assert batch.kl_log_probs is not None and batch.ref_log_probs is not None
        coef, mask = self.controller.value, batch.trained_mask
        batch.token_level_rewards, mean_kl = apply_kl_penalty(
            batch.token_level_scores,
            batch.kl_log_probs,
            batch.ref_log_probs,
            mask,
            coef=coef,
            kind=self.kind,
        )
        kl = float(mean_kl)
        self.controller.update(kl, int(mask.any(dim=1).sum()))
        return {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": coef}
