"""How far the engine that sampled is from the trainer that learns, on the same weights and the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.masked import masked_mean, masked_var


@torch.no_grad()
def mismatch_metrics(rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Distance between the log-probs sampled with and those recomputed, over the true tokens.

        d = old_log_prob - rollout_log_prob          w = exp(d), the importance weight of a token

        mismatch/kl             mean(-d)                    KL(engine || trainer), k1
        mismatch/k3_kl          mean(exp(d) - 1 - d)        the same, never negative
        mismatch/max_ratio      max(w)
        mismatch/mean_abs_diff  mean(|d|)
        mismatch/max_abs_diff   max(|d|)
        mismatch/ess            sum(w)^2 / (n * sum(w^2))   effective sample size, 1 when all weights are equal
        training/rollout_probs_diff_mean, _max, _std        of |exp(old) - exp(rollout)|, verl's names

    All tensors are (B, T), mask is bool; masked positions are ignored. Equal log-probs give 0 everywhere, max_ratio
    and ess 1; so does a mask without a true token. With one token the std is 0.
    """
    zero = torch.zeros_like(old_log_probs)
    d = torch.where(mask, old_log_probs - rollout_log_probs, zero)
    probs_diff = (torch.where(mask, old_log_probs, zero).exp() - torch.where(mask, rollout_log_probs, zero).exp()).abs()
    if not bool(mask.any()):
        max_d, ess = zero.sum(), zero.sum() + 1.0
    else:
        max_d = torch.where(mask, d, -torch.inf).max()
        # The share does not change with a common factor, so the largest weight is set to 1 and nothing overflows.
        weights = torch.where(mask, (d - max_d).exp(), zero)
        ess = weights.sum() ** 2 / (mask.sum() * (weights**2).sum())
    named = {
        "mismatch/kl": -masked_mean(d, mask),
        "mismatch/k3_kl": masked_mean(torch.expm1(d) - d, mask),
        "mismatch/max_ratio": max_d.exp(),
        "mismatch/mean_abs_diff": masked_mean(d.abs(), mask),
        "mismatch/max_abs_diff": d.abs().max(),
        "mismatch/ess": ess,
        "training/rollout_probs_diff_mean": masked_mean(probs_diff, mask),
        "training/rollout_probs_diff_max": probs_diff.max(),
        "training/rollout_probs_diff_std": masked_var(probs_diff, mask).sqrt(),
    }
    # One transfer from the device instead of nine. Adding 0 turns -0.0 into 0.0.
    numbers = (torch.stack(list(named.values())) + 0.0).tolist()
    return dict(zip(named, numbers, strict=True))
