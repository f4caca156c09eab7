"""Policy losses: from log-probs and advantages to a loss per token.

Each loss is one function: `LossInputs` in, `(loss per token, stats per token)` out, its options as keywords. It knows
neither micro-batches nor ranks; `aggregation.aggregate` turns the loss per token into a number. A loss that needs the
whole mini-batch, e.g. to pick tokens, has a second function, which the entry declares as `choose`.
"""

from __future__ import annotations

from steepest.core.policy_losses.clip import ppo_clip
from steepest.core.policy_losses.covariance import (
    choose_clip_cov,
    choose_kl_cov,
    clip_by_covariance,
    covariances,
    penalise_by_covariance,
)
from steepest.core.policy_losses.gated import soft_gate
from steepest.core.policy_losses.inputs import MAX_LOG_RATIO, POLICY_LOSSES, LossInputs
from steepest.core.policy_losses.sequence import geometric_mean, sequence_clip
from steepest.core.policy_losses.weighted import (
    clipped_weight,
    policy_gradient,
    trust_by_divergence,
    trust_by_total_variation,
)

__all__ = [
    "MAX_LOG_RATIO",
    "POLICY_LOSSES",
    "LossInputs",
    "choose_clip_cov",
    "choose_kl_cov",
    "clip_by_covariance",
    "clipped_weight",
    "covariances",
    "geometric_mean",
    "penalise_by_covariance",
    "policy_gradient",
    "ppo_clip",
    "sequence_clip",
    "soft_gate",
    "trust_by_divergence",
    "trust_by_total_variation",
]
