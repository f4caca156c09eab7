"""What an advantage estimator is given, and where estimators are registered."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steepest.registry import Registry

ADVANTAGE_ESTIMATORS = Registry("advantage estimator", "algorithm.adv_estimator")


@dataclass(frozen=True)
class AdvantageInputs:
    """What an estimator may read. Fields that are None were not asked for by its `needs`.

    What lies at masked positions, and in rows without a true token, is ignored, whatever it is.
    """

    token_level_rewards: Tensor
    """(B, T) f32, the reward of producing token t; a sequence's reward lies on its last true token."""
    response_mask: Tensor
    """(B, T) bool, true on tokens that the policy produced."""
    values: Tensor | None = None
    """(B, T) f32, V of the state before token t is produced."""
    group_ids: Tensor | None = None
    """(B,) int64, which prompt a response belongs to."""
    final_values: Tensor | None = None
    """(B,) f32, V of the state after the last response token."""
    truncated: Tensor | None = None
    """(B,) bool, true when the response hit the length limit."""
    old_log_probs: Tensor | None = None
    """(B, T) f32, log-probs of the tokens before the update."""
    sum_pi_squared: Tensor | None = None
    """(B, T) f32, sum over the vocabulary of the squared probabilities that token t was drawn from."""
    rollout_is_weights: Tensor | None = None
    """(B, T) f32, importance weights of old over rollout policy; None where the run has none."""
    reward_baselines: Tensor | None = None
    """(B,) f32, the reward of the greedy response to the row's prompt."""
    named_rewards: Tensor | None = None
    """(B, K) f32, K rewards of each response, of which token_level_rewards need not be the sum."""

    def __post_init__(self) -> None:
        full, rows = self.response_mask.shape, self.response_mask.shape[:1]
        wanted = {
            "token_level_rewards": full,
            "values": full,
            "group_ids": rows,
            "final_values": rows,
            "truncated": rows,
            "old_log_probs": full,
            "sum_pi_squared": full,
            "rollout_is_weights": full,
            "reward_baselines": rows,
        }
        for name, shape in wanted.items():
            found = getattr(self, name)
            if found is not None and found.shape != shape:
                raise ValueError(f"AdvantageInputs.{name} has shape {tuple(found.shape)}, expected {tuple(shape)}")
        if self.named_rewards is not None and (self.named_rewards.dim() != 2 or len(self.named_rewards) != rows[0]):
            raise ValueError(
                f"AdvantageInputs.named_rewards has shape {tuple(self.named_rewards.shape)}, expected ({rows[0]}, K)"
            )

    def require(self, name: str, reader: str) -> Tensor:
        """The optional field `name`, or ValueError saying that `reader` needs it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{reader} needs AdvantageInputs.{name}, which is None")
        return value
