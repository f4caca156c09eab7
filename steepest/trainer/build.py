"""From a configuration to the parts of a run. Every choice of the configuration is made here, once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steepest.config.plan import Plan
from steepest.config.schema import Config
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.batch import Batch
from steepest.core.kl import AdaptiveKLController, FixedKLController
from steepest.core.mismatch import mismatch_metrics
from steepest.devices.api import Accelerator, Device
from steepest.models.causal_lm import CausalLM
from steepest.models.flops import WORK, generation_flops
from steepest.models.load import end_token_ids
from steepest.rollout import ROLLOUT_ENGINES, RolloutEngine, SamplingParams
from steepest.rollout.vllm import VLLMSettings
from steepest.trainer.algorithm import Advantages, KLController, KLShapedRewards, plain_rewards, with_options
from steepest.trainer.build_models import Models
from steepest.trainer.compute import compute_dtype
from steepest.trainer.metrics import batch_metrics, memory_metrics, mfu_metrics
from steepest.trainer.old_log_probs import ActorOfEngineLogProbs
from steepest.trainer.ppo import ActorAfterWarmup, ActorLike, ActorOfOneUpdate, NoCritic, NoReference, PPOStep, Timer
from steepest.trainer.run import say
from steepest.training.actor import Actor
from steepest.training.meters import Metrics
from steepest.training.rng import rng_state, set_rng_state


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
    """Statistics of the finished batch; engine against trainer where both speak of the same distribution, over the
    rows that the trainer computed (`mismatch/rows_compared` of all)."""
    metrics = batch_metrics(batch)
    if compare_engines and batch.rollout_log_probs is not None and batch.old_log_probs is not None:
        own = torch.ones(len(batch), dtype=torch.bool) if batch.recomputed is None else batch.recomputed
        mask = batch.response_mask & own[:, None]
        metrics |= mismatch_metrics(batch.rollout_log_probs, batch.old_log_probs, mask)
        metrics["mismatch/rows_compared"] = own.float().mean().item()
    metrics["tokens"] = float(batch.lengths.sum())
    metrics["response_tokens"] = float(batch.response_lengths.sum())
    return metrics | memory_metrics(device)


def generate_counted(generate: Callable[[int], Batch], model: CausalLM, step: int) -> Batch:
    """Responses, whose arithmetic is counted as any engine's that keeps keys and values."""
    with WORK.paused():
        batch = generate(step)
    WORK.add(generation_flops(model, batch))
    return batch


def unfiltered(sampling: SamplingParams) -> bool:
    """Whether tokens are drawn from the whole distribution, whose log-probs are also the trainer's."""
    return sampling.top_p >= 1.0 and sampling.top_k == -1


def actor_of_a_step(config: Config, plan: Plan, models: Models) -> ActorLike:
    """The actor with the old log-probs that the plan says."""
    if plan.old_log_probs == "update":
        return ActorOfOneUpdate(models.actor)
    if plan.old_log_probs == "pass":
        return models.actor
    wrapped = ActorOfEngineLogProbs(models.actor, one_update=plan.updates_per_step == 1, say=say)
    if config.algorithm.use_kl_in_reward and models.reference is not None:
        wrapped.is_reference = partial(models.actor.model.computes_as, models.reference.model)
    return wrapped


def half_precision(config: Config, device: Device) -> bool:
    """Whether the actor or the engine computes in half precision, where the two round apart."""
    arr = config.actor_rollout_ref
    dtypes = (arr.actor.fsdp_config.dtype, arr.rollout.dtype)
    return any(compute_dtype(dtype, device) != "float32" for dtype in dtypes)


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
    limit: float,
) -> PPOStep:
    """The step of `ppo.py` with the objects that this configuration asks for. `limit`: operations a second that the
    device can do, for `perf/mfu`."""
    algorithm = config.algorithm
    compare = unfiltered(train_sampling(config))
    actor = actor_of_a_step(config, plan, models)
    return PPOStep(
        generate=partial(generate_counted, generate, models.actor.model),
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
        timed=Timer(device.synchronize, work=WORK.read, rates=partial(mfu_metrics, limit=limit)),
    )
