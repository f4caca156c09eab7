"""`algorithm`: from rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from steepest.config.algorithms import AdvEstimatorName
from steepest.config.sections.row_selection import FilterGroupsConfig, PFPPOConfig, RolloutCorrectionConfig
from steepest.config.types import DERIVED, NonNegativeFloat, Positive, PositiveFloat, Share

KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


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
    """gae (PPO, with a critic), reinforce_plus_plus (no critic, no groups), remax (no critic; one greedy response
    more to each prompt), or of groups of responses to one prompt, no critic: grpo, gdpo (several rewards), grpo_passk,
    rloo, opo, gpg, reinforce_plus_plus_baseline, optimal_token_baseline; or `module:function` of your own."""
    gamma: Share = 1.0
    """Discount a token (gae, reinforce_plus_plus)."""
    lam: Share = 1.0
    """GAE's lambda."""
    lam_critic: Share | None = None
    """Lambda of the critic's returns, apart from the advantages' (decoupled GAE; VC-PPO and VAPO: 1.0, with lam=0.95 or
    length_adaptive_alpha). null: lam. Ours, not verl's."""
    length_adaptive_alpha: PositiveFloat | None = None
    """Lambda of the advantages by the response's length in tokens: 1 - 1 / (alpha * length), at least 0 (VAPO: 0.05,
    for answers of thousands of tokens). null: lam. Ours, not verl's."""
    bootstrap_truncated: bool = False
    """A response cut at the length limit ends with the critic's value of its last state instead of 0 (gae)."""
    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation (grpo, gdpo, grpo_passk); off: Dr. GRPO."""
    gdpo_reward_keys: tuple[str, ...] | None = None
    """The rewards that gdpo scales within their groups, two or more: names of `reward.functions`, or of parts that a
    reward reports. null: all of `reward.functions`."""
    gdpo_reward_weights: tuple[float, ...] | None = None
    """Their weights in the sum, after the scaling. null: those of `reward.functions`, 1 for other names; verl: 1 for
    all, which would reward what a negative weight is to punish."""
    use_kl_in_reward: bool = DERIVED
    """Subtract the KL to the reference from the reward. null: on when `kl_ctrl.kl_coef` is above 0 and either you
    gave it or `adv_estimator` is gae. verl: off."""
    kl_penalty: KLKind = "kl"
    """Estimator of that KL; kl = k1, mse = k2, low_var_kl = k3."""
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    mask_equal_groups: bool = False
    """Leave prompts whose responses all score alike out of losses and denominators. Ours, not verl's."""
    mask_truncated: bool = False
    """Leave responses cut at the length limit out of losses, groups and denominators (DAPO's overlong filtering). Ours,
    not verl's."""
    use_pf_ppo: bool = False
    """Update on responses drawn from the batch by their score (PF-PPO)."""
    pf_ppo: PFPPOConfig = field(default_factory=PFPPOConfig)
