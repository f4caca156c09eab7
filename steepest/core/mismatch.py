"""Metrics of the distance between the engine's log-probs and the trainer's, on the same weights and tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.masked import masked_mean, masked_sum, masked_var

_SAFE = 20.0
"""exp() of a log-ratio is taken within +-20, as verl does."""
_TINY = 1e-30


@torch.no_grad()
def mismatch_metrics(rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """Distance between the engine's log-probs of the sampled tokens and the recomputed ones, over the true tokens.

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
    return _numbers(named)


@torch.no_grad()
def off_policy_metrics(rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, float]:
    """The same distance under verl's names, by token and by response.

        d = old_log_prob - rollout_log_prob        D = mean of d over a row's true tokens

        rollout_corr/kl, k3_kl              means over tokens of -d and of exp(d) - 1 - d
        rollout_corr/{training,rollout}_ppl, _log_ppl   means over rows of the row's (log) perplexity
        rollout_corr/log_ppl_diff, _abs_diff, _diff_max, _diff_min      of -D over rows
        rollout_corr/ppl_ratio              mean over rows of exp(-D)
        rollout_corr/chi2_token, chi2_seq   mean of exp(2 d) - 1 over tokens, of exp(2 sum d) - 1 over rows
        training/rollout_actor_probs_pearson_corr       correlation of the two probabilities over tokens

    All tensors are (B, T), mask is bool; masked positions and rows without a true token are ignored; without any true
    token every number is 0. Exponents are held within +-20, as verl's. The correlation of probabilities that do not
    vary is 0.
    """
    d = torch.where(mask, old_log_probs - rollout_log_probs, 0.0)
    old, rollout = (torch.where(mask, x, 0.0) for x in (old_log_probs, rollout_log_probs))
    rows = mask.any(1)
    old_row, rollout_row = masked_mean(old, mask, dim=1), masked_mean(rollout, mask, dim=1)
    diff = rollout_row - old_row
    any_row = bool(rows.any())
    named = {
        "rollout_corr/kl": -masked_mean(d, mask),
        "rollout_corr/k3_kl": masked_mean(torch.expm1(d.clamp(max=_SAFE)) - d, mask),
        "rollout_corr/training_ppl": masked_mean((-old_row).exp(), rows),
        "rollout_corr/training_log_ppl": masked_mean(-old_row, rows),
        "rollout_corr/rollout_ppl": masked_mean((-rollout_row).exp(), rows),
        "rollout_corr/rollout_log_ppl": masked_mean(-rollout_row, rows),
        "rollout_corr/log_ppl_diff": masked_mean(diff, rows),
        "rollout_corr/log_ppl_abs_diff": masked_mean(diff.abs(), rows),
        "rollout_corr/log_ppl_diff_max": torch.where(rows, diff, -torch.inf).amax() if any_row else diff.sum(),
        "rollout_corr/log_ppl_diff_min": torch.where(rows, diff, torch.inf).amin() if any_row else diff.sum(),
        "rollout_corr/ppl_ratio": masked_mean(diff.exp(), rows),
        "rollout_corr/chi2_token": masked_mean(torch.expm1(2.0 * d.clamp(-_SAFE, _SAFE)), mask),
        "rollout_corr/chi2_seq": masked_mean(torch.expm1(2.0 * d.sum(1).clamp(-_SAFE, _SAFE)), rows),
        "training/rollout_actor_probs_pearson_corr": _correlation(old.exp(), rollout.exp(), mask),
    }
    return _numbers(named)


@torch.no_grad()
def weight_metrics(raw: Tensor, bounded: Tensor, mask: Tensor, *, low: float | None, high: float) -> dict[str, float]:
    """Statistics of importance weights: `rollout_corr/rollout_is_*`, verl's names.

    raw and bounded are (B, T), before and after truncation or band; both 0 where mask is false.

        _mean, _max, _min, _std     of the bounded weights over true tokens, the std with n - 1
        _eff_sample_size            sum(w)^2 / (n * sum(w^2)) of them, 1 when all are equal
        _ratio_fraction_high, _low  share of raw weights above high, and below low (1 / high where there is no low)
        _oob_ratio                  with `low`: share of raw weights outside of the band, which are 0 now
        _seq_mean, _max, _min, _std, _max_deviation     of the rows' mean bounded weight; deviation from 1
        _seq_fraction_high, _low    share of rows whose mean raw weight is above, below

    verl computes max and min of level sequence before truncation; here they are after it, as for tokens. Without a true
    token every number is 0.
    """
    name, floor = "rollout_corr/rollout_is", 1.0 / high if low is None else low
    rows = mask.any(1)
    row, raw_row = masked_mean(bounded, mask, dim=1), masked_mean(raw, mask, dim=1)
    squares = masked_sum(bounded**2, mask)
    named = {
        **_spread(name, bounded, mask),
        f"{name}_eff_sample_size": masked_sum(bounded, mask) ** 2 / (mask.sum() * squares).clamp(min=_TINY),
        f"{name}_ratio_fraction_high": masked_mean((raw > high).float(), mask),
        f"{name}_ratio_fraction_low": masked_mean((raw < floor).float(), mask),
        **_spread(f"{name}_seq", row, rows),
        f"{name}_seq_max_deviation": torch.where(rows, (row - 1.0).abs(), 0.0).amax(),
        f"{name}_seq_fraction_high": masked_mean((raw_row > high).float(), rows),
        f"{name}_seq_fraction_low": masked_mean((raw_row < floor).float(), rows),
    }
    if low is not None:
        named[f"{name}_oob_ratio"] = masked_mean(((raw < low) | (raw > high)).float(), mask)
    return _numbers(named)


@torch.no_grad()
def rejection_metrics(
    kind: str, statistic: Tensor, mask: Tensor, kept: Tensor, bounds: tuple[float, float]
) -> dict[str, float]:
    """Statistics of one rejection: `rollout_corr/rollout_rs_<kind>_*`, verl's names.

    statistic is (B, T), the same on each token of a row for a sequence level; kept is the part of mask that stays.

        _mean, _max, _min, _std         of the statistic over true tokens, or over rows for a sequence level
        _fraction_high, _fraction_low   share of those above and below the bounds
        _masked_fraction                share of true tokens left out
        _seq_masked_fraction            share of rows with at least one token left out

    verl weighs a sequence level's mean by tokens and clamps before the std; here a row counts once, as it is.
    """
    name, (low, high) = f"rollout_corr/rollout_rs_{kind}", bounds
    rows = mask.any(1)
    # All numbers of a row are equal; the largest is taken, because their mean may differ by rounding.
    row = torch.where(mask, statistic, -torch.inf).amax(1)
    values, where = (statistic, mask) if kind.startswith("token") else (row, rows)
    out = mask & ~kept
    named = {
        **_spread(name, values, where),
        f"{name}_fraction_high": masked_mean((values > high).float(), where),
        f"{name}_fraction_low": masked_mean((values < low).float(), where),
        f"{name}_masked_fraction": masked_mean(out.float(), mask),
        f"{name}_seq_masked_fraction": masked_mean(out.any(1).float(), rows),
    }
    return _numbers(named)


def _spread(name: str, values: Tensor, where: Tensor) -> dict[str, Tensor]:
    """Mean, largest, smallest and std (n - 1) where `where` is true; 0 without a true position."""
    some = bool(where.any())
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    return {
        f"{name}_mean": masked_mean(values, where),
        f"{name}_max": torch.where(where, values, -torch.inf).amax() if some else zero,
        f"{name}_min": torch.where(where, values, torch.inf).amin() if some else zero,
        f"{name}_std": masked_var(values, where).sqrt(),
    }


def _correlation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Pearson's correlation over the true positions; 0 where x or y does not vary."""
    x, y = (torch.where(mask, v - masked_mean(v, mask), 0.0) for v in (x, y))
    return (x * y).sum() / ((x**2).sum() * (y**2).sum()).sqrt().clamp(min=_TINY)


def _numbers(named: dict[str, Tensor]) -> dict[str, float]:
    """Convert scalars to floats with one transfer from the device instead of one per number. Adding 0 makes -0.0 to
    0.0."""
    numbers = (torch.stack(list(named.values())) + 0.0).tolist()
    return dict(zip(named, numbers, strict=True))
