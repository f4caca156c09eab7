"""The mutations by which `scripts/mutate` breaks `steepest/core`: one line each, grouped by file."""

from __future__ import annotations

from mutations import advantages, batch, log_probs, losses
from mutations.mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = [*batch.MUTATIONS, *advantages.MUTATIONS, *losses.MUTATIONS, *log_probs.MUTATIONS]
