"""LoRA in a run: which models get an adapter, who shares the base, and how they start or go on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

from steepest.assembly.compute import compute_dtype, overrides
from steepest.config.schema import Config
from steepest.config.sections.critic import CriticModelConfig
from steepest.config.sections.model import ModelConfig
from steepest.devices.api import Device
from steepest.errors import CheckpointError, setting
from steepest.learner.checkpoint import Start
from steepest.models import lora
from steepest.models.bf16_storage import hold_in_bf16
from steepest.models.causal_lm import CausalLM
from steepest.models.load import load_causal_lm, load_value_model
from steepest.models.lora import BaseModel, LoraSettings
from steepest.models.lora_models import FrozenValueModel, LoraCausalLM
from steepest.models.value_head import ValueModel


def lora_settings(model: ModelConfig | CriticModelConfig) -> LoraSettings | None:
    """The adapter of a model; None where all weights are trained."""
    if model.lora_rank == 0:
        return None
    here = Path(model.path)
    return LoraSettings(
        rank=model.lora_rank,
        alpha=model.lora_alpha,
        target_modules=model.target_modules,
        exclude_modules=model.exclude_modules or (),
        base=BaseModel(
            path=str(here.absolute()) if here.exists() else model.path,
            hub=model.hub,
            revision=None if here.exists() else model.revision,
            override_config=overrides(model),
        ),
    )


def load_policy(model: ModelConfig, start: Start, folder: Path, *, halve: bool | None) -> CausalLM:
    """The policy: the start model or the checkpoint's; with LoRA the start model in `folder` under a fresh adapter or
    the checkpoint's. `halve`: a frozen base may be rounded to bf16. None: it stays as it is, for another adapter, which
    peft would round."""
    settings = lora_settings(model)
    origin = start.folder("actor", folder) if settings is None else folder
    if settings is None and start.checkpoint is not None:
        _require_whole(origin)
    policy = load_causal_lm(origin, trust_remote_code=model.trust_remote_code, override_config=overrides(model))
    if settings is None:
        return policy
    adapter = None if start.checkpoint is None else start.folder("actor", folder)
    adapted = LoraCausalLM(policy.hf, settings, adapter=adapter)
    if halve is not None:
        hold_in_bf16(adapted.hf, rounding=halve)
    return adapted


def load_critic(config: Config, start: Start, folder: Path, trunk: CausalLM, *, halve: bool) -> ValueModel:
    """The critic: a model of its own, one under an adapter, or adapter and head on the actor's base."""
    critic = config.critic.model
    settings = lora_settings(critic)
    saved = None if start.checkpoint is None else start.folder("critic", folder)
    if config.critic.share_base is not None:
        model = FrozenValueModel(trunk.hf, settings)
        hold_in_bf16(trunk.hf, rounding=halve)
    else:
        if settings is None and saved is not None:
            _require_whole(saved)
        whole = load_value_model(
            folder if settings is not None or saved is None else saved,
            trust_remote_code=critic.trust_remote_code,
            override_config=overrides(critic),
        )
        if settings is None:
            return whole
        model = FrozenValueModel(whole.hf, settings)
        hold_in_bf16(model.hf, rounding=halve)
    if saved is not None:
        model.load(saved)
    return model


def halves_base(config: Config, dtype: str, device: Device) -> bool:
    """Whether frozen matrices are rounded to bf16: where they are only ever used in it. The engines of this process run
    the policy's own modules in fp32, or look at them so."""
    return compute_dtype(dtype, device) == "bfloat16" and config.actor_rollout_ref.rollout.name == "vllm"


def _require_whole(folder: Path) -> None:
    """A run that trains all weights cannot go on from an adapter."""
    if lora.is_adapter(folder) or not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds what a run with LoRA trained, and {setting('lora_rank')} is 0 now. Go on with the "
            f"run's own lora_rank and {setting('share_base')}, or begin a new run "
            f"(another {setting('experiment_name')})."
        )
