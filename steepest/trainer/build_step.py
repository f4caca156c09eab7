"""From a configuration to the parts of a run. Every choice of the configuration is made here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from steepest.assembly.compute import compute_dtype
from steepest.assembly.engine import frees_engine, publish_weights
from steepest.assembly.policy_loss import build_weighting
from steepest.assembly.roles import Models
from steepest.config.plan import Plan
from steepest.config.schema import Config
from steepest.config.sections.advantages import estimator_options
from steepest.console import say
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.batch import Batch
from steepest.core.kl import AdaptiveKLController, FixedKLController
from steepest.devices.api import Device
from steepest.learner.metrics import Metrics
from steepest.models.causal_lm import CausalLM
from steepest.models.flops import WORK, generation_flops
from steepest.registry import with_options
from steepest.rollout import RolloutEngine, SamplingParams
from steepest.rollout.weights import LocalWeights
from steepest.trainer.algorithm.advantages import Advantages, KLController, KLShapedRewards, plain_rewards
from steepest.trainer.algorithm.correction import (
    ActorOfRollouts,
    CorrectedRewards,
    build_rejections,
    compare,
)
from steepest.trainer.algorithm.old_log_probs import ActorOfEngineLogProbs, ActorWithSquares
from steepest.trainer.algorithm.row_selection import FilteredActor, FilteredCritic, FilteredRows, PretrainedCritic
from steepest.trainer.experience.dynamic_sampling import DynamicSampling, PromptPosition
from steepest.trainer.experience.greedy_baseline import FILLS, GreedyBaselines
from steepest.trainer.experience.scoring import StepScorer
from steepest.trainer.experience.single_turn import StepRollouts
from steepest.trainer.loop import Timer
from steepest.trainer.ppo import (
    ActorAfterWarmup,
    ActorLike,
    ActorOfOneUpdate,
    CriticLike,
    CriticOfOneUpdate,
    NoCritic,
    NoReference,
    PPOStep,
    ReferenceLike,
)
from steepest.trainer.run.metrics import batch_metrics, memory_metrics, mfu_metrics

Asked = TypeVar("Asked")
"""What responses are asked for by: a step, or prompts."""


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
    """The estimator with its options, and whether its advantages are whitened over the batch."""
    entry = ADVANTAGE_ESTIMATORS.get(config.algorithm.adv_estimator)
    options = estimator_options(entry.spec, config)
    return Advantages(with_options(entry.value, options), whitened=entry.spec.whitened)


def build_reward_shaping(config: Config, plan: Plan, controller: KLController) -> Callable[[Batch], Metrics]:
    """From scores to rewards, behind the correction of the batch where one is asked for."""
    algorithm, shape = config.algorithm, plain_rewards
    if algorithm.use_kl_in_reward:
        shape = KLShapedRewards(controller, algorithm.kl_penalty)
    if not plan.corrects:
        return shape
    return CorrectedRewards(build_weighting(config), build_rejections(config), shape)


def compares_engines(config: Config, plan: Plan) -> bool:
    """Whether the finished batch tells how far engine and trainer are apart: both speak of one distribution, have
    log-probs of their own, and nothing has been taken out of the batch for being too far."""
    bypass = config.algorithm.rollout_correction.bypass_mode
    return unfiltered(train_sampling(config)) and not bypass and not plan.corrects


def describe_batch(batch: Batch, *, device: Device, compare_engines: bool) -> Metrics:
    """Statistics of the finished batch; engine against trainer where both speak of the same distribution, over the
    tokens of loss_mask in the rows that the trainer computed (`mismatch/rows_compared` of all)."""
    metrics = batch_metrics(batch)
    if compare_engines and batch.rollout_log_probs is not None and batch.old_log_probs is not None:
        own = torch.ones(len(batch), dtype=torch.bool) if batch.recomputed is None else batch.recomputed
        mask = batch.loss_mask & own[:, None]
        metrics |= compare(batch.rollout_log_probs, batch.old_log_probs, mask)
        metrics["mismatch/rows_compared"] = own.float().mean().item()
    metrics["tokens"] = float(batch.lengths.sum())
    metrics["response_tokens"] = float(batch.response_lengths.sum())
    return metrics | memory_metrics(device)


def generate_counted(generate: Callable[[Asked], Batch], model: CausalLM, asked: Asked) -> Batch:
    """Responses, whose arithmetic is counted as any engine's that keeps keys and values."""
    with WORK.paused():
        batch = generate(asked)
    WORK.add(generation_flops(model, batch))
    return batch


def generate_and_release(generate: Callable[[int], Batch], release: Callable[[], None], step: int) -> Batch:
    """All responses of a step, and then the engine may sleep."""
    batch = generate(step)
    release()
    return batch


def filled_for_estimator(
    config: Config, plan: Plan, rollouts: StepRollouts, scorer: StepScorer, model: CausalLM
) -> tuple[Callable[[int], Batch], StepScorer]:
    """Rollouts and their scoring, with what the estimator reads beside the scores."""
    generate: Callable[[int], Batch] = partial(generate_counted, rollouts, model)
    fills = [FILLS[name](config) for name in plan.estimator_needs if name in FILLS]
    if "reward_baselines" in plan.estimator_needs:
        baselines = GreedyBaselines(generate, partial(generate_counted, rollouts.greedily, model), scorer)
        generate = baselines.generate
        fills.append(baselines.fill)
    return generate, replace(scorer, fills=fills)


def build_sampling(
    config: Config,
    plan: Plan,
    rollouts: StepRollouts,
    scorer: StepScorer,
    position: PromptPosition,
    model: CausalLM,
) -> tuple[Callable[[int], Batch], Callable[[Batch, int], Metrics]]:
    """`generate` and `score` of a step: one after the other, or in turns until enough groups differ."""
    filter_groups = config.algorithm.filter_groups
    # the engine stays awake until all responses of the step are there
    generate, scorer = filled_for_estimator(config, plan, replace(rollouts, release=lambda: None), scorer, model)
    if not filter_groups.enable:
        return partial(generate_and_release, generate, rollouts.release), scorer
    sampling = DynamicSampling(
        generate,
        scorer,
        position,
        num_groups=config.data.train_batch_size,
        metric=filter_groups.metric,
        max_rounds=filter_groups.max_num_gen_batches,
        epoch=rollouts.sampler.epoch,
        pad_id=rollouts.pad_id,
        say=say,
        release=rollouts.release,
    )
    return sampling.generate, sampling.score


def unfiltered(sampling: SamplingParams) -> bool:
    """Whether tokens are drawn from the whole distribution, whose log-probs are also the trainer's."""
    return sampling.top_p >= 1.0 and sampling.top_k == -1


def actor_of_a_step(config: Config, plan: Plan, models: Models) -> ActorLike:
    """The actor with the old log-probs that the plan says."""
    if plan.old_log_probs == "update":
        return ActorOfOneUpdate(models.actor)
    if plan.old_log_probs == "pass":
        return ActorWithSquares(models.actor) if plan.sums_squares else models.actor
    if plan.old_log_probs == "rollout":
        return ActorOfRollouts(models.actor)
    wrapped = ActorOfEngineLogProbs(models.actor, one_update=plan.updates_per_step == 1, say=say)
    if config.algorithm.use_kl_in_reward and models.reference is not None:
        wrapped.is_reference = partial(models.actor.model.computes_as, models.reference.model)
    return wrapped


def reference_of_a_step(plan: Plan, models: Models) -> ReferenceLike:
    """The reference, where its log-probs are read: the exact KL has it compute in the actor's update instead."""
    return models.reference if models.reference is not None and plan.reads_ref_log_probs else NoReference()


def critic_of_a_step(config: Config, plan: Plan, models: Models, advantages: Advantages) -> CriticLike:
    """The critic with the passes that the plan says, and its pretraining."""
    if models.critic is None:
        return NoCritic()
    if plan.values_by_update:
        return CriticOfOneUpdate(models.critic, advantages.returns_of)
    trainer = config.trainer
    if trainer.critic_warmup and trainer.critic_warmup_returns == "monte_carlo":
        return PretrainedCritic(models.critic, trainer.critic_warmup, config.algorithm.gamma)
    return models.critic


def filter_rows(config: Config, actor: ActorLike, critic: CriticLike) -> tuple[ActorLike, CriticLike]:
    """Actor and critic, on the rows that PF-PPO draws where it is on."""
    algorithm = config.algorithm
    if not algorithm.use_pf_ppo:
        return actor, critic
    pf_ppo = algorithm.pf_ppo
    rows = FilteredRows(pf_ppo.reweight_method, pf_ppo.weight_pow, config.actor_rollout_ref.rollout.seed)
    return FilteredActor(actor, rows), critic if isinstance(critic, NoCritic) else FilteredCritic(critic, rows)


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
    advantages = build_advantages(config)
    actor, critic = filter_rows(
        config, actor_of_a_step(config, plan, models), critic_of_a_step(config, plan, models, advantages)
    )
    return PPOStep(
        generate=generate,
        score=score,
        actor=ActorAfterWarmup(actor, config.trainer.critic_warmup),
        critic=critic,
        reference=reference_of_a_step(plan, models),
        shape_rewards=build_reward_shaping(config, plan, controller),
        estimate_advantages=advantages,
        publish_weights=partial(publish_weights, engine, LocalWeights(models.actor.model), device)
        if frees_engine(config, device)
        else partial(engine.load_weights, LocalWeights(models.actor.model)),
        describe=partial(describe_batch, device=device, compare_engines=compares_engines(config, plan)),
        timed=Timer(device.synchronize, work=WORK.read, rates=partial(mfu_metrics, limit=limit)),
    )
