"""The mutations by which `scripts/mutate` breaks the package: one line each, grouped by file."""

from __future__ import annotations

from mutations import advantages, batch, learner, log_probs, losses, masks
from mutations.mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = [
    *batch.MUTATIONS,
    *advantages.MUTATIONS,
    *losses.MUTATIONS,
    *log_probs.MUTATIONS,
    *learner.MUTATIONS,
    *masks.MUTATIONS,
]
