"""Log-probs before the update without a pass of their own: the actor's wrappers, chosen once at start.

The engine sampled with the very weights that are about to be trained, so its log-probs are the old ones as far as the
two programs agree. Whether they do is looked at in every step, on some of its rows, never taken for granted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.batch import Batch
from steepest.learner.actor import Actor
from steepest.learner.metrics import Metrics
from steepest.trainer.ppo import ActorLike

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
class ActorOfEngineLogProbs:
    """The actor, with the engine's log-probs for old ones where a sample of rows shows that they are the same.

    Rows of the sample keep the actor's own. Where one token of theirs differs by more than `bound`, or is no number,
    the actor computes the other rows as well, and says so by `say`, once.
    """

    actor: ActorLike
    one_update: bool
    """The step's one update takes its own log-probs, so that its ratio is 1: the engine's serve what comes before."""
    say: Callable[[str], None]
    is_reference: Callable[[], bool] = lambda: False
    """Whether the policy is still the reference, bit for bit. Then the KL between them is 0 by the actor's own pass;
    by the engine's log-probs it would be rounding, of which Adam makes whole steps where no response scored."""
    bound: float = BOUND
    told: bool = False

    def log_probs(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """(old log-probs, entropies) (B, T) f32; no entropies where the engine's log-probs stand in."""
        assert batch.rollout_log_probs is not None
        if self.is_reference():
            return self.actor.log_probs(batch)
        rows = sample_rows(batch)
        found, entropies = self._compute(batch, rows)
        if self._agrees(batch, rows, found):
            batch.recomputed = torch.zeros(len(batch), dtype=torch.bool).index_fill_(0, rows, True)
            return batch.rollout_log_probs.index_copy(0, rows, found), None
        others = torch.ones(len(batch), dtype=torch.bool).index_fill_(0, rows, False).nonzero()[:, 0]
        more, more_entropies = self._compute(batch, others)
        log_probs, all_entropies = torch.zeros_like(batch.rollout_log_probs), torch.zeros_like(batch.rollout_log_probs)
        for picks, part, part_entropies in ((rows, found, entropies), (others, more, more_entropies)):
            log_probs[picks], all_entropies[picks] = part, part_entropies
        return log_probs, all_entropies

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """As the actor's."""
        if self.one_update and batch.recomputed is not None:
            batch.old_log_probs = batch.recomputed = None
        return self.actor.update(batch, step=step)

    def _compute(self, batch: Batch, rows: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, entropies = self.actor.log_probs(batch.select(rows))
        assert log_probs is not None and entropies is not None
        return log_probs, entropies

    def _agrees(self, batch: Batch, rows: Tensor, found: Tensor) -> bool:
        assert batch.rollout_log_probs is not None
        mask = batch.trained_mask[rows]
        difference = (found - batch.rollout_log_probs[rows]).abs()[mask]
        if bool((difference <= self.bound).all()):  # a NaN is not
            return True
        if not self.told:
            self.told = True
            self.say(
                f"the rollout engine's log-probs differ from the actor's by {float(difference.max()):.2g} nats at a "
                f"token (bound {self.bound:g}): the actor's are computed for all rows, in each step where they do. "
                "mismatch/* tells how far they are apart; actor_rollout_ref.actor.old_log_probs=recompute leaves the "
                "check out."
            )
        return False


@dataclass
class ActorWithSquares:
    """The actor, whose pass before the update also writes batch.extras["sum_pi_squared"] for the estimator."""

    actor: Actor

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(old log-probs, entropies) (B, T) f32."""
        log_probs, entropies, batch.extras["sum_pi_squared"] = self.actor.log_probs_and_squares(batch)
        return log_probs, entropies

    def update(self, batch: Batch, *, step: int) -> Metrics:
        """As the actor's."""
        return self.actor.update(batch, step=step)
