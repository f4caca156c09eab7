"""How each model computes: device, dtype, attention, and the size of a pass. From configuration keys to settings."""

from __future__ import annotations

from typing import Any, cast

import torch

from steepest.config.schema import Config, SFTConfig
from steepest.config.sections.critic import CriticModelConfig
from steepest.config.sections.model import ModelConfig
from steepest.devices.api import Device
from steepest.errors import ConfigError
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.trainable import ComputeSettings
from steepest.models.shared_prompts import DEVICE as SHARED_PROMPTS_DEVICE
from steepest.models.varlen import OVERRIDE, Attention, choose_attention

ACTOR_MODEL, CRITIC_MODEL, SFT_MODEL = "actor_rollout_ref.model", "critic.model", "model"
"""Sections of the configuration with a model."""


def compute_dtype(name: str, device: Device) -> str:
    """`auto` is bfloat16 where the hardware computes in it, else float32."""
    return str(device.default_dtype()).removeprefix("torch.") if name == "auto" else name


def compute_settings(
    model: ModelConfig | CriticModelConfig,
    section: str,
    dtype: str,
    device: Device,
    *,
    trained: bool = True,
    shares_prompts: bool = False,
) -> ComputeSettings:
    """Of the model in `section`. One that is only read has no backward pass and so no gradient checkpointing."""
    return ComputeSettings(
        device=device.torch_device(),
        dtype=cast(Any, compute_dtype(dtype, device)),
        gradient_checkpointing=trained and model.enable_gradient_checkpointing,
        attention=attention(model, section, dtype, device),
        shares_prompts=shares_prompts,
    )


def attention(model: ModelConfig | CriticModelConfig, section: str, dtype: str, device: Device) -> Attention:
    """The device's best, or what `override_config.attn_implementation` asks for."""
    asked = model.override_config.get(OVERRIDE)
    computed = getattr(torch, compute_dtype(dtype, device))
    return choose_attention(
        None if asked is None else str(asked), device, computed, f"{section}.override_config.{OVERRIDE}"
    )


SHARING = "actor_rollout_ref.actor.use_prefix_sharing"


def shares_prompts(config: Config, device: Device) -> bool:
    """Whether the responses of a prompt are computed over one copy of it: there are several, and the attention can.

    Raises ConfigError where it was asked for and the attention cannot.
    """
    asked, several = config.actor_rollout_ref.actor.use_prefix_sharing, config.actor_rollout_ref.rollout.n > 1
    can = device.torch_device().type == SHARED_PROMPTS_DEVICE
    if asked and several and not can:
        raise ConfigError(
            f"{SHARING}=True: attention over a shared prompt runs on the CPU only, and this run computes on "
            f"{device.torch_device().type}. Leave the key out."
        )
    return several and can and asked is not False


def check_attention(config: Config | SFTConfig, device: Device) -> None:
    """Raises ConfigError for an attention that cannot run, before anything is loaded."""
    if isinstance(config, SFTConfig):
        attention(config.model, SFT_MODEL, config.engine.dtype, device)
        return
    actor = config.actor_rollout_ref
    attention(actor.model, ACTOR_MODEL, actor.actor.fsdp_config.dtype, device)
    attention(config.critic.model, CRITIC_MODEL, config.critic.fsdp.dtype, device)
    shares_prompts(config, device)


def overrides(model: ModelConfig | CriticModelConfig) -> dict[str, Any]:
    """What replaces entries of the model's config.json: `override_config` without the choice of attention."""
    return {name: value for name, value in model.override_config.items() if name != OVERRIDE}


def micro_batches(purpose: str, rows: int | None, dynamic: bool | None, tokens: int | None) -> MicroBatches:
    """Rows a pass when they are given and the token budget is not asked for; else the token budget.

    `purpose`: whose passes they are, as in `config.key_names.PPO_KEYS`; messages name the key of that part.
    """
    if dynamic or rows is None:
        return MicroBatches(tokens=tokens, purpose=purpose)
    return MicroBatches(rows=rows, tokens=None, purpose=purpose)
