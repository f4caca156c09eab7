"""Whether the updates do what they should to policy and critic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from steepest.trainer.run.health.checks import Check, Seen
from steepest.trainer.run.health.rewards import same_score


@dataclass
class EntropyCollapse(Check):
    """The policy hardly explores any more."""

    name = "entropy_collapse"
    limit: float = 0.005
    """Nats a token."""
    steps: int = 3

    def __call__(self, seen: Seen) -> str | None:
        value = seen.number("actor/entropy")
        if not self.in_a_row(value is not None and value < self.limit, self.steps):
            return None
        return (
            f"the policy's entropy has been below {self.limit:g} nats a token for {self.steps} steps (now "
            f"{value:.2g}): it hardly explores any more. Raise actor_rollout_ref.actor.entropy_coeff or "
            "actor_rollout_ref.actor.clip_ratio_high, or lower actor_rollout_ref.actor.optim.lr, and resume from an "
            "earlier checkpoint (trainer.resume_from_path)"
        )


@dataclass
class DeadCritic(Check):
    """The critic knows no more of the returns than their mean."""

    name = "dead_critic"
    is_problem = False
    limit: float = 0.001
    steps: int = 10
    from_step: int = 20
    """A young critic is not judged."""

    def __call__(self, seen: Seen) -> str | None:
        value = seen.number("critic/vf_explained_var")
        if value is None or same_score(seen) is not None:  # equal scores: the variance is rounding and the KL
            return None
        values = self.last("explained", value, self.steps)
        if seen.step < self.from_step or len(values) < self.steps or fmean(values) >= self.limit:
            return None
        return (
            f"the critic explains none of the returns (explained variance {fmean(values):.2g}, mean of {self.steps} "
            "steps): advantages are no better than without it. Raise critic.optim.lr or trainer.critic_warmup, or use "
            "algorithm.adv_estimator=grpo, which needs no critic"
        )


@dataclass
class KLRunaway(Check):
    """The policy is far away from the reference. `metrics`: those that may hold the KL a token, the first that a step
    has counts."""

    name = "kl_runaway"
    metrics: tuple[str, ...] = ("actor/reward_kl_penalty",)
    limit: float = 1.0
    """Nats a token."""
    steps: int = 3

    def __call__(self, seen: Seen) -> str | None:
        value = next((x for name in self.metrics if (x := seen.number(name)) is not None), 0.0)
        if not self.in_a_row(value > self.limit, self.steps):
            return None
        return (
            f"the policy is {value:.2g} nats a token away from the reference, for {self.steps} steps more than "
            f"{self.limit:g}: its texts have little in common with the start model's. Raise algorithm.kl_ctrl.kl_coef "
            "or actor_rollout_ref.actor.kl_loss_coef (where that KL is on), or lower actor_rollout_ref.actor.optim.lr"
        )


SKIPPED = ("actor/skipped_steps", "critic/skipped_steps")


@dataclass
class SkippedUpdates(Check):
    """An update was skipped. One now and then does no harm."""

    name = "skipped_updates"
    is_problem = False

    def __call__(self, seen: Seen) -> str | None:
        count = sum(seen.metrics.get(name, 0.0) for name in SKIPPED)
        if count <= 0:
            return None
        return (
            f"{count:.0f} update(s) skipped because a gradient was NaN or inf. If that goes on, set "
            "actor_rollout_ref.actor.fsdp_config.dtype=float32 and look for scores that are far too large"
        )


@dataclass
class NaN(Check):
    """Updates are skipped, or losses are no numbers, in several steps in a row."""

    name = "nan"
    steps: int = 3
    losses = ("actor/pg_loss", "actor/kl_loss", "critic/vf_loss")

    def __call__(self, seen: Seen) -> str | None:
        skipped = any(seen.metrics.get(name, 0.0) > 0 for name in SKIPPED)
        broken = [name for name in self.losses if not math.isfinite(seen.metrics.get(name, 0.0))]
        if not self.in_a_row(skipped or bool(broken), self.steps):
            return None
        return (
            f"in {self.steps} steps in a row {broken[0] if broken else 'a gradient'} was NaN or inf: nothing is "
            "learnt. Lower actor_rollout_ref.actor.optim.lr, set actor_rollout_ref.actor.fsdp_config.dtype=float32, "
            "or bound the scores of the reward, and resume from an earlier checkpoint (trainer.resume_from_path)"
        )


@dataclass
class LearningRate(Check):
    """The policy becomes another one within a step: by its own KL between the updates of the step, or by its entropy
    from one step to the next."""

    name = "learning_rate"
    kl: float = 0.2
    entropy: float = 0.5
    """Both in nats a token."""

    def __call__(self, seen: Seen) -> str | None:
        kl, entropy = abs(seen.number("actor/ppo_kl") or 0.0), seen.number("actor/entropy")
        moved = 0.0
        if entropy is not None:
            before = self.kept.get("entropy", [entropy])[-1]
            moved = abs(self.last("entropy", entropy, 1)[-1] - before)
        if kl > self.kl:
            what = f"moved by a KL of {kl:.2g} nats a token within one step (limit {self.kl:g})"
        elif moved > self.entropy:
            what = f"changed its entropy by {moved:.2g} nats a token in one step (limit {self.entropy:g})"
        else:
            return None
        return (
            f"the policy {what}: the learning rate is far too high. Lower actor_rollout_ref.actor.optim.lr, to a tenth "
            "for a start"
        )
