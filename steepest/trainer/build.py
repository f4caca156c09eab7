"""From a configuration to the parts of a run. Every choice of the configuration is made here, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steepest.config.plan import Plan
from steepest.config.schema import Config, CriticConfig
from steepest.config.schema_model import OptimConfig
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.batch import Batch
from steepest.core.kl import AdaptiveKLController, FixedKLController
from steepest.core.mismatch import mismatch_metrics
from steepest.core.policy_losses import POLICY_LOSSES
from steepest.devices.api import Accelerator, Device
from steepest.models.load import end_token_ids, load_causal_lm, load_value_model
from steepest.rollout import ROLLOUT_ENGINES, RolloutEngine, SamplingParams
from steepest.rollout.vllm import VLLMSettings
from steepest.trainer.algorithm import Advantages, KLController, KLShapedRewards, plain_rewards, with_options
from steepest.trainer.compute import (
    ACTOR_MODEL,
    CRITIC_MODEL,
    FORWARD_KEYS,
    LOG_PROB_KEYS,
    compute_dtype,
    compute_settings,
    micro_batches,
    overrides,
)
from steepest.trainer.metrics import batch_metrics, memory_metrics
from steepest.trainer.ppo import ActorAfterWarmup, ActorOfOneUpdate, NoCritic, NoReference, PPOStep, Timer
from steepest.trainer.resume import Start
from steepest.training.actor import Actor, ActorLossSettings
from steepest.training.critic import Critic, CriticLossSettings
from steepest.training.meters import Metrics
from steepest.training.micro_batches import MicroBatches
from steepest.training.mini_batches import UpdateSettings
from steepest.training.optim import OptimSettings
from steepest.training.reference import Reference
from steepest.training.rng import rng_state, set_rng_state


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
    reference: Reference | None


def build_models(config: Config, plan: Plan, start: Start, folders: Mapping[str, Path], device: Device) -> Models:
    """Load the models this run needs, from the checkpoint's folders where the run goes on from one.

    `folders` holds the folders of the start models, under "actor" and "critic".
    """
    actor = build_actor(config, plan, start.folder("actor", folders["actor"]), device)
    critic = reference = None
    if plan.needs_critic:
        critic = build_critic(config, plan, start.folder("critic", folders["critic"]), device)
    if plan.needs_reference:
        reference = build_reference(config, folders["actor"], device)
    if start.checkpoint is not None:
        actor.load_optimizer(start.checkpoint / "actor")
        if critic is not None:
            critic.load_optimizer(start.checkpoint / "critic")
    return Models(actor, critic, reference)


def build_actor(config: Config, plan: Plan, folder: Path, device: Device) -> Actor:
    actor, rollout, model = (
        config.actor_rollout_ref.actor,
        config.actor_rollout_ref.rollout,
        config.actor_rollout_ref.model,
    )
    options = {
        "clip_ratio_low": actor.clip_ratio_low,
        "clip_ratio_high": actor.clip_ratio_high,
        "clip_ratio_c": actor.clip_ratio_c,
    }
    return Actor(
        load_causal_lm(folder, trust_remote_code=model.trust_remote_code, override_config=overrides(model)),
        with_options(POLICY_LOSSES.get(actor.policy_loss.loss_mode).value, options),
        compute=compute_settings(model, ACTOR_MODEL, actor.fsdp_config.dtype, device),
        optim=optim_settings(actor.optim, total_steps=plan.total_steps, warmup_steps=plan.actor_warmup_steps),
        update=UpdateSettings(
            mini_batch_rows=plan.mini_batch_rows,
            micro=micro_batches(
                "actor_rollout_ref.actor",
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
            "actor_rollout_ref.rollout",
            rollout.log_prob_micro_batch_size_per_gpu,
            rollout.log_prob_use_dynamic_bsz,
            rollout.log_prob_max_token_len_per_gpu,
            keys=LOG_PROB_KEYS,
        ),
        temperature=rollout.temperature,
    )


def build_critic(config: Config, plan: Plan, folder: Path, device: Device) -> Critic:
    critic = config.critic
    return Critic(
        load_value_model(
            folder,
            trust_remote_code=critic.model.trust_remote_code,
            override_config=overrides(critic.model),
        ),
        compute=compute_settings(critic.model, CRITIC_MODEL, critic.fsdp.dtype, device),
        optim=optim_settings(critic.optim, total_steps=plan.total_steps, warmup_steps=plan.critic_lr_warmup_steps),
        update=UpdateSettings(
            mini_batch_rows=plan.critic_mini_batch_rows,
            micro=micro_batches(
                "critic",
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
        "critic",
        critic.forward_micro_batch_size_per_gpu,
        critic.use_dynamic_bsz,
        critic.forward_max_token_len_per_gpu,
        keys=FORWARD_KEYS,
    )


def build_reference(config: Config, folder: Path, device: Device) -> Reference:
    """The start model, never the checkpoint's: the KL is measured against where the run began."""
    ref, model = config.actor_rollout_ref.ref, config.actor_rollout_ref.model
    return Reference(
        load_causal_lm(folder, trust_remote_code=model.trust_remote_code, override_config=overrides(model)),
        compute=compute_settings(
            model, ACTOR_MODEL, config.actor_rollout_ref.actor.fsdp_config.dtype, device, trained=False
        ),
        forward=micro_batches(
            "actor_rollout_ref.ref",
            ref.log_prob_micro_batch_size_per_gpu,
            ref.log_prob_use_dynamic_bsz,
            ref.log_prob_max_token_len_per_gpu,
            keys=LOG_PROB_KEYS,
        ),
        temperature=config.actor_rollout_ref.rollout.temperature,
    )


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt with its response; a larger `rollout.max_model_len` changes nothing."""
    return min(
        config.actor_rollout_ref.rollout.max_model_len, config.data.max_prompt_length + config.data.max_response_length
    )


def frees_engine(config: Config, device: Device) -> bool:
    """Whether the engine gives its memory back while the models train; by default where memory is a card's."""
    wanted = config.actor_rollout_ref.rollout.free_cache_engine
    return isinstance(device, Accelerator) if wanted is None else wanted


def publish_weights(engine: RolloutEngine, device: Device, version: int) -> None:
    """Wake the engine with the new weights. It may have an allocator of its own, so what torch's keeps of the training
    for later goes back to the device first."""
    device.empty_cache()
    engine.load_weights(version)


def vllm_settings(config: Config, device: Device) -> VLLMSettings:
    """What the configuration and the device say to vLLM."""
    rollout = config.actor_rollout_ref.rollout
    eager = rollout.enforce_eager
    return VLLMSettings(
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        enforce_eager=not isinstance(device, Accelerator) if eager is None else eager,
        enable_chunked_prefill=rollout.enable_chunked_prefill,
        enable_prefix_caching=rollout.enable_prefix_caching,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        usual_rows=config.data.train_batch_size * rollout.n,
        sleep_level=device.sleep_level if frees_engine(config, device) else None,
        environment=device.rollout_environment(),
        extra=rollout.engine_kwargs.vllm,
    )


def build_engine(config: Config, actor: Actor, tokenizer: Any, folder: Path, device: Device) -> RolloutEngine:
    """The rollout engine over the actor's weights. What its start does to random numbers is undone."""
    random = rng_state(device)
    try:
        return _make_engine(config, actor, tokenizer, folder, device)
    finally:
        set_rng_state(random, device)


def _make_engine(config: Config, actor: Actor, tokenizer: Any, folder: Path, device: Device) -> RolloutEngine:
    rollout = config.actor_rollout_ref.rollout
    entry = ROLLOUT_ENGINES.get(rollout.name)
    more = {"settings": vllm_settings(config, device)} if entry.facts.get("settings") else {}
    return entry.value(
        actor.model,
        end_token_ids=end_token_ids(folder, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        dtype=getattr(torch, compute_dtype(rollout.dtype, device)),
        max_num_seqs=rollout.max_num_seqs,
        max_model_len=longest_sequence(config),
        # Of the memory there is, not of the memory that is free: a resumed run must batch as the first one did.
        kv_memory_bytes=int(rollout.gpu_memory_utilization * device.memory().total),
        **more,
    )


def train_sampling(config: Config) -> SamplingParams:
    rollout = config.actor_rollout_ref.rollout
    return SamplingParams(
        max_tokens=config.data.max_response_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        n=rollout.n,
        seed=rollout.seed,
        ignore_eos=rollout.ignore_eos,
    )


def val_sampling(config: Config) -> SamplingParams:
    rollout = config.actor_rollout_ref.rollout
    return SamplingParams(
        max_tokens=config.data.max_response_length,
        temperature=rollout.val_kwargs.temperature,
        top_p=rollout.val_kwargs.top_p,
        top_k=rollout.val_kwargs.top_k,
        n=rollout.val_kwargs.n,
        seed=rollout.seed,
    )


def build_controller(config: Config) -> KLController:
    control = config.algorithm.kl_ctrl
    if control.type == "adaptive":
        return AdaptiveKLController(control.kl_coef, control.target_kl, control.horizon)
    return FixedKLController(control.kl_coef)


def build_advantages(config: Config) -> Advantages:
    """The estimator with its options. What reads values is whitened over the batch; groups scale themselves."""
    algorithm = config.algorithm
    options = {
        "gamma": algorithm.gamma,
        "lam": algorithm.lam,
        "bootstrap_truncated": algorithm.bootstrap_truncated,
        "norm_by_std": algorithm.norm_adv_by_std_in_grpo,
    }
    entry = ADVANTAGE_ESTIMATORS.get(algorithm.adv_estimator)
    return Advantages(with_options(entry.value, options), whitened="values" in entry.facts.get("needs", ()))


def describe_batch(batch: Batch, *, device: Device, compare_engines: bool) -> Metrics:
    """Statistics of the finished batch; engine against trainer where both speak of the same distribution."""
    metrics = batch_metrics(batch)
    if compare_engines and batch.rollout_log_probs is not None and batch.old_log_probs is not None:
        metrics |= mismatch_metrics(batch.rollout_log_probs, batch.old_log_probs, batch.response_mask)
    metrics["tokens"] = float(batch.lengths.sum())
    return metrics | memory_metrics(device)


def unfiltered(sampling: SamplingParams) -> bool:
    """Whether tokens are drawn from the whole distribution, whose log-probs are also the trainer's."""
    return sampling.top_p >= 1.0 and sampling.top_k == -1


def build_step(
    config: Config,
    plan: Plan,
    models: Models,
    controller: KLController,
    *,
    generate: Callable[[int], Batch],
    score: Callable[[Batch, int], Metrics],
    engine: RolloutEngine,
    device: Device,
) -> PPOStep:
    """The step of `ppo.py` with the objects that this configuration asks for."""
    algorithm = config.algorithm
    compare = unfiltered(train_sampling(config))
    actor = ActorOfOneUpdate(models.actor) if plan.skips_old_log_probs else models.actor
    return PPOStep(
        generate=generate,
        score=score,
        actor=ActorAfterWarmup(actor, config.trainer.critic_warmup),
        critic=models.critic or NoCritic(),
        reference=models.reference or NoReference(),
        shape_rewards=KLShapedRewards(controller, algorithm.kl_penalty)
        if algorithm.use_kl_in_reward
        else plain_rewards,
        estimate_advantages=build_advantages(config),
        publish_weights=partial(publish_weights, engine, device)
        if frees_engine(config, device)
        else engine.load_weights,
        describe=partial(describe_batch, device=device, compare_engines=compare),
        timed=Timer(device.synchronize),
    )
