"""Parts of `algorithm` that choose and weigh what is learnt from: rollout correction, group filter, PF-PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steepest.config.types import Positive, PositiveFloat

RejectionKind = Literal[
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
]


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """`algorithm.rollout_correction`: for an engine whose probabilities differ from the trainer's."""

    rollout_is: Literal["token", "sequence"] | None = None
    """Importance weights on the policy loss, old over rollout probability: of each token, or the product over a
    response; null: none."""
    rollout_is_threshold: str = "2.0"
    """A number: larger weights are cut to it (TIS). low_high, e.g. 0.5_5.0: weights outside become 0 (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Divide the weights by their mean over the batch."""
    rollout_rs: tuple[RejectionKind, ...] | None = None
    """Leave out tokens or whole responses by one or more divergences, e.g. `[token_k1,seq_mean_k3]`; null: none."""
    rollout_rs_threshold: tuple[str, ...] | None = None
    """One each, or one for all. k1: ratios low_high of rollout over old probability, or high for 1/high to high.
    k2, k3: the largest divergence in nats."""
    bypass_mode: bool = False
    """Take the rollout's log-probs for old ones, without a pass: the loss's own ratio is then the correction."""
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    """Bypass mode only. ppo_clip: `policy_loss.loss_mode` as it is; reinforce: -weight * log-prob * advantage."""


@dataclass(frozen=True)
class FilterGroupsConfig:
    """`algorithm.filter_groups`: DAPO's dynamic sampling."""

    enable: bool = False
    """Drop prompts whose responses all score alike, and generate for further prompts until the batch is full."""
    metric: str = "reward"
    """What must differ: reward (the score), or a part that the reward function reports, e.g. acc."""
    max_num_gen_batches: Positive = 10
    """Rounds of `train_batch_size` prompts a step, at most; what is then missing is filled with dropped prompts.
    verl: 0, no limit, so that a step may never end."""


@dataclass(frozen=True)
class PFPPOConfig:
    """`algorithm.pf_ppo`: how PF-PPO weighs responses."""

    reweight_method: Literal["pow", "max_min", "max_random"] = "pow"
    """pow: the score's size to the power of `weight_pow`; max_min: highest and lowest scores of the batch alone;
    max_random: the highest four times as often as each other."""
    weight_pow: PositiveFloat = 2.0
    """The power (pow)."""
