"""Where the log-probs before the update come from: four strategies; `Plan.old_log_probs` says which one.

FromPass      a pass of the actor
FromUpdate    the step's one update computes them itself; nothing reads them before
FromEngine    the rollout engine's, checked against the actor on some rows of each step
FromRollout   the rollout engine's, unchecked (bypass mode)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from steepest.core.batch import Batch


class PolicyPasses(Protocol):
    """The passes of the actor that the strategies use; a cluster offers them."""

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]: ...
    def log_probs_and_squares(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]: ...
    def policy_is_reference(self) -> bool: ...


@dataclass(frozen=True)
class OldLogProbs:
    """Log-probs of the policy before the update, all (B, T) f32."""

    kl_log_probs: Tensor | None = None
    """Read by the KL penalty in the reward. None: nothing reads them."""
    ratio_log_probs: Tensor | None = None
    """Read by the loss's ratio. None: the step's one update computes them itself, so that its ratio is 1."""
    entropies: Tensor | None = None
    """None: the update measures the entropy."""
    recomputed: Tensor | None = None
    """(B,) bool, rows whose ratio_log_probs are the actor's own, the others' being the engine's; None: all rows."""
    extras: dict[str, Tensor] = field(default_factory=dict)

    def write(self, batch: Batch) -> None:
        """Put them into their fields of the batch."""
        batch.kl_log_probs, batch.old_log_probs = self.kl_log_probs, self.ratio_log_probs
        batch.entropies, batch.recomputed = self.entropies, self.recomputed
        batch.extras |= self.extras


@dataclass(frozen=True)
class FromPass:
    """A pass of the actor before the update."""

    actor: PolicyPasses
    squares: bool = False
    """The pass also sums the squared probabilities of the vocabulary (`extras["sum_pi_squared"]`)."""

    def __call__(self, batch: Batch) -> OldLogProbs:
        if self.squares:
            log_probs, entropies, squares = self.actor.log_probs_and_squares(batch)
            return OldLogProbs(log_probs, log_probs, entropies, extras={"sum_pi_squared": squares})
        log_probs, entropies = self.actor.log_probs(batch)
        return OldLogProbs(log_probs, log_probs, entropies)


@dataclass(frozen=True)
class FromUpdate:
    """The step has one update and nothing reads old log-probs before it: those of the update itself are the old ones,
    and it writes them into the batch."""

    def __call__(self, batch: Batch) -> OldLogProbs:
        return OldLogProbs()


@dataclass(frozen=True)
class FromRollout:
    """Bypass mode: the loss's ratio is training over rollout."""

    def __call__(self, batch: Batch) -> OldLogProbs:
        assert batch.rollout_log_probs is not None
        return OldLogProbs(batch.rollout_log_probs, batch.rollout_log_probs)


BOUND = 1e-3
"""Largest difference of a token's log-prob, in nats, up to which the engine's stand in for the actor's: a ratio is off
by a thousandth at most, of a clip range of 0.2. In float32 engine and actor agree to about 1e-5."""
ROWS_OF_A_CHECK = 16
"""One row of so many is computed by the actor too, and compared."""


def sample_rows(batch: Batch) -> Tensor:
    """(k,) int64: a sixteenth of the rows with a token of trained_mask, at least one where there is any, ascending.

    The choice is a function of these tokens alone, so a step that is repeated after a resume makes it again.
    """
    mask = batch.trained_mask
    rows = mask.any(dim=1).nonzero()[:, 0]
    seed = int(batch.responses.masked_fill(~mask, 0).sum())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[: -(-len(rows) // ROWS_OF_A_CHECK)]].sort().values


@dataclass
class FromEngine:
    """The engine's log-probs, where a sample of rows shows in each step that they are the actor's.

    The engine sampled with the very weights that are about to be trained, so its log-probs are the old ones as far as
    the two programs agree. Rows of the sample keep the actor's own. Where one token of theirs differs by more than
    `bound`, or is no number, the actor computes the other rows as well, and `warn_once` is called.
    """

    actor: PolicyPasses
    one_update: bool
    """The step's one update takes its own log-probs, so that its ratio is 1: the engine's serve the KL alone."""
    warn_once: Callable[[str], None]
    """Prints a warning the first time that it is called."""
    checks_reference: bool = False
    """While the policy is still the reference, bit for bit, the actor has a pass: then their KL is 0. By the engine's
    log-probs it would be rounding, which Adam turns into whole steps where no response scored."""
    bound: float = BOUND

    def __call__(self, batch: Batch) -> OldLogProbs:
        assert batch.rollout_log_probs is not None
        if self.checks_reference and self.actor.policy_is_reference():
            return FromPass(self.actor)(batch)
        rows = sample_rows(batch)
        found, entropies = self.actor.log_probs(batch.select(rows))
        if self._agrees(batch, rows, found):
            log_probs = batch.rollout_log_probs.index_copy(0, rows, found)
            if self.one_update:
                return OldLogProbs(log_probs)
            recomputed = torch.zeros(len(batch), dtype=torch.bool).index_fill_(0, rows, True)
            return OldLogProbs(log_probs, log_probs, recomputed=recomputed)
        others = torch.ones(len(batch), dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
        more, more_entropies = self.actor.log_probs(batch.select(others))
        log_probs, all_entropies = torch.zeros_like(batch.rollout_log_probs), torch.zeros_like(batch.rollout_log_probs)
        for picks, part, part_entropies in ((rows, found, entropies), (others, more, more_entropies)):
            log_probs[picks], all_entropies[picks] = part, part_entropies
        return OldLogProbs(log_probs, log_probs, all_entropies)

    def _agrees(self, batch: Batch, rows: Tensor, found: Tensor) -> bool:
        assert batch.rollout_log_probs is not None
        difference = (found - batch.rollout_log_probs[rows]).abs()[batch.trained_mask[rows]]
        if bool((difference <= self.bound).all()):  # a NaN is not
            return True
        self.warn_once(
            f"the rollout engine's log-probs differ from the actor's by {float(difference.max()):.2g} nats at a "
            f"token (bound {self.bound:g}): the actor's are computed for all rows, in each step where they do. "
            "mismatch/* has the distance; actor_rollout_ref.actor.old_log_probs=recompute leaves the "
            "check out."
        )
        return False
