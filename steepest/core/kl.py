"""KL divergence to the reference policy: estimators per token, the penalty in the reward, coefficient controllers.

docs/kl.md states the gradient of each estimator in the loss and in the reward; tests/core/test_kl.py enumerates them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steepest.core.masked import masked_mean
from steepest.errors import ConfigError, setting
from steepest.registry import nearest

MAX_K3 = 10.0
"""The value of k3 is limited to 10, as in verl, so that one token cannot dominate a mean or a reward."""

MAX_K3_EXPONENT = 20.0
"""Above this exponent exp() in k3 is replaced by its tangent, so that no gradient is inf and none is lost."""


def _k1(log_ratio: Tensor) -> Tensor:
    return log_ratio


def _absolute(log_ratio: Tensor) -> Tensor:
    return log_ratio.abs()


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio**2


def _k3(log_ratio: Tensor) -> Tensor:
    d = -log_ratio
    inside = d.clamp(max=MAX_K3_EXPONENT)
    # relu, not d - inside: the gradients of the two would cancel, and exp(20) would round the rest of it away.
    exact = torch.expm1(inside) - d + math.exp(MAX_K3_EXPONENT) * torch.relu(d - MAX_K3_EXPONENT)
    # The value is bounded, the gradient is not: with a clamp the tokens that drifted furthest would have no gradient.
    # `exact - exact.detach()` is 0 without rounding, so the value is the clamped one to the last bit.
    return exact.detach().clamp(0.0, MAX_K3) + (exact - exact.detach())


_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": _k1,
    "k1": _k1,
    "abs": _absolute,
    "mse": _k2,
    "k2": _k2,
    "low_var_kl": _k3,
    "k3": _k3,
}

KL_KINDS: tuple[str, ...] = tuple(_ESTIMATORS) + tuple(f"{name}+" for name in _ESTIMATORS)
"""Every kind that `kl_estimate` knows."""


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, kind: str, *, response_mask: Tensor | None = None) -> Tensor:
    """KL(policy || reference) at each token, estimated from the token sampled by the policy.

        l = log_prob - ref_log_prob
        k1, kl          l
        abs             |l|
        k2, mse         l^2 / 2
        k3, low_var_kl  exp(-l) - 1 + l          value held within 0 .. 10, gradient that of the formula
        any kind with + the value of the kind, the gradient of k2

    In a loss only k2, and therefore every + kind, has the gradient of the KL divergence in expectation; k1 has none at
    all, and k3 has that of the reverse divergence KL(reference || policy). In the reward k1 is correct. See docs/kl.md.

    log_probs, ref_log_probs and the result are (B, T) f32; the gradient flows through log_probs. With `response_mask`
    (B, T) bool masked positions are 0 and have no gradient, whatever they hold; without it the caller masks, and the
    inputs must be finite everywhere. Raises ConfigError for an unknown kind.

    Schulman 2020, http://joschu.net/blog/kl-approx.html. Above 20 the exponential of k3 is replaced by its tangent.
    """
    base = kind.removesuffix("+")
    if base not in _ESTIMATORS:
        guess = nearest(kind, KL_KINDS)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ConfigError(
            f"{setting('kl_penalty')} or {setting('kl_loss_type')}={kind!r}: no such KL estimator.{hint} "
            f"Known: {', '.join(KL_KINDS)}."
        )
    log_ratio = log_probs - ref_log_probs
    if response_mask is not None:
        log_ratio = torch.where(response_mask, log_ratio, 0.0)
    value = _ESTIMATORS[base](log_ratio)
    if not kind.endswith("+"):
        return value
    gradient = _k2(log_ratio)
    return value.detach() + (gradient - gradient.detach())


@torch.no_grad()
def apply_kl_penalty(
    token_level_scores: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    *,
    coef: float,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """Subtract the KL penalty from the reward of each token.

        r_t = score_t - coef * k(old_log_prob_t, ref_log_prob_t)

    All tensors are (B, T), mask is bool. Returns (token_level_rewards, mean_kl): rewards (B, T) are 0 where masked,
    mean_kl is a scalar, the mean over rows of each row's mean over its true tokens. A row without a true token does
    not count. Nothing carries a gradient. Raises ConfigError for an unknown kind.
    """
    kl = kl_estimate(old_log_probs, ref_log_probs, kind, response_mask=mask)
    rewards = torch.where(mask, token_level_scores - coef * kl, 0.0)
    return rewards, masked_mean(masked_mean(kl, mask, dim=1), mask.any(1))


class FixedKLController:
    """A coefficient that never changes (`algorithm.kl_ctrl.type=fixed`)."""

    def __init__(self, coef: float) -> None:
        self.value = coef

    def update(self, kl: float, num_rows: int) -> None:
        """Do nothing: the coefficient is fixed."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Do nothing: the coefficient comes from the configuration."""


class AdaptiveKLController:
    """A coefficient that steers the KL toward a target (`algorithm.kl_ctrl.type=adaptive`).

        value <- value * (1 + clip(kl / target_kl - 1, -0.2, 0.2) * num_rows / horizon)

    `target_kl` is in nats per token, `horizon` in rows. A KL that is not finite is ignored, because it would make the
    coefficient NaN in all later steps. The value is part of the state, so a resumed run continues with it.

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593. Raises ConfigError for a target or horizon that is not
    positive.
    """

    def __init__(self, coef: float, target_kl: float, horizon: float) -> None:
        problems = [
            f"{name}={found}: must be greater than 0 with {setting('kl_ctrl.type')}=adaptive."
            for name, found in ((setting("target_kl", "kl_ctrl"), target_kl), (setting("horizon", "kl_ctrl"), horizon))
            if found <= 0
        ]
        if problems:
            raise ConfigError(problems)
        self.value = coef
        self.target_kl = target_kl
        self.horizon = horizon

    def update(self, kl: float, num_rows: int) -> None:
        """Move the coefficient after a step whose mean KL over `num_rows` rows was `kl`."""
        if math.isfinite(kl):
            error = min(max(kl / self.target_kl - 1.0, -0.2), 0.2)
            self.value *= 1.0 + error * num_rows / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = float(state["value"])
