"""The roles of a run, from configuration and plan: actor, critic, reference and rollout engine, in any process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steepest.assembly.compute import (
    ACTOR_MODEL,
    CRITIC_MODEL,
    compute_settings,
    micro_batches,
    overrides,
    shares_prompts,
)
from steepest.assembly.engine import build_engine, longest_sequence
from steepest.assembly.lora import halves_base, load_critic, load_policy
from steepest.assembly.policy_loss import build_policy_loss
from steepest.config.key_names import model_keys
from steepest.config.plan import Plan
from steepest.config.schema import Config
from steepest.config.sections.critic import CriticConfig
from steepest.config.sections.model import OptimConfig
from steepest.console import say
from steepest.devices.api import Device
from steepest.errors import key_names
from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.checkpoint import Start
from steepest.learner.critic import Critic, CriticLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import BaseReference, ReadingReference, Reference
from steepest.learner.shared_critic import AdapterCritic, HeadCritic
from steepest.learner.trainable import ComputeSettings
from steepest.models.bf16_storage import hold_in_bf16
from steepest.models.causal_lm import CausalLM
from steepest.models.load import check_vocabulary, load_causal_lm
from steepest.models.lora_models import LoraCausalLM
from steepest.models.value_head import ValueModel
from steepest.process.malloc import give_back_freed
from steepest.rollout import RolloutEngine
from steepest.rollout.weights import LocalWeights, ModelDescription


def optim_settings(optim: OptimConfig, *, total_steps: int, warmup_steps: int) -> OptimSettings:
    return OptimSettings(
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        schedule=optim.lr_scheduler_type,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        min_lr_ratio=optim.min_lr_ratio,
        num_cycles=optim.num_cycles,
        zero_indexed_step=optim.zero_indexed_step,
    )


@dataclass
class Models:
    """What is trained and what is only read. `critic` and `reference` are None in a run that has none."""

    actor: Actor
    critic: Critic | None
    reference: Reference | BaseReference | None

    def take_flops(self) -> float:
        """Operations of all passes since this was last called; see `Trainable.take_flops`."""
        roles = (self.actor, self.critic, self.reference)
        return sum(role.take_flops() for role in roles if role is not None)


@dataclass
class Roles(Models):
    """The models of a run and the engine that generates with the actor's weights, all in one process: with LoRA they
    share a base, and the engine of a CPU runs on the actor's own modules."""

    engine: RolloutEngine

    @property
    def weights(self) -> LocalWeights:
        """What the engine takes its weights from."""
        return LocalWeights(self.actor.model)


def build_roles(
    config: Config,
    plan: Plan,
    start: Start,
    folders: Mapping[str, Path],
    tokenizer: Any,
    device: Device,
    lap: Callable[[str], None] = lambda name: None,
) -> Roles:
    """Build every role and give the engine the weights of `start`.

    `folders` holds the folders of the start models, under "actor" and "critic". `lap` is called with "models" and
    "engine" when these are there. Raises ModelError for a model that does not fit the tokenizer or the lengths.
    """
    models = build_models(config, plan, start, folders, device)
    _check_models(config, models, tokenizer)
    lap("models")
    engine = build_engine(config, ModelDescription.of(models.actor.model), tokenizer, folders["actor"], device)
    roles = Roles(models.actor, models.critic, models.reference, engine)
    engine.load_weights(roles.weights, start.step)
    lap("engine")
    return roles


def _check_models(config: Config, models: Models, tokenizer: Any) -> None:
    longest = longest_sequence(config)
    for key, part in ((ACTOR_MODEL, models.actor), (CRITIC_MODEL, models.critic)):
        if part is not None:
            with key_names(model_keys(key)):
                note = check_vocabulary(part.model, tokenizer)
                if note is not None and part is models.actor:
                    say(note)
                part.model.check_length(longest)


def build_models(config: Config, plan: Plan, start: Start, folders: Mapping[str, Path], device: Device) -> Models:
    """Load the models this run needs, from the checkpoint's folders where the run resumes from one.

    `folders` holds the folders of the start models, under "actor" and "critic".
    """
    compute = compute_settings(
        config.actor_rollout_ref.model,
        ACTOR_MODEL,
        config.actor_rollout_ref.actor.fsdp_config.dtype,
        device,
        shares_prompts=shares_prompts(config, device),
    )
    halve = halves_base(config, compute.dtype, device)
    policy = load_policy(
        config.actor_rollout_ref.model,
        start,
        folders["actor"],
        halve=None if plan.needs_critic and config.critic.share_base is not None else halve,
    )
    actor = build_actor(config, plan, policy, compute)
    critic = reference = reader = None
    if plan.needs_reference:
        origin = None if start.checkpoint is None else folders["actor"]
        reference = build_reference(config, plan, policy, origin, device)
        if actor.loss.exact_kl:
            actor.reference = reference
    if plan.needs_critic and config.critic.share_base == "head":
        reader = reference if isinstance(reference, ReadingReference) else build_reader(config, policy, device)
    if plan.needs_critic:
        with key_names(model_keys(CRITIC_MODEL)):
            model = load_critic(config, start, folders["critic"], policy, halve=halve)
        critic = build_critic(config, plan, model, reader, device)
    if start.checkpoint is not None:
        actor.load_optimizer(start.checkpoint / "actor")
        if critic is not None:
            critic.load_optimizer(start.checkpoint / "critic")
    give_back_freed()
    return Models(actor, critic, reference)


def build_actor(config: Config, plan: Plan, policy: CausalLM, compute: ComputeSettings) -> Actor:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    policy_loss, choose = build_policy_loss(config)
    return Actor(
        policy,
        policy_loss,
        compute=compute,
        optim=optim_settings(actor.optim, total_steps=plan.total_steps, warmup_steps=plan.actor_warmup_steps),
        update=UpdateSettings(
            mini_batch_rows=plan.mini_batch_rows,
            micro=micro_batches(
                "actor.update",
                actor.ppo_micro_batch_size_per_gpu,
                actor.use_dynamic_bsz,
                actor.ppo_max_token_len_per_gpu,
            ),
            epochs=actor.ppo_epochs,
            shuffle=actor.shuffle,
            seed=actor.data_loader_seed,
        ),
        loss=ActorLossSettings(
            loss_agg_mode=actor.loss_agg_mode,
            loss_scale_factor=actor.loss_scale_factor,
            entropy_coeff=actor.entropy_coeff,
            use_kl_loss=actor.use_kl_loss,
            kl_loss_coef=actor.kl_loss_coef,
            kl_loss_type=actor.kl_loss_type,
        ),
        forward=micro_batches(
            "actor.log_probs",
            rollout.log_prob_micro_batch_size_per_gpu,
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_max_token_len_per_gpu,
        ),
        temperature=rollout.temperature,
        choose=choose,
    )


def build_critic(
    config: Config, plan: Plan, model: ValueModel, reader: ReadingReference | None, device: Device
) -> Critic:
    """`reader` has the hidden states that a head on the actor's base reads; None for every other critic."""
    critic = config.critic
    if reader is not None:
        kind: Callable[..., Critic] = partial(HeadCritic, reader=reader)
    else:
        kind = Critic if critic.share_base is None else AdapterCritic
    return kind(
        model,
        compute=compute_settings(
            critic.model,
            CRITIC_MODEL,
            critic.fsdp.dtype,
            device,
            trained=reader is None,
            shares_prompts=shares_prompts(config, device),
        ),
        optim=optim_settings(critic.optim, total_steps=plan.total_steps, warmup_steps=plan.critic_lr_warmup_steps),
        update=UpdateSettings(
            mini_batch_rows=plan.critic_mini_batch_rows,
            micro=micro_batches(
                "critic.update",
                critic.ppo_micro_batch_size_per_gpu,
                critic.use_dynamic_bsz,
                critic.ppo_max_token_len_per_gpu,
            ),
            epochs=critic.ppo_epochs,
            shuffle=critic.shuffle,
            seed=critic.data_loader_seed,
        ),
        loss=CriticLossSettings(
            cliprange_value=critic.cliprange_value,
            loss_agg_mode=critic.loss_agg_mode,
            loss_scale_factor=critic.loss_scale_factor,
        ),
        forward=_critic_forward(critic),
    )


def _critic_forward(critic: CriticConfig) -> MicroBatches:
    return micro_batches(
        "critic.forward",
        critic.forward_micro_batch_size_per_gpu,
        critic.use_dynamic_bsz,
        critic.forward_max_token_len_per_gpu,
    )


def build_reference(
    config: Config, plan: Plan, policy: CausalLM, origin: Path | None, device: Device
) -> Reference | BaseReference:
    """The start model, never the checkpoint's: the KL is measured against where the run began. With LoRA that is the
    actor's own base; else a model of its own, read from `origin`, or copied where the policy is the start model."""
    ref, model = config.actor_rollout_ref.ref, config.actor_rollout_ref.model
    forward = micro_batches(
        "reference.log_probs",
        ref.log_prob_micro_batch_size_per_gpu,
        ref.log_prob_use_dynamic_bsz,
        ref.log_prob_max_token_len_per_gpu,
    )
    compute, temperature = _reading(config, device), config.actor_rollout_ref.rollout.temperature
    if isinstance(policy, LoraCausalLM):
        kind = ReadingReference if plan.needs_critic and config.critic.share_base == "head" else BaseReference
        return kind(policy, compute=compute, forward=forward, temperature=temperature)
    if origin is None:
        frozen = policy.copy_as(torch.float32)
    else:
        frozen = load_causal_lm(origin, trust_remote_code=model.trust_remote_code, override_config=overrides(model))
    hold_in_bf16(frozen.requires_grad_(False).hf, rounding=compute.dtype == "bfloat16")
    return Reference(frozen, compute=compute, forward=forward, temperature=temperature)


def build_reader(config: Config, policy: CausalLM, device: Device) -> ReadingReference:
    """Builds what a value head reads, in a run whose reward and loss need no reference."""
    assert isinstance(policy, LoraCausalLM), "checked by config.sections.model"
    return ReadingReference(policy, compute=_reading(config, device), forward=_critic_forward(config.critic))


def _reading(config: Config, device: Device) -> ComputeSettings:
    """How a policy computes that is only read."""
    dtype = config.actor_rollout_ref.actor.fsdp_config.dtype
    return compute_settings(
        config.actor_rollout_ref.model,
        ACTOR_MODEL,
        dtype,
        device,
        trained=False,
        shares_prompts=shares_prompts(config, device),
    )
