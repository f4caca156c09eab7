"""Whether the rollout engine and the trainer speak of one policy, and of the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from steepest.trainer.run.health.checks import Check, Seen


@dataclass
class Ratio(Check):
    """The ratio before the first update, which is 1 where both passes compute the same."""

    name = "ratio"
    limit: float = 1e-3

    def __call__(self, seen: Seen) -> str | None:
        value = seen.number("actor/ratio_max_dev_first")
        if value is None or value <= self.limit:
            return None
        return (
            f"the probability ratio differs from 1 by {value:.2g} before the first update (limit {self.limit:.2g}): "
            "two passes with the same weights disagree. Set actor_rollout_ref.actor.old_log_probs=recompute, or "
            "actor_rollout_ref.actor.fsdp_config.dtype=float32"
        )


@dataclass
class EngineDistance(Check):
    """Base of the two checks that read the KL from engine to trainer. Engine and trainer start with the same weights,
    so a distance in the first step has another cause than one that comes later."""

    limit: float = 1e-3

    def distance(self, seen: Seen) -> tuple[float, bool] | None:
        """The KL where it is too large, and whether an earlier step agreed."""
        value = seen.number("mismatch/k3_kl")
        if value is None:
            return None
        agreed = "agreed" in self.kept
        if abs(value) <= self.limit:
            self.kept["agreed"] = [1.0]
            return None
        return value, agreed


@dataclass
class Temperature(EngineDistance):
    """The engine samples from another distribution than the trainer computes, from the first step on."""

    name = "temperature"

    def __call__(self, seen: Seen) -> str | None:
        found = self.distance(seen)
        if found is None or found[1]:
            return None
        return (
            f"the rollout engine and the trainer have disagreed since the first step: KL {found[0]:.2g} nats a token "
            f"(limit {self.limit:.2g}). The engine applies another temperature than actor_rollout_ref.rollout."
            "temperature, or computes in another dtype: set actor_rollout_ref.rollout.dtype to that of "
            "actor_rollout_ref.actor.fsdp_config.dtype, or take actor_rollout_ref.rollout.name=builtin"
        )


@dataclass
class StaleEngine(EngineDistance):
    """The engine agreed with the trainer and does so no more: it samples with old weights."""

    name = "stale_engine"

    def __call__(self, seen: Seen) -> str | None:
        found = self.distance(seen)
        if found is None or not found[1]:
            return None
        return (
            f"the rollout engine agreed with the trainer at first and does not any more: KL {found[0]:.2g} nats a "
            f"token (limit {self.limit:.2g}). It samples with weights that are not the actor's: take "
            "actor_rollout_ref.rollout.name=builtin, which runs on the actor's own weights"
        )


@dataclass
class Rejected(Check):
    """Rollout correction leaves most tokens out."""

    name = "rejected"
    is_problem = False
    limit: float = 0.5

    def __call__(self, seen: Seen) -> str | None:
        value = seen.number("rollout_corr/rollout_rs_masked_fraction")
        if value is None or value <= self.limit:
            return None
        return (
            f"{value:.0%} of the tokens were rejected by algorithm.rollout_correction.rollout_rs: little is learnt. "
            "Set wider bounds with algorithm.rollout_correction.rollout_rs_threshold, or take an engine that is nearer "
            "to the trainer (actor_rollout_ref.rollout.name)"
        )


@dataclass
class EndToken(Check):
    """Responses that ended have no end token among the tokens that are trained."""

    name = "end_token"
    limit: float = 0.99

    def __call__(self, seen: Seen) -> str | None:
        value = seen.number("rollout/end_token_ratio")
        if value is None or value >= self.limit:
            return None
        return (
            f"{1.0 - value:.0%} of the responses that ended have no end token among the tokens that are trained, so "
            "the policy does not learn to stop. Where pad and end token are one, the engine takes the end away with "
            "the padding: give the tokenizer of actor_rollout_ref.model.path a pad_token of its own, or take another "
            "actor_rollout_ref.rollout.name"
        )
