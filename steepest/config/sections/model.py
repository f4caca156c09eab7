"""`actor_rollout_ref.model`: the policy's model. What other models, optimizers and SFT have in common with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from steepest.config.checks import MODEL, Deriver, IsSet, NoEffect, Section, names_of
from steepest.config.environment import hub_from_environment, switch_problems
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

if TYPE_CHECKING:
    from steepest.config.schema import Config, SFTConfig

SECTION = Section()


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
    """Names of those that are left out."""


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
    """dtype of forward and backward; auto: bfloat16 where the hardware has it and is faster with it, else float32.
    Weights stay float32. See docs/devices.md."""


@SECTION.null
def resolve(d: Deriver) -> None:
    resolve_hub(d, f"{MODEL}.hub")
    d.copy(f"{MODEL}.hub", "data.hub")
    d.copy("data.tokenizer", f"{MODEL}.tokenizer_path")
    d.fill(f"{MODEL}.tokenizer_path", d[f"{MODEL}.path"] or None, f"{MODEL}.path")


def resolve_hub(d: Deriver, key: str) -> None:
    """The hub that the environment asks for, where the user gave none."""
    hub, chosen_by = hub_from_environment()
    if chosen_by is not None and not d.is_set(key):
        d.replace(key, hub, chosen_by)


@SECTION.rule(f"{MODEL}.hub")
def hub_switches_are_clear(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    yield from switch_problems()


@SECTION.rule(f"{MODEL}.custom_chat_template")
def chat_template_is_one(c: Config, is_set: IsSet) -> Iterator[str]:
    yield from template_problems(f"{MODEL}.custom_chat_template", c.actor_rollout_ref.model.custom_chat_template)


def template_problems(key: str, text: str | None) -> Iterator[str]:
    """What is wrong with a chat template: a file's name in its place."""
    if text is not None and "{" not in text:
        yield (
            f"{key}={text}: not a Jinja template, it has no {{{{ ... }}}}, so every prompt would become this text. "
            f'Give the template itself, not its file: {key}="$(cat FILE)".'
        )


@SECTION.rule(f"{MODEL}.target_modules", f"{MODEL}.exclude_modules")
def adapter_has_layers(c: Config, is_set: IsSet) -> Iterator[str]:
    model = c.actor_rollout_ref.model
    yield from adapter_problems(MODEL, model.target_modules, model.exclude_modules)


def adapter_problems(section: str, targets: tuple[str, ...] | None, excluded: tuple[str, ...] | None) -> Iterator[str]:
    """What is wrong with the names of the layers that get an adapter. None is not checked."""
    key = f"{section}.target_modules"
    if targets == ():
        yield f"{key}=[]: no layer would be trained. Give names of layers, or all-linear."
    if targets and "all-linear" in targets and len(targets) > 1:
        yield (
            f"{key}=[{','.join(targets)}]: all-linear stands alone, for all linear layers. Give it, or names of layers."
        )
    if excluded and "all-linear" in excluded:
        yield f"{section}.exclude_modules=[{','.join(excluded)}]: nothing would be left. Give names of layers."


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return model_without_effect(MODEL, lambda c: c.actor_rollout_ref.model)


def model_without_effect(section: str, get: Callable[[Any], Any]) -> list[NoEffect]:
    """LoRA's options without an adapter, and the hub's for a model on this machine."""

    def nothing_is_fetched(c: Any) -> bool:
        model = get(c)
        return is_here(model.path) and is_here(getattr(model, "tokenizer_path", model.path))

    local = f"{section}.path is on this machine"
    return [
        NoEffect(
            names_of(section, "lora_alpha target_modules exclude_modules"),
            lambda c: get(c).lora_rank == 0,
            f"{section}.lora_rank=0 trains all weights, without an adapter",
        ),
        NoEffect((f"{section}.revision",), lambda c: is_here(get(c).path), local),
        NoEffect((f"{section}.hub",), nothing_is_fetched, local),
    ]


def is_here(path: str) -> bool:
    """Whether a model's path is a file or folder of this machine, so that no hub is asked."""
    return os.path.exists(path)  # False, too, for a name that is too long


def optim_without_effect(section: str, get: Callable[[Any], Any]) -> list[NoEffect]:
    """Options of a schedule that the optimizer in `section` does not have."""
    return [
        NoEffect(
            names_of(section, "min_lr_ratio num_cycles"),
            lambda c: get(c).lr_scheduler_type == "constant",
            f"{section}.lr_scheduler_type is constant",
        ),
        NoEffect(
            names_of(section, "lr_warmup_steps_ratio"),
            lambda c: get(c).lr_warmup_steps > 0,
            f"{section}.lr_warmup_steps wins",
        ),
        NoEffect(
            names_of(section, "zero_indexed_step"),
            lambda c: get(c).lr_warmup_steps <= 0 and get(c).lr_warmup_steps_ratio == 0,
            "there is no warm-up",
        ),
    ]


def small_rate(key: str, lr: float, usual: str) -> str:
    """The warning of a run that trains few weights at the default learning rate."""
    return (
        f"{key}={lr:g} is the default for all weights; with so few of them trained, about {usual} is usual: "
        "see docs/lora.md."
    )
