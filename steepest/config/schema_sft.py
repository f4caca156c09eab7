"""The supervised fine-tuning job's configuration (`python -m steepest.trainer.main_sft`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from steepest.config.schema import Provenance
from steepest.config.schema_model import ComputeConfig, ModelConfig, OptimConfig
from steepest.config.schema_types import (
    DERIVED,
    DeviceName,
    File,
    Files,
    LoggerName,
    Mapping,
    MinusOneOr,
    Positive,
    RequiredFiles,
    Seed,
)


@dataclass(frozen=True)
class SFTDataConfig:
    """`data`: conversations, or prompts with answers."""

    train_files: RequiredFiles = ()
    """One file or a list: parquet, jsonl or json."""
    val_files: Files = ()
    """One file or a list; none: no validation."""
    train_batch_size: Positive = 256
    """Samples an optimizer step. The last incomplete batch of an epoch is left out."""
    max_length: Positive = 1024
    """Longest sample in tokens, prompt and answer; see `truncation`."""
    micro_batch_size_per_gpu: Positive | None = None
    """Samples a forward and backward; null: filled to `max_token_len_per_gpu`."""
    max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch; null: 4096, or `max_length` if that is more."""
    messages_key: str = "messages"
    """Column with a whole conversation; the loss is on the assistant's turns. Read when the file has it."""
    prompt_key: str = "prompt"
    """Column with the prompt (text or messages), for files without `messages_key`."""
    response_key: str = "response"
    """Column with the answer, for files without `messages_key`."""
    truncation: Literal["error", "left", "right"] = "error"
    """An overlong sample: stop the run, or cut tokens at its left or right."""
    shuffle: bool = True
    """A new order of the samples each epoch."""
    seed: Seed = 42
    """Seed of order and subset."""
    train_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many training rows; -1: all."""
    val_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many validation rows; -1: all."""
    apply_chat_template_kwargs: Mapping = field(default_factory=dict)
    """Arguments for the chat template."""


@dataclass(frozen=True)
class SFTTrainerConfig:
    """`trainer`: the run."""

    total_epochs: Positive = 1
    """Passes over the training data."""
    total_training_steps: Positive | None = None
    """Steps of the run; null: steps an epoch times `total_epochs`. Wins over `total_epochs` when given."""
    project_name: str = "steepest"
    """Folder and logger project."""
    experiment_name: str = "sft"
    """Folder and logger run."""
    logger: tuple[LoggerName, ...] = ("console",)
    """Where metrics go, one name or a list. metrics.jsonl is always written."""
    device: DeviceName | None = None
    """null: the best one present."""
    nnodes: Positive = 1
    """Machines."""
    n_gpus_per_node: Positive = 1
    """Accelerators a machine."""
    save_freq: Annotated[int, MinusOneOr(1)] = -1
    """Steps between checkpoints, and one at the end; -1: one at the end only."""
    test_freq: Annotated[int, MinusOneOr(1)] = -1
    """Steps between validations, and one at the end; -1: none."""
    default_local_dir: File = DERIVED
    """Run folder; null: checkpoints/<project_name>/<experiment_name>."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """auto: go on from the newest good checkpoint of the run folder, if any."""
    resume_from_path: File | None = None
    """Checkpoint folder (global_step_N) for resume_mode=resume_path."""
    max_ckpt_to_keep: Positive | None = None
    """Newest checkpoints kept, besides the best; null: all."""


@dataclass(frozen=True)
class SFTConfig:
    """The SFT job. Frozen; every derived value is filled in."""

    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: ComputeConfig = field(default_factory=ComputeConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    trainer: SFTTrainerConfig = field(default_factory=SFTTrainerConfig)
    provenance: Provenance = field(default_factory=Provenance)
