"""Losses of the form -A * log_prob, each token weighted by a number without gradient: GPG, CISPO, DPPO.

A token whose weight is not 0 always has a gradient, because the bound limits the weight and not the objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.policy_losses.inputs import POLICY_LOSSES, LossInputs, ratio_stats


@POLICY_LOSSES.register("gpg")
def policy_gradient(x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The plain policy gradient: no ratio, no clip, no trust region.

        loss = -A * log_prob

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `ppo_kl`, `ratio`.
    From the second update of a batch on the samples come from an older policy; this loss does not correct for that.

    Chu et al. 2025 (GPG), https://arxiv.org/abs/2504.02546; its advantages are `algorithm.adv_estimator=gpg`.
    """
    return _weighted(x, torch.ones_like(x.advantages)), ratio_stats(x.log_ratio())


@POLICY_LOSSES.register("cispo")
def clipped_weight(x: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """CISPO: the importance weight is clipped and carries no gradient, so that no token drops out of the update.

        weight = clip(exp(log_prob - old_log_prob), 1 - clip_ratio_low, 1 + clip_ratio_high)
        loss   = -stop_gradient(weight) * A * log_prob

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `pg_clipfrac` 1
    where the weight is held, `ppo_kl`, `ratio`. The value is no surrogate of the return; only its gradient counts.
    clip_ratio_low=1 bounds the weight from above only, as the paper's runs do.

    MiniMax 2025, https://arxiv.org/abs/2506.13585.
    """
    log_ratio = x.log_ratio()
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    stats = ratio_stats(log_ratio) | {"pg_clipfrac": (weight != ratio).to(ratio.dtype)}
    return _weighted(x, weight), stats


@POLICY_LOSSES.register("dppo_tv")
def trust_by_total_variation(
    x: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPPO with the total variation between "this token" and "any other": probabilities are bounded, not their ratio.

        p, q   = exp(log_prob), exp(old_log_prob)
        weight = min(p / q, clip_ratio_c)
        weight = 0      where A > 0 and p - q > clip_ratio_high, or A <= 0 and q - p > clip_ratio_low
        loss   = -stop_gradient(weight) * A * log_prob

    So a rare token may become many times likelier, while a likely token is stopped after a small change of its ratio.
    The clip ratios are distances between probabilities here; the paper's runs use 0.15.

    Returns (loss, stats), everything (b, T) f32; masked positions hold 0. stats, without gradient: `pg_clipfrac` 1
    where the weight is 0, `pg_clipfrac_lower` 1 where the ratio is held at clip_ratio_c, `ppo_kl`, `ratio`.

    Qi et al. 2026, https://arxiv.org/abs/2602.04879, the binary approximation. As in verl clip_ratio_c, PPO's dual
    clip, is the bound of the ratio; the paper wants it large.
    """
    p, q = _probabilities(x)
    too_far = torch.where(x.advantages > 0, p - q > clip_ratio_high, q - p > clip_ratio_low)
    return _trusted(x, too_far, clip_ratio_c)


@POLICY_LOSSES.register("dppo_kl")
def trust_by_divergence(
    x: LossInputs, *, clip_ratio_low: float, clip_ratio_high: float, clip_ratio_c: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPPO with the KL divergence between "this token" and "any other": as `dppo_tv`, with another distance.

        D      = q * log(q / p) + (1 - q) * log((1 - q) / (1 - p))
        weight = 0      where A > 0, p > q and D > clip_ratio_high, or A <= 0, p < q and D > clip_ratio_low

    The clip ratios are nats here; the paper's runs use 0.05. Everything else, and the result, is as in `dppo_tv`. 1e-8
    is added to 1 - p and 1 - q, so that a token of probability 1 has a finite distance.

    Qi et al. 2026, https://arxiv.org/abs/2602.04879, the binary approximation.
    """
    p, q = _probabilities(x)
    log_p, log_q = (torch.where(x.response_mask, value.detach(), 0.0) for value in (x.log_probs, x.old_log_probs))
    # 1 - p by expm1: of a likely token the plain difference would keep few digits.
    others_p, others_q = -torch.expm1(log_p) + 1e-8, -torch.expm1(log_q) + 1e-8
    distance = q * (log_q - log_p) + (1.0 - q) * (others_q / others_p).log()
    grown, shrunk = (p > q) & (distance > clip_ratio_high), (p < q) & (distance > clip_ratio_low)
    return _trusted(x, torch.where(x.advantages > 0, grown, shrunk), clip_ratio_c)


def _probabilities(x: LossInputs) -> tuple[Tensor, Tensor]:
    """(b, T) probability of each token now and before the update; 1 where masked."""
    now, before = (torch.where(x.response_mask, value.detach(), 0.0) for value in (x.log_probs, x.old_log_probs))
    return now.exp(), before.exp()


def _trusted(x: LossInputs, too_far: Tensor, clip_ratio_c: float) -> tuple[Tensor, dict[str, Tensor]]:
    log_ratio = x.log_ratio()
    ratio = log_ratio.detach().exp()
    too_far = too_far & x.response_mask
    stats = ratio_stats(log_ratio) | {
        "pg_clipfrac": too_far.to(ratio.dtype),
        "pg_clipfrac_lower": ((ratio > clip_ratio_c) & ~too_far).to(ratio.dtype),
    }
    return _weighted(x, torch.where(too_far, 0.0, ratio.clamp(max=clip_ratio_c))), stats


def _weighted(x: LossInputs, weight: Tensor) -> Tensor:
    """-weight * A * log_prob; 0 where masked."""
    return -weight * x.true_advantages() * torch.where(x.response_mask, x.log_probs, 0.0)
