"""A part of a real step on the models of the run, in memory: collected, learnt from, saved and loaded again.

The models are those of the run's start and are thrown away afterwards, so nothing of the run changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import steepest
from steepest.assembly.roles import build_models
from steepest.checks import Check, ok, problem, warning
from steepest.cluster.local import LocalCluster
from steepest.config.schema import Config
from steepest.core.batch import Batch
from steepest.data.sampler import PromptSampler
from steepest.learner.checkpoint import CheckpointStore, Start
from steepest.learner.metrics import Metrics
from steepest.rewards.api import RewardRequest, RewardResult, ScoresResponses
from steepest.trainer import build_step
from steepest.trainer.experience.api import Experience
from steepest.trainer.experience.dynamic_sampling import PromptPosition
from steepest.trainer.experience.scoring import Scorer
from steepest.trainer.experience.single_turn import StepRollouts
from steepest.trainer.jobs.ppo import Job
from steepest.trainer.ppo import Learn

LEARNING_RATE = "actor_rollout_ref.actor.optim.lr"


@dataclass
class MadeUpScores:
    """Scores 1 and 0 in turn, where the real ones would leave an estimator without a gradient."""

    rewards: ScoresResponses

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        results = self.rewards.score(requests)
        return [replace(result, score=float(i % 2), error=None) for i, result in enumerate(results)]


@dataclass
class Trial:
    """A job's step, cut down to a few prompts."""

    job: Job
    cluster: LocalCluster
    learn: Learn = field(init=False)

    def __post_init__(self) -> None:
        job = self.job
        self.learn = build_step.build_learn(
            job.config, job.plan, self.cluster, job.controller, device=job.device, limit=1.0
        )
        optimizer = self.cluster.roles.actor.optimizer
        assert optimizer is not None
        optimizer.iterations = job.plan.actor_warmup_steps  # past the warm-up, whose first rate may be 0

    @property
    def step(self) -> int:
        """The number of a step in which the actor learns."""
        return self.job.config.trainer.critic_warmup + 1

    def collect(self, num_prompts: int, *, step: int = 1, made_up: bool = False) -> Experience:
        """Answers of the first prompts of a step, by the run's own collector without dynamic sampling."""
        job = self.job
        config = smaller(job.config, num_prompts)
        rows, data = job.data.train, job.config.data
        sampler = PromptSampler(len(rows), num_prompts, shuffle=data.shuffle, seed=data.seed)
        sampling, pad = build_step.train_sampling(config), job.tokenizer.pad_token_id
        rollouts = StepRollouts(self.cluster, rows, sampler, sampling, pad)
        scorer: Scorer = job.scorer
        if made_up:
            scorer = replace(scorer, rewards=MadeUpScores(scorer.rewards))
        collector = build_step.build_collector(
            config, job.plan, self.cluster, rollouts, scorer, PromptPosition(), device=job.device
        )
        return collector(step)

    def learn_from(self, experience: Experience) -> Metrics:
        """The second half of the step."""
        return self.learn(experience, self.step)


def smaller(config: Config, num_prompts: int) -> Config:
    """The configuration with so many prompts a step, and without dynamic sampling."""
    algorithm = config.algorithm
    return replace(
        config,
        data=replace(config.data, train_batch_size=num_prompts),
        algorithm=replace(algorithm, filter_groups=replace(algorithm.filter_groups, enable=False)),
    )


def teaches(experience: Experience, n: int) -> bool:
    """Whether an estimator can make a gradient of the scores: they differ, within a prompt where it has several."""
    batch = experience.batch
    assert batch.token_level_scores is not None
    scores = batch.token_level_scores.sum(dim=1)
    groups = scores.view(-1, n) if n > 1 else scores[None]
    return bool((groups != groups[:, :1]).any())


def step_checks(trial: Trial, experience: Experience, *, made_up: bool) -> list[Check]:
    """Learn once from the experience, and look at ratio, engine, gradients and the KL."""
    with torch.no_grad():
        before = trial.cluster.log_probs(experience.batch)[0]
    metrics = trial.learn_from(experience)
    lines = [
        ratio(trial, experience.batch, before, metrics),
        engine(trial, experience.batch, before),
        *gradients(metrics, made_up=made_up),
    ]
    return [*lines, *kl(trial, experience.batch)]


def limits(trial: Trial) -> tuple[float, float]:
    """Largest distance of a ratio from 1, and of a log-prob of the engine from the actor's in the mean: bfloat16 rounds
    log-probs at about 1e-2, float32 at 1e-5."""
    exact = not build_step.half_precision(trial.job.config, trial.job.device)
    return (1e-3, 1e-3) if exact else (0.2, 0.05)


def ratio(trial: Trial, batch: Batch, before: torch.Tensor, metrics: Metrics) -> Check:
    """The ratio of a policy to itself: of the update's first pass, and of the log-probs that the loss divides by."""
    value = metrics.get("actor/ratio_max_dev_first", 0.0)
    if batch.old_log_probs is not None and trial.job.plan.old_log_probs != "rollout":
        off = (batch.old_log_probs - before)[batch.loss_mask]
        value = max([value, *off.exp().sub(1.0).abs().max()[None].tolist()]) if off.numel() else value
    limit, text = limits(trial)[0], f"1 before the first update, up to {value:.2g}"
    if value <= limit:
        return ok("ratio", text)
    return problem(
        "ratio",
        f"{text} (limit {limit:g})",
        "set actor_rollout_ref.actor.old_log_probs=recompute, or actor_rollout_ref.actor.fsdp_config.dtype=float32",
    )


def engine(trial: Trial, batch: Batch, before: torch.Tensor) -> Check:
    """Log-probs of the engine against the actor's, on the sampled tokens."""
    if not build_step.unfiltered(build_step.train_sampling(trial.job.config)):
        return ok("engine", "not compared: top_p or top_k filter, and its log-probs are of the filtered distribution")
    assert batch.rollout_log_probs is not None
    off = (batch.rollout_log_probs - before)[batch.trained_mask].abs()
    mean, most, limit = off.mean().item(), off.max().item(), limits(trial)[1]
    text = f"its log-probs differ from the actor's by {mean:.2g} nats in the mean, {most:.2g} at most"
    if mean <= limit:
        return ok("engine", text)
    return problem(
        "engine",
        f"{text} (limit {limit:g} in the mean)",
        "set actor_rollout_ref.rollout.dtype to that of actor_rollout_ref.actor.fsdp_config.dtype, or take "
        "actor_rollout_ref.rollout.name=builtin",
    )


def gradients(metrics: Metrics, *, made_up: bool) -> list[Check]:
    """Whether each model has a gradient that is a number and not 0."""
    lines = []
    how = " (scores 1 and 0 in turn: the real ones do not differ)" if made_up else ""
    for role, rate in (("actor", LEARNING_RATE), ("critic", "critic.optim.lr")):
        norm, skipped = metrics.get(f"{role}/grad_norm"), metrics.get(f"{role}/skipped_steps", 0.0)
        name = f"{role} gradient"
        if norm is None and not skipped:
            if role == "actor":
                lines.append(warning(name, "no update was made", "look at algorithm.mask_equal_groups and the scores"))
            continue
        if skipped or norm is None or not math.isfinite(norm):
            remedy = "set actor_rollout_ref.actor.fsdp_config.dtype=float32, or bound the scores of the reward"
            lines.append(problem(name, f"its norm is {norm}{how}", remedy))
        elif norm == 0.0:
            lines.append(warning(name, f"it is 0{how}", "use scores that differ (reward.functions)"))
        else:
            lines.append(ok(name, f"finite, norm {norm:.3g}, {rate}={metrics.get(f'{role}/lr', 0.0):g}{how}"))
    return lines


def kl(trial: Trial, batch: Batch) -> list[Check]:
    """After one update the policy is not the reference any more: its KL is above 0, and has a gradient."""
    config, actor = trial.job.config, trial.cluster.roles.actor
    lines = []
    old, _ = trial.cluster.log_probs(batch)
    if config.algorithm.use_kl_in_reward:
        batch.kl_log_probs = old
        shape = build_step.KLShapedRewards(build_step.build_controller(config), config.algorithm.kl_penalty)
        value = shape(batch)["actor/reward_kl_penalty"]
        text = f"{value:.3g} nats a token after one update, taken from the rewards"
        lines.append(_kl_line("KL in the reward", text, value != 0.0))
    if actor.loss.use_kl_loss:
        assert batch.advantages is not None
        batch.advantages, batch.old_log_probs = torch.zeros_like(batch.advantages), old
        actor.loss = replace(actor.loss, entropy_coeff=0.0)
        norm = trial.cluster.update_actor(batch, trial.step).get("actor/grad_norm", 0.0)
        text = f"its gradient has the norm {norm:.3g} after one update"
        lines.append(_kl_line("KL loss", text, math.isfinite(norm) and norm > 0.0))
    return lines or [ok("KL", "off: neither in the reward nor in the loss")]


def _kl_line(name: str, text: str, good: bool) -> Check:
    if good:
        return ok(name, text)
    return warning(name, f"{text}: it holds nothing", f"raise {LEARNING_RATE}: the update may be too small to be seen")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written and read."""

    check: Check
    size: int
    seconds: float
    """Of writing it."""


def save_and_load(trial: Trial, batch: Batch, folder: Path) -> Saved:
    """Write a checkpoint into a temporary folder, read it into other models, and compare their log-probs."""
    job = trial.job
    began = time.perf_counter()
    store = CheckpointStore(folder)
    state = {"step": 1, "version": steepest.__version__, "kl_controller": job.controller.state_dict()}
    path = store.save(1, trial.cluster.writers(job.tokenizer), state, expected_bytes=0)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    want = trial.cluster.log_probs(batch)[0]
    start = Start(1, store.open(path), store.state(path))
    models = build_models(job.config, job.plan, start, job.folders, job.device)
    off = (models.actor.log_probs(batch)[0] - want).abs().max().item()
    text = f"{size / 2**20:,.1f} MiB, written in {seconds:.1f} s; log-probs after loading differ by {off:.2g}"
    if off <= limits(trial)[0]:
        return Saved(ok("checkpoint", text), size, seconds)
    remedy = "report it with the output of `steepest preflight --json`"
    return Saved(problem("checkpoint", text, remedy), size, seconds)
