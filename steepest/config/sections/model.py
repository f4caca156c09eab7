"""Sections that several jobs share: a model, an optimizer, the dtype of compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from steepest.config.types import (
    DERIVED,
    Bounds,
    ComputeDtype,
    File,
    Hub,
    Mapping,
    MinusOneOr,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RequiredFile,
    Share,
)


@dataclass(frozen=True)
class ModelConfig:
    """`actor_rollout_ref.model`: the policy's start; the reference is its frozen copy. Also `model` of SFT."""

    path: RequiredFile = ""
    """Folder in Hugging Face layout, GGUF file, or hub id."""
    hub: Hub = "huggingface"
    """Hub of a `path` that is no local folder. With VERL_USE_MODELSCOPE=True in the environment: modelscope."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the hub; null: the newest. A resumed run keeps the commit it began with."""
    tokenizer_path: File = DERIVED
    """Folder or hub id of the tokenizer; null: `path` (in PPO `data.tokenizer`, if that is given)."""
    custom_chat_template: str | None = None
    """Jinja text that replaces the tokenizer's own chat template; null keeps the tokenizer's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder. Off: a model that needs it is refused."""
    override_config: Mapping = field(default_factory=dict)
    """Values that replace those of the model's config.json, e.g. `{max_position_embeddings: 8192}`."""
    enable_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more compute for much less memory. verl: on."""
    lora_rank: NonNegative = 0
    """Train a LoRA adapter of this rank on the frozen model, which then also is the reference; 0: train all weights."""
    lora_alpha: Positive = 16
    """The adapter's output is scaled by `lora_alpha / lora_rank`."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Linear layers that get the adapter, by name, e.g. `[q_proj,v_proj]`; all-linear: all but the head."""
    exclude_modules: tuple[str, ...] | None = None
    """Of those, the ones left out, by name."""


@dataclass(frozen=True)
class CriticModelConfig:
    """`critic.model`: the value model's start, a backbone with a value head that begins at zero."""

    path: File = DERIVED
    """Folder in Hugging Face layout, GGUF file, or hub id; null: `actor_rollout_ref.model.path`."""
    hub: Hub = DERIVED
    """Hub of `path`; null: the actor's."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the hub; null: the actor's if `path` is the same, else the newest."""
    trust_remote_code: bool = DERIVED
    """Run Python code that comes with the model folder; null: the actor's."""
    override_config: Mapping = field(default_factory=dict)
    """Values that replace those of the model's config.json."""
    enable_gradient_checkpointing: bool = DERIVED
    """Recompute activations in the backward pass; null: the actor's."""
    lora_rank: NonNegative = DERIVED
    """Train a LoRA adapter and the value head on the frozen model; 0: all weights. null: 0, with
    `critic.share_base=adapter` the actor's."""
    lora_alpha: Positive = DERIVED
    """The adapter's output is scaled by `lora_alpha / lora_rank`; null: the actor's."""
    target_modules: tuple[str, ...] = DERIVED
    """Linear layers that get the adapter, by name; null: the actor's."""
    exclude_modules: tuple[str, ...] | None = None
    """Of those, the ones left out, by name; null: the actor's."""


@dataclass(frozen=True)
class OptimConfig:
    """`*.optim`: AdamW with gradient clipping and a learning-rate schedule that moves once a step."""

    lr: NonNegativeFloat = 1e-6
    """Peak learning rate. Default 1e-6 for the actor, 1e-5 for the critic and SFT."""
    lr_warmup_steps: Annotated[int, MinusOneOr(0)] = -1
    """Steps of linear warm-up from 0; -1: from `lr_warmup_steps_ratio`. Wins over the ratio when above 0."""
    lr_warmup_steps_ratio: Share = 0.0
    """Warm-up as a share of all steps, 0 to 1."""
    lr_scheduler_type: Literal["constant", "cosine"] = "constant"
    """Shape after the warm-up."""
    min_lr_ratio: Share = 0.0
    """Cosine only: the lowest learning rate as a share of `lr`."""
    num_cycles: NonNegativeFloat = 0.5
    """Cosine only: waves over the run; 0.5 goes down once and ends at the lowest."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of AdamW, on every parameter."""
    betas: Annotated[tuple[float, float], Bounds(low=0.0, below=1.0)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    clip_grad: PositiveFloat | None = 1.0
    """Largest global L2 norm of the gradient; null: no clipping."""
    zero_indexed_step: bool = True
    """The first step of a warm-up has learning rate 0 (as verl and transformers); off: lr / lr_warmup_steps."""


@dataclass(frozen=True)
class ComputeConfig:
    """`actor_rollout_ref.actor.fsdp_config`: how the actor and the reference compute; SFT's `engine`."""

    dtype: ComputeDtype = "auto"
    """dtype of forward and backward; auto: bfloat16 where the hardware has it, else float32. Weights stay float32."""


@dataclass(frozen=True)
class CriticComputeConfig:
    """`critic.fsdp`: how the critic computes."""

    dtype: ComputeDtype = DERIVED
    """dtype of forward and backward; null: the actor's."""
