"""The PPO job's configuration: one dataclass a section, one field a key, what it does beneath it.

The tree is verl's (`data`, `actor_rollout_ref`, `critic`, `algorithm`, `trainer`, ...). `None` (null) means: derived
from other keys by resolve.py when the configuration is loaded; the loaded Config holds the derived value.
Sections with many keys are in the schema_*.py files beside this one. Keys of verl's that are in none of them are in
verl_keys.py. docs/configuration.md is generated from these files.
"""

from __future__ import annotations

from collections.abc import Mapping as ReadOnlyMapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from steepest.config.schema_actor import ActorConfig
from steepest.config.schema_algorithm import AlgorithmConfig
from steepest.config.schema_model import (
    CriticComputeConfig,
    CriticModelConfig,
    ModelConfig,
    OptimConfig,
)
from steepest.config.schema_reward import CustomRewardConfig, RewardConfig
from steepest.config.schema_rollout import RolloutConfig
from steepest.config.schema_types import (
    DERIVED,
    DeviceName,
    File,
    LoggerName,
    LossAggMode,
    Mapping,
    MinusOneOr,
    NonNegative,
    Positive,
    PositiveFloat,
    RequiredFiles,
    Seed,
)


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
    device: DeviceName | None = None
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
    critic_warmup_returns: Literal["estimator", "monte_carlo"] = "estimator"
    """What the critic learns in those steps: the estimator's returns, or the rewards that followed, as with
    `algorithm.lam=1` (VC-PPO's value pretraining). Ours, not verl's."""
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
