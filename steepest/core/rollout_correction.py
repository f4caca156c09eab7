"""Correction of the distance between the policy that sampled and the policy before the update.

A loss involves three policies: mu, the rollout engine's, which drew the tokens; old, the trainer's before the update;
and the policy in training. The loss's own ratio is training over old. This file corrects the rest, old over mu, once
per step: by a weight per token (importance sampling), by leaving out tokens or whole responses (rejection), or by both:

    d_t = old_log_prob_t - rollout_log_prob_t          r_t = exp(d_t)

A weight carries no gradient. Multiplied with the loss's ratio it gives training over mu; the distance of old and mu
must not be corrected anywhere else.

Truncation: https://fengyao.notion.site/off-policy-rl; band: IcePop, https://arxiv.org/abs/2510.18855; rejection:
https://richardli.xyz/rl-collapse. Names are verl's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steepest.core.masked import masked_mean, masked_sum
from steepest.core.mismatch import rejection_metrics, weight_metrics
from steepest.core.policy_losses import MAX_LOG_RATIO, LossInputs
from steepest.errors import ConfigError, setting
from steepest.registry import nearest

REJECTIONS: tuple[str, ...] = (
    *(f"{level}_{k}" for level in ("token", "seq_sum", "seq_mean") for k in ("k1", "k2", "k3")),
    "seq_max_k2",
    "seq_max_k3",
)
"""Level and estimator of a rejection, as `rollout_rs` names them."""


@dataclass(frozen=True)
class Weighting:
    """How importance weights are computed and bounded."""

    level: Literal["token", "sequence"]
    """token: r_t, with little variance but biased; sequence: each token gets the product of the response's r_t."""
    high: float = 2.0
    """Upper bound: a larger weight is set to it (truncation), or to 0 if `low` is given."""
    low: float | None = None
    """Lower bound of a band (IcePop): weights outside of [low, high] become 0, others stay. None: truncation."""
    batch_normalize: bool = False
    """Divide by the mean of the batch's weights: over tokens, or over responses for level sequence."""

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ConfigError(f"{setting('rollout_is')}={self.level!r}: no such level. Known: token, sequence.")


@dataclass(frozen=True)
class Rejection:
    """Leaves out tokens or responses for which a divergence of old and mu is out of bounds."""

    kind: str
    """One of REJECTIONS."""
    high: float
    """k1: largest rollout / old, a ratio. k2, k3: largest divergence, in nats."""
    low: float | None = None
    """k1 only: smallest rollout / old; None: 1 / high."""

    def __post_init__(self) -> None:
        if self.kind not in REJECTIONS:
            guess = nearest(self.kind, REJECTIONS)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ConfigError(
                f"{setting('rollout_rs')}={self.kind!r}: no such rejection.{hint} Known: {', '.join(REJECTIONS)}."
            )

    @property
    def level(self) -> str:
        """token, seq_sum, seq_mean or seq_max."""
        return self.kind.rpartition("_")[0]

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest statistic that is kept, in nats."""
        if not self.kind.endswith("k1"):
            return 0.0, self.high
        low = 1.0 / self.high if self.low is None else self.low
        return float(torch.tensor(low).log()), float(torch.tensor(self.high).log())


@dataclass(frozen=True)
class Correction:
    """The result: kept tokens and weights of a batch. No field carries a gradient."""

    kept: Tensor
    """(B, T) bool, the tokens that stay; a part of the mask that was given."""
    weights: Tensor | None
    """(B, T) f32, factors of the policy loss, 0 where not kept; None without weighting."""
    metrics: dict[str, float]
    """`rollout_corr/rollout_is_*` and `rollout_corr/rollout_rs_*`."""


@torch.no_grad()
def correct(
    rollout_log_probs: Tensor,
    old_log_probs: Tensor,
    mask: Tensor,
    *,
    weighting: Weighting | None = None,
    rejections: Sequence[Rejection] = (),
) -> Correction:
    """Apply the rejections, then compute weights for the tokens that stay. A token must pass all rejections.

    All tensors are (B, T), mask is bool; masked positions are ignored, whatever they hold. The metrics of both parts
    are over `mask`: they describe the engine before the correction. Only the mean of `batch_normalize` is over the kept
    tokens, so that a rejected response has no influence on it. verl takes that mean before rejection.
    """
    log_ratio = torch.where(mask, old_log_probs - rollout_log_probs, 0.0)
    kept, metrics = mask, dict[str, float]()
    for rejection in rejections:
        statistic = divergence(log_ratio, mask, rejection.kind)
        stays = keeps(statistic, mask, rejection)
        metrics |= rejection_metrics(rejection.kind, statistic, mask, stays, rejection.bounds)
        kept = kept & stays
    if rejections:
        metrics |= {
            "rollout_corr/rollout_rs_masked_fraction": _share(mask & ~kept, mask),
            "rollout_corr/rollout_rs_seq_masked_fraction": _share((mask & ~kept).any(1), mask.any(1)),
        }
    weights = None
    if weighting is not None:
        raw = raw_weights(log_ratio, mask, weighting.level)
        bounded = bound_weights(raw, weighting)
        metrics |= weight_metrics(raw, bounded, mask, low=weighting.low, high=weighting.high)
        weights = torch.where(kept, bounded, 0.0)
        if weighting.batch_normalize:
            weights, factor = normalize(weights, kept, weighting.level)
            metrics["rollout_corr/rollout_is_batch_norm_factor"] = factor
    return Correction(kept, weights, metrics)


def divergence(log_ratio: Tensor, mask: Tensor, kind: str) -> Tensor:
    """The statistic that a rejection compares, (B, T); for a sequence level it is the same on each token of a row.

        k1 = -d     k2 = d^2 / 2     k3 = exp(d) - 1 - d          of tokens
        seq_sum, seq_mean, seq_max: of the row's true tokens

    d is held within +-20. log_ratio is 0 where mask is false. A row without a true token gives 0.
    """
    d = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    level, _, estimator = kind.rpartition("_")
    token = {"k1": -d, "k2": 0.5 * d**2, "k3": torch.expm1(d) - d}[estimator]
    if level == "token":
        return token
    if level == "seq_sum":
        row = masked_sum(token, mask, dim=1)
    elif level == "seq_mean":
        row = masked_mean(token, mask, dim=1)
    else:  # k2 and k3 are never below 0
        row = torch.where(mask, token, 0.0).amax(1)
    return row[:, None].expand_as(token)


def keeps(statistic: Tensor, mask: Tensor, rejection: Rejection) -> Tensor:
    """(B, T) bool, where the statistic is within the bounds, both included, and mask is true. NaN is outside."""
    low, high = rejection.bounds
    return mask & (statistic >= low) & (statistic <= high)


def raw_weights(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """(B, T) f32: r_t, or for level sequence their product over the row's true tokens; 0 where mask is false.

    The exponent is held within +-20. log_ratio is 0 where mask is false.
    """
    d = log_ratio if level == "token" else masked_sum(log_ratio, mask, dim=1)[:, None].expand_as(log_ratio)
    return torch.where(mask, d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), 0.0)


def bound_weights(weights: Tensor, weighting: Weighting) -> Tensor:
    """Truncation at `high`, or the band [low, high] outside of which weights are 0.

    A token with weight 0 still counts in the loss's denominator, as in IcePop; a token that a rejection leaves out
    counts nowhere.
    """
    if weighting.low is None:
        return weights.clamp(max=weighting.high)
    inside = (weights >= weighting.low) & (weights <= weighting.high)
    # A NaN is outside of every band but stays NaN, so that the update it spoils is skipped and counted.
    return torch.where(inside | weights.isnan(), weights, 0.0)


def normalize(weights: Tensor, kept: Tensor, level: str) -> tuple[Tensor, float]:
    """(weights / their mean, the mean): over kept tokens, or over rows with a kept token for level sequence.

    weights are 0 where not kept. If the mean is 0 the weights are not scaled and the factor is 1.
    """
    # Level sequence has one weight per row; rejected tokens of the row must not lower it.
    mean = masked_mean(weights, kept) if level == "token" else masked_mean(weights.amax(1), kept.any(1))
    factor = float(mean)
    return (weights / mean, factor) if factor > 0 or factor != factor else (weights, 1.0)


def bypass_reinforce(x: LossInputs, *, weighting: Weighting | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE on the rollout policy's samples, for bypass mode, in which old_log_probs are the rollout's.

        w_t  = bounded importance weight of training over rollout, without gradient; 1 without `weighting`
        loss = -w_t * log_prob_t * A_t

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0 and have no gradient. stats: `ppo_kl` =
    old_log_prob - log_prob, `ratio` = exp(-ppo_kl). Rows must be whole, as they are in a micro-batch.
    """
    mask = x.response_mask
    log_probs = torch.where(mask, x.log_probs, 0.0)
    log_ratio = torch.where(mask, x.log_probs.detach() - x.old_log_probs, 0.0)
    weights = mask.to(log_probs.dtype)
    if weighting is not None:
        weights = bound_weights(raw_weights(log_ratio, mask, weighting.level), weighting)
    loss = -weights * log_probs * torch.where(mask, x.advantages, 0.0)
    stats = {"ppo_kl": -log_ratio, "ratio": log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()}
    return loss, stats


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum().clamp(min=1))
