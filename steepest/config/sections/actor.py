"""`actor_rollout_ref.actor`: the policy's loss and update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from steepest.config.algorithms import PolicyLossConfig
from steepest.config.sections.model import ComputeConfig, OptimConfig
from steepest.config.types import (
    DERIVED,
    Bounds,
    LossAggMode,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveShare,
    Seed,
)

KLLossKind = Literal[
    "kl",
    "k1",
    "abs",
    "mse",
    "k2",
    "low_var_kl",
    "k3",
    "kl+",
    "k1+",
    "abs+",
    "mse+",
    "k2+",
    "low_var_kl+",
    "k3+",
    "full",
]


@dataclass(frozen=True)
class ActorConfig:
    """`actor_rollout_ref.actor`: the policy's update."""

    ppo_mini_batch_size: Positive = DERIVED
    """Prompts an optimizer step, with all their `rollout.n` responses; must divide `data.train_batch_size`.
    null: 256 if that divides it, else the whole batch. verl: 256."""
    ppo_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward and backward; null: filled to `ppo_max_token_len_per_gpu`. Changes memory, not the result."""
    use_dynamic_bsz: bool = DERIVED
    """Fill micro-batches to a token budget; null: on unless `ppo_micro_batch_size_per_gpu` is given."""
    ppo_max_token_len_per_gpu: Positive = DERIVED
    """Tokens (prompt and response, no padding) a micro-batch; null: 4096, or one longest sequence if that is more."""
    clip_ratio: PositiveFloat = 0.2
    """PPO's clip of the probability ratio, for both sides unless the next two say otherwise."""
    clip_ratio_low: PositiveShare = DERIVED
    """The ratio is clipped at 1 minus this; null: `clip_ratio`, and where that is not given, with gspo 0.0003, geo_mean
    0.4 (of the log-ratio), dppo_tv 0.15 (of the probability), dppo_kl 0.05 (nats). verl: 0.2 for all."""
    clip_ratio_high: PositiveFloat = DERIVED
    """The ratio is clipped at 1 plus this; null: as `clip_ratio_low`, but with gspo 0.0004."""
    clip_ratio_c: Annotated[float, Bounds(above=1.0)] = DERIVED
    """vanilla's dual clip: with a negative advantage A the loss is at most this times -A. dppo_tv and dppo_kl: the
    largest ratio. null: 3, with the dppo losses 20. verl: 3."""
    tau_pos: PositiveFloat = 1.0
    """sapo: how fast the gate closes on tokens with a positive advantage as their ratio leaves 1."""
    tau_neg: PositiveFloat = 1.05
    """sapo: the same for the others."""
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    loss_agg_mode: LossAggMode = DERIVED
    """How token losses become one number; the denominator counts the whole mini-batch. null: token-mean, with gspo,
    geo_mean and sapo seq-mean-token-mean, which verl takes for them in any case."""
    loss_scale_factor: PositiveFloat | None = None
    """Divisor of seq-mean-token-sum-norm; needed there, unused elsewhere."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus in the loss."""
    use_kl_loss: bool = False
    """Add the KL divergence to the reference to the loss."""
    kl_loss_coef: NonNegativeFloat = 0.001
    """Weight of that KL term."""
    kl_loss_type: KLLossKind = "low_var_kl"
    """Estimator of that KL term; a trailing + keeps the value and takes the gradient of k2. full: no estimate, the KL
    over the whole vocabulary at each token, for a pass of the reference in each update."""
    ppo_epochs: Positive = 1
    """Passes over a step's batch."""
    old_log_probs: Literal["auto", "recompute"] = "auto"
    """Log-probs before the update. auto: no pass of their own where the update's or the engine's can stand in (the
    engine's are checked on a sample of rows in each step); recompute: a pass in each step. Ours, not verl's."""
    use_prefix_sharing: bool | None = None
    """Compute the prompt of a group's `rollout.n` responses once a pass, in actor, reference and critic; null: on where
    it can be, which is on the CPU. verl: `use_prefix_grouper`, off."""
    shuffle: bool = False
    """Shuffle the rows before they are cut into mini-batches, anew for each pass."""
    data_loader_seed: Seed = 42
    """Seed of that shuffle, and of the tokens that clip_cov draws."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp_config: ComputeConfig = field(default_factory=ComputeConfig)
