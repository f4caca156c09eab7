"""The configurations of both jobs: their sections put together.

A section's dataclass has one field a key, and beneath it what the key does. The tree of the PPO job is verl's (`data`,
`actor_rollout_ref`, `critic`, `algorithm`, `trainer`, ...). `None` (null) means: derived from other keys by the section
when the configuration is loaded; the loaded Config holds the derived value. Keys of verl's that are in no section are
in verl_keys.py. docs/configuration.md is generated from these classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from steepest.config.sections.actor import ActorConfig
from steepest.config.sections.advantages import AlgorithmConfig
from steepest.config.sections.critic import CriticConfig
from steepest.config.sections.data import DataConfig
from steepest.config.sections.kl import RefConfig
from steepest.config.sections.model import ComputeConfig, ModelConfig, OptimConfig
from steepest.config.sections.reward import CustomRewardConfig, RewardConfig
from steepest.config.sections.rollout import RolloutConfig
from steepest.config.sections.sft import SFTDataConfig, SFTTrainerConfig
from steepest.config.sections.trainer import TrainerConfig


@dataclass(frozen=True)
class ActorRolloutRefConfig:
    """`actor_rollout_ref`: the policy, its generation and its frozen reference."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ref: RefConfig = field(default_factory=RefConfig)


@dataclass(frozen=True)
class Provenance:
    """Where each value came from, and what the loader has to say about the configuration."""

    sources: Mapping[str, str] = field(default_factory=dict)
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


@dataclass(frozen=True)
class SFTConfig:
    """The SFT job. Frozen; every derived value is filled in."""

    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: ComputeConfig = field(default_factory=ComputeConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    trainer: SFTTrainerConfig = field(default_factory=SFTTrainerConfig)
    provenance: Provenance = field(default_factory=Provenance)
