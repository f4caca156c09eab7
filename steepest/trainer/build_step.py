"""From a configuration to the parts of a step: which object stands in each place of `ppo.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steepest.assembly.compute import compute_dtype
from steepest.assembly.policy_loss import build_weighting
from steepest.cluster.local import LocalCluster
from steepest.config.plan import Plan
from steepest.config.schema import Config
from steepest.config.sections.advantages import estimator_options
from steepest.console import once, say
from steepest.core.advantages import ADVANTAGE_ESTIMATORS, EstimatorCall
from steepest.core.batch import Batch
from steepest.core.kl import AdaptiveKLController, FixedKLController
from steepest.devices.api import Device
from steepest.learner.metrics import Metrics
from steepest.process.stopping import Stop
from steepest.rollout import SamplingParams
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.correction import CorrectedRewards, build_rejections, compare
from steepest.trainer.algorithm.critic_values import CriticPart, NoCritic, ValuesFromPass, ValuesFromUpdate
from steepest.trainer.algorithm.kl_rewards import KLController, KLShapedRewards, plain_rewards
from steepest.trainer.algorithm.old_log_probs import FromEngine, FromPass, FromRollout, FromUpdate, OldLogProbs
from steepest.trainer.algorithm.row_selection import (
    build_critic_targets,
    build_left_out,
    build_row_selection,
    build_shaping,
)
from steepest.trainer.experience.api import Collector
from steepest.trainer.experience.dynamic_sampling import DynamicSampling, PromptPosition
from steepest.trainer.experience.extras import FILLS
from steepest.trainer.experience.greedy_baseline import GreedyBaseline
from steepest.trainer.experience.scoring import Finished, Scorer, StepScorer
from steepest.trainer.experience.single_turn import SingleTurn, StepRollouts
from steepest.trainer.loop import Timer
from steepest.trainer.ppo import Learn, Observer, PPOStep
from steepest.trainer.run.metrics import batch_metrics, memory_metrics, mfu_metrics


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


def estimator_call(config: Config) -> EstimatorCall:
    """The estimator by name, with the options that the configuration sets."""
    name = config.algorithm.adv_estimator
    return EstimatorCall(name, estimator_options(ADVANTAGE_ESTIMATORS.get(name).spec, config))


def build_advantages(config: Config) -> Advantages:
    """The estimator with its options, and whether its advantages are whitened over the batch."""
    spec = ADVANTAGE_ESTIMATORS.get(config.algorithm.adv_estimator).spec
    return Advantages(estimator_call(config).bind(), whitened=spec.whitened)


def build_reward_shaping(config: Config, plan: Plan, controller: KLController) -> Callable[[Batch], Metrics]:
    """From scores to rewards, behind the correction of the batch where one is asked for."""
    algorithm, shape = config.algorithm, plain_rewards
    if algorithm.use_kl_in_reward:
        shape = KLShapedRewards(controller, algorithm.kl_penalty)
    if not plan.corrects:
        return shape
    return CorrectedRewards(build_weighting(config), build_rejections(config), shape)


def compares_engines(config: Config, plan: Plan) -> bool:
    """Whether the distance of engine and trainer is measured on the finished batch: both have log-probs of their own,
    of one distribution, and nothing has been taken out of the batch because it was too far."""
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
    metrics["perf/total_num_tokens"] = float(batch.lengths.sum())
    metrics["perf/total_num_response_tokens"] = float(batch.response_lengths.sum())
    return metrics | memory_metrics(device)


def build_collector(
    config: Config,
    plan: Plan,
    cluster: LocalCluster,
    rollouts: StepRollouts,
    scorer: Scorer,
    position: PromptPosition,
    *,
    device: Device,
    write: Callable[[int, list[dict[str, Any]]], None] | None = None,
) -> Collector:
    """The collectors of a run, wrapped into one another. The one that generates last releases the engine."""
    filter_groups, needs = config.algorithm.filter_groups, plan.estimator_needs
    fills = [FILLS[name](config) for name in needs if name in FILLS]
    scored = StepScorer(scorer, build_shaping(config), fills)
    with_greedy, dynamic = "reward_baselines" in needs, filter_groups.enable
    timer, nothing = partial(Timer, device.synchronize), lambda: None
    release = cluster.release_engine
    collect: Collector = SingleTurn(
        rollouts, scored, cluster.generation_flops, timer, nothing if with_greedy or dynamic else release
    )
    if with_greedy:
        collect = GreedyBaseline(
            collect,
            rollouts.greedily,
            scored,
            cluster.generation_flops,
            timer,
            nothing if dynamic else release,
        )
    if dynamic:
        collect = DynamicSampling(
            collect,
            position,
            num_groups=config.data.train_batch_size,
            metric=filter_groups.metric,
            max_rounds=filter_groups.max_num_gen_batches,
            epoch=rollouts.sampler.epoch,
            pad_id=rollouts.pad_id,
            warn_once=once(say),
            timer=timer,
            release=release,
        )
    return Finished(collect, build_left_out(config), write, scorer.costs, timer, scorer.count)


def unfiltered(sampling: SamplingParams) -> bool:
    """Whether tokens are drawn from the whole distribution, whose log-probs are also the trainer's."""
    return sampling.top_p >= 1.0 and sampling.top_k == -1


def build_old_log_probs(config: Config, plan: Plan, cluster: LocalCluster) -> Callable[[Batch], OldLogProbs]:
    """Where the log-probs before the update come from, as the plan says."""
    if plan.old_log_probs == "update":
        return FromUpdate()
    if plan.old_log_probs == "pass":
        return FromPass(cluster, squares=plan.sums_squares)
    if plan.old_log_probs == "rollout":
        return FromRollout()
    return FromEngine(
        cluster,
        one_update=plan.updates_per_step == 1,
        warn_once=once(say),
        checks_reference=config.algorithm.use_kl_in_reward,
    )


def build_ref_log_probs(plan: Plan, cluster: LocalCluster) -> Callable[[Batch], Tensor | None]:
    """The reference's pass, where its log-probs are read: the exact KL has it compute in the actor's update instead."""
    return cluster.ref_log_probs if plan.reads_ref_log_probs else lambda batch: None


def build_critic_part(config: Config, plan: Plan, cluster: LocalCluster) -> CriticPart:
    """The critic with the passes that the plan says."""
    if not plan.needs_critic:
        return NoCritic()
    return ValuesFromUpdate(cluster, estimator_call(config)) if plan.values_by_update else ValuesFromPass(cluster)


def after_warmup(update: Callable[[Batch, int], Metrics], num_steps: int, batch: Batch, step: int) -> Metrics:
    """The actor's update, which is left out in the first `num_steps` steps (`trainer.critic_warmup`)."""
    return update(batch, step) if step > num_steps else {}


def half_precision(config: Config, device: Device) -> bool:
    """Whether the actor or the engine computes in half precision, where the two round apart."""
    arr = config.actor_rollout_ref
    dtypes = (arr.actor.fsdp_config.dtype, arr.rollout.dtype)
    return any(compute_dtype(dtype, device) != "float32" for dtype in dtypes)


def build_learn(
    config: Config, plan: Plan, cluster: LocalCluster, controller: KLController, *, device: Device, limit: float
) -> Learn:
    """The second half of the step. `limit`: operations a second that the device can do, for `perf/mfu`."""
    return Learn(
        old_log_probs=build_old_log_probs(config, plan, cluster),
        ref_log_probs=build_ref_log_probs(plan, cluster),
        shape_rewards=build_reward_shaping(config, plan, controller),
        critic=build_critic_part(config, plan, cluster),
        estimate_advantages=build_advantages(config),
        select_rows=build_row_selection(config),
        critic_targets=build_critic_targets(config),
        update_actor=partial(after_warmup, cluster.update_actor, config.trainer.critic_warmup),
        publish_weights=cluster.publish,
        describe=partial(describe_batch, device=device, compare_engines=compares_engines(config, plan)),
        timed=Timer(device.synchronize, cluster.take_flops, partial(mfu_metrics, limit=limit)),
    )


def build_step(
    collect: Collector, learn: Learn, position: PromptPosition, observers: Sequence[Observer], stop: Stop
) -> PPOStep:
    """The step of `ppo.py`. The run's place among the prompts follows what has been learnt from. After a signal the
    weights are not touched any more if the time that is left is too short for it."""
    follow = (lambda step, experience: position.learn(experience.prompts_taken), *observers)
    return PPOStep(collect, learn, follow, before_learning=stop.give_up_unless)
