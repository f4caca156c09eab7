"""The PPO job's configuration: one dataclass a section, one field a key, what it does beneath it.

The tree is verl's (`data`, `actor_rollout_ref`, `critic`, `algorithm`, `trainer`, ...). `None` (null) means: derived
from other keys by resolve.py when the configuration is loaded; the loaded Config holds the derived value.
Keys of verl's that are not here are in refused.py. docs/configuration.md is generated from this file.
"""

from __future__ import annotations

from collections.abc import Mapping as ReadOnlyMapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from steepest.config.schema_model import (
    ComputeConfig,
    CriticComputeConfig,
    CriticModelConfig,
    ModelConfig,
    OptimConfig,
)
from steepest.config.schema_rollout import RolloutConfig
from steepest.config.schema_types import (
    DERIVED,
    Bounds,
    File,
    Mapping,
    MinusOneOr,
    NameOf,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveShare,
    RequiredFiles,
    Seed,
    Share,
)

LossAggMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
KLLossKind = Literal[
    "kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "mse+", "k2+", "low_var_kl+", "k3+"
]
LoggerName = Literal["console", "brief", "jsonl", "tensorboard", "wandb", "mlflow", "swanlab"]
AdvEstimatorName = Annotated[str, NameOf("advantage estimator", ("gae", "grpo"))]
PolicyLossName = Annotated[str, NameOf("policy loss", ("vanilla",))]


@dataclass(frozen=True)
class DataConfig:
    """`data`: the prompts."""

    train_files: RequiredFiles = ()
    """One file or a list: parquet, jsonl or json."""
    val_files: RequiredFiles = ()
    """One file or a list: parquet, jsonl or json."""
    train_batch_size: Positive = 1024
    """Prompts a step. The last incomplete batch of an epoch is left out."""
    val_batch_size: Positive | None = None
    """Prompts generated at once in validation; null: the whole set. The last partial batch is scored too."""
    max_prompt_length: Positive = 512
    """Longest prompt in tokens, chat template included; see `truncation` and `filter_overlong_prompts`."""
    max_response_length: Positive = 512
    """Longest response in tokens; a response that reaches it is cut and counts as truncated."""
    train_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many training rows (seeded by `seed`); -1: all."""
    val_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many validation rows (seeded by `seed`); -1: all."""
    prompt_key: str = "prompt"
    """Column with the chat messages."""
    reward_fn_key: str = "data_source"
    """Column that names the reward function."""
    shuffle: bool = True
    """A new order of the training rows each epoch; off: the order of the file."""
    seed: Seed = 42
    """Seed of order and subset. verl: null, a different order each run."""
    filter_overlong_prompts: bool = False
    """Leave out prompts longer than `max_prompt_length`, counted and printed."""
    truncation: Literal["error", "left", "right", "middle"] = "error"
    """An overlong prompt that is not filtered: stop the run, or cut tokens at its left, right or middle."""
    tokenizer: File | None = None
    """Folder or hub id of another tokenizer than the model's; null: the model's."""
    trust_remote_code: bool = DERIVED
    """Run Python code that comes with the tokenizer; null: `actor_rollout_ref.model.trust_remote_code`."""
    apply_chat_template_kwargs: Mapping = field(default_factory=dict)
    """Arguments for the chat template, e.g. `{enable_thinking: false}`."""


@dataclass(frozen=True)
class PolicyLossConfig:
    """`actor_rollout_ref.actor.policy_loss`."""

    loss_mode: PolicyLossName = "vanilla"
    """Name of the policy loss: vanilla is PPO's clip with the dual clip."""


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
    """The ratio is clipped at 1 minus this; null: `clip_ratio`."""
    clip_ratio_high: PositiveFloat = DERIVED
    """The ratio is clipped at 1 plus this; null: `clip_ratio`."""
    clip_ratio_c: Annotated[float, Bounds(above=1.0)] = 3.0
    """Dual clip: with a negative advantage A the loss is at most this times -A."""
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    loss_agg_mode: LossAggMode = "token-mean"
    """How token losses become one number; the denominator counts the whole mini-batch."""
    loss_scale_factor: PositiveFloat | None = None
    """Divisor of seq-mean-token-sum-norm; needed there, unused elsewhere."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus in the loss."""
    use_kl_loss: bool = False
    """Add the KL divergence to the reference to the loss."""
    kl_loss_coef: NonNegativeFloat = 0.001
    """Weight of that KL term."""
    kl_loss_type: KLLossKind = "low_var_kl"
    """Estimator of that KL term; a trailing + keeps the value and takes the gradient of k2."""
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
    """Seed of that shuffle."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp_config: ComputeConfig = field(default_factory=ComputeConfig)


@dataclass(frozen=True)
class RefConfig:
    """`actor_rollout_ref.ref`: the reference's log-prob pass. Used when a KL term is on."""

    log_prob_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward; null: filled to the token budget."""
    log_prob_use_dynamic_bsz: bool = DERIVED
    """Fill micro-batches to a token budget; null: on unless the key above is given."""
    log_prob_max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch; null: `actor.ppo_max_token_len_per_gpu`."""


@dataclass(frozen=True)
class ActorRolloutRefConfig:
    """`actor_rollout_ref`: the policy, its generation and its frozen reference."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ref: RefConfig = field(default_factory=RefConfig)


@dataclass(frozen=True)
class CriticConfig:
    """`critic`: the value model. Exists when the advantage estimator reads values (gae)."""

    enable: bool | None = None
    """null: on when the advantage estimator needs values."""
    share_base: Literal["adapter", "head"] | None = None
    """With LoRA, no model of the critic's own: adapter: a second adapter and a value head on the actor's frozen base;
    head: a value head alone, on hidden states of the reference's pass. Ours, not verl's."""
    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    fsdp: CriticComputeConfig = field(default_factory=CriticComputeConfig)
    ppo_mini_batch_size: Positive = DERIVED
    """Prompts an optimizer step; null: the actor's."""
    ppo_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward and backward; null: filled to `ppo_max_token_len_per_gpu`."""
    use_dynamic_bsz: bool = DERIVED
    """Fill micro-batches to a token budget; null: on unless `ppo_micro_batch_size_per_gpu` is given."""
    ppo_max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch; null: the actor's."""
    forward_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward of the pass that only reads values; null: `ppo_micro_batch_size_per_gpu`."""
    forward_max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch of that pass; null: `ppo_max_token_len_per_gpu`."""
    cliprange_value: PositiveFloat = 0.5
    """The new value may move this far from the old one before its loss stops shrinking."""
    loss_agg_mode: LossAggMode = DERIVED
    """How token losses become one number; null: the actor's."""
    loss_scale_factor: PositiveFloat | None = None
    """Divisor of seq-mean-token-sum-norm; null: the actor's."""
    ppo_epochs: Positive = DERIVED
    """Passes over a step's batch; null: the actor's."""
    shuffle: bool = DERIVED
    """Shuffle the rows before they are cut into mini-batches; null: the actor's."""
    data_loader_seed: Seed = 42
    """Seed of that shuffle."""


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


@dataclass(frozen=True)
class CustomRewardConfig:
    """`custom_reward_function` (also under `reward.`): your own scorer."""

    path: File | None = None
    """Python file; null: the reward registered for each row's data source."""
    name: str = "compute_score"
    """Function in that file: f(data_source, solution_str, ground_truth, extra_info) to a number or a dict."""


@dataclass(frozen=True)
class RewardConfig:
    """`reward`: how responses are scored."""

    num_workers: Positive | None = None
    """Worker processes; null: one a core, at most 8."""
    timeout_s: PositiveFloat = 10.0
    """Seconds a response may take to score; then it counts as an error. Ours, not verl's."""
    max_error_rate: Share = 0.1
    """Share of a batch's scores that may fail before the run ends. Ours, not verl's."""
    mode: Literal["strict", "flexible"] = "strict"
    """GSM8K: strict wants `#### number`; flexible compares the value, in any usual form. Ours, not verl's."""


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer`: the run."""

    total_epochs: Positive = 30
    """Passes over the training data."""
    total_training_steps: Positive | None = None
    """Steps of the run; null: steps an epoch times `total_epochs`. Wins over `total_epochs` when given."""
    project_name: str = "steepest"
    """Folder and logger project."""
    experiment_name: str = "ppo"
    """Folder and logger run. Another name starts another run."""
    logger: tuple[LoggerName, ...] = ("console",)
    """Where metrics go, one name or a list. metrics.jsonl is always written."""
    device: Literal["cpu", "cuda", "npu"] | None = None
    """null: the best one present."""
    nnodes: Positive = 1
    """Machines."""
    n_gpus_per_node: Positive = 1
    """Accelerators a machine (on CPU: processes). verl: 8."""
    save_freq: Annotated[int, MinusOneOr(1)] = -1
    """Steps between checkpoints, and one at the end; -1: none."""
    test_freq: Annotated[int, MinusOneOr(1)] = -1
    """Steps between validations, and one at the end; -1: none."""
    val_before_train: bool = True
    """Validate before the first step."""
    val_only: bool = False
    """Validate, then stop."""
    critic_warmup: NonNegative = 0
    """First steps in which only the critic learns."""
    default_local_dir: File = DERIVED
    """Run folder; null: checkpoints/<project_name>/<experiment_name>."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """auto: go on from the newest good checkpoint of the run folder, if any."""
    resume_from_path: File | None = None
    """Checkpoint folder (global_step_N) for resume_mode=resume_path."""
    max_actor_ckpt_to_keep: Positive | None = None
    """Newest checkpoints kept, besides the best; null: all."""
    max_critic_ckpt_to_keep: Positive | None = None
    """Another name for the key above: a checkpoint holds actor and critic together."""
    log_val_generations: NonNegative = 0
    """Validation answers shown on the console and kept in samples.jsonl each time."""
    rollout_data_dir: File | None = None
    """Folder for every training response, one jsonl file a step; null: not written."""
    validation_data_dir: File | None = None
    """Folder for every validation response, one jsonl file each time; null: not written."""


@dataclass(frozen=True)
class Provenance:
    """Where each value came from, and what the loader has to say about the configuration."""

    sources: ReadOnlyMapping[str, str] = field(default_factory=dict)
    """Key -> "default", "derived from <key>", "preset <name>", "file <path>" or "command line"."""
    notes: tuple[str, ...] = ()
    """What is worth telling before the run starts, e.g. the file the settings come from."""
    warnings: tuple[str, ...] = ()
    """Keys that were set and have no effect in this run, one sentence each; to be printed."""


@dataclass(frozen=True)
class Config:
    """The PPO job. Frozen; every derived value is filled in."""

    data: DataConfig = field(default_factory=DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    custom_reward_function: CustomRewardConfig = field(default_factory=CustomRewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    provenance: Provenance = field(default_factory=Provenance)
