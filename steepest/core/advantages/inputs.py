"""The inputs of advantage estimators, and the table of estimators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from steepest.config.algorithms import ESTIMATORS, EXTRAS
from steepest.core.batch import Batch
from steepest.core.registration import Algorithms
from steepest.errors import setting

ADVANTAGE_ESTIMATORS = Algorithms("advantage estimator", setting("adv_estimator"), ESTIMATORS)

_SHAPES = {
    "token_level_rewards": ("B", "T"),
    "values": ("B", "T"),
    "group_ids": ("B",),
    "final_values": ("B",),
    "truncated": ("B",),
    "old_log_probs": ("B", "T"),
    "rollout_is_weights": ("B", "T"),
}


@dataclass(frozen=True)
class AdvantageInputs:
    """The inputs of an estimator. A field is None, and an extra is missing, if the estimator's `needs` does not name
    it.

    Values at masked positions, and in rows without a true token, are ignored.
    """

    token_level_rewards: Tensor
    """(B, T) f32, the reward of producing token t: a score lies on the last policy token, a KL penalty on each."""
    response_mask: Tensor
    """(B, T) bool, true on tokens that the policy produced; in a run the batch's `trained_mask`, false in rows that are
    left out."""
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
    rollout_is_weights: Tensor | None = None
    """(B, T) f32, importance weights of old over rollout policy; None where the run has none."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors by name that only some estimators read; config.algorithms.EXTRAS has their shapes.

    named_rewards (B, K) f32     K rewards of each response; token_level_rewards need not be their sum
    reward_baselines (B,) f32    the reward of the greedy response to the row's prompt
    sum_pi_squared (B, T) f32    sum over the vocabulary of the squared probabilities that token t was drawn from
    """

    def __post_init__(self) -> None:
        for name, shape in _SHAPES.items():
            found = getattr(self, name)
            if found is not None:
                self._check(name, found, shape)
        for name, found in self.extras.items():
            if name in EXTRAS:
                self._check(name, found, EXTRAS[name].shape)

    @classmethod
    def of(cls, batch: Batch) -> AdvantageInputs:
        """The fields of a batch that have the same names; response_mask is its trained_mask, so that a reward on a
        token that the losses leave out still counts."""
        names = [item.name for item in dataclasses.fields(cls) if item.name != "response_mask"]
        return cls(response_mask=batch.trained_mask, **{name: getattr(batch, name) for name in names})

    def _check(self, name: str, found: Tensor, shape: tuple[str, ...]) -> None:
        sizes = dict(zip("BT", self.response_mask.shape, strict=True))
        wanted = [sizes.get(letter, letter) for letter in shape]
        fits = found.dim() == len(wanted) and all(
            isinstance(size, str) or size == got for size, got in zip(wanted, found.shape, strict=True)
        )
        if not fits:
            expected = ", ".join(map(str, wanted)) + ("," if len(wanted) == 1 else "")
            raise ValueError(f"AdvantageInputs.{name} has shape {tuple(found.shape)}, expected ({expected})")

    def require(self, name: str, reader: str) -> Tensor:
        """The optional field or the extra `name`, or ValueError saying that `reader` needs it."""
        value: Tensor | None = self.extras.get(name, getattr(self, name, None))
        if value is None:
            raise ValueError(f"{reader} needs AdvantageInputs.{name}, which is None")
        return value
