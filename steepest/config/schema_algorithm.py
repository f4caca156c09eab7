"""`algorithm`: from rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from steepest.config.schema_types import DERIVED, NameOf, NonNegativeFloat, Positive, PositiveFloat, Share

KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
AdvEstimatorName = Annotated[str, NameOf("advantage estimator", ("gae", "grpo"))]


@dataclass(frozen=True)
class KLControlConfig:
    """`algorithm.kl_ctrl`: the coefficient of the KL penalty in the reward."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: the coefficient moves so that the KL approaches `target_kl`."""
    kl_coef: NonNegativeFloat = 0.001
    """The coefficient, or its start."""
    horizon: Positive = 10000
    """Adaptive only: responses over which it adapts."""
    target_kl: PositiveFloat = 0.1
    """Adaptive only: the KL aimed at, in nats a token."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """`algorithm`: from rewards to advantages."""

    adv_estimator: AdvEstimatorName = "gae"
    """gae (PPO, with a critic), grpo (groups, no critic), or `module:function` of your own."""
    gamma: Share = 1.0
    """Discount a token (gae)."""
    lam: Share = 1.0
    """GAE's lambda."""
    bootstrap_truncated: bool = False
    """A response cut at the length limit ends with the critic's value of its last state instead of 0 (gae)."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation (grpo); off: Dr. GRPO."""
    use_kl_in_reward: bool = DERIVED
    """Subtract the KL to the reference from the reward. null: on when `kl_ctrl.kl_coef` is above 0 and either you
    gave it or `adv_estimator` is gae. verl: off."""
    kl_penalty: KLKind = "kl"
    """Estimator of that KL; kl = k1, mse = k2, low_var_kl = k3."""
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
