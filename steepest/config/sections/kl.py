"""The KL divergence to the reference, in the reward or in the loss: `algorithm.kl_ctrl`, `actor_rollout_ref.ref`.

Its other keys are fields of `algorithm` (use_kl_in_reward, kl_penalty) and of the actor (use_kl_loss, kl_loss_*).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from steepest.config.algorithms import ESTIMATORS
from steepest.config.checks import ACTOR, REF, Deriver, IsSet, NoEffect, Section, names_of
from steepest.config.needs import reads_ref_log_probs, uses_reference
from steepest.config.types import DERIVED, NonNegativeFloat, Positive, PositiveFloat

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()
KLKind = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
KLLossKind = Literal[
    "kl",
    "k1",
    "abs",
    "mse",
    "k2",
    "low_var_kl",
    "k3",
    "kl+",
    "k1+",
    "abs+",
    "mse+",
    "k2+",
    "low_var_kl+",
    "k3+",
    "full",
]


@dataclass(frozen=True)
class KLControlConfig:
    """`algorithm.kl_ctrl`: the coefficient of the KL penalty in the reward."""

    type: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: the coefficient moves so that the KL approaches `target_kl`."""
    kl_coef: NonNegativeFloat = 0.001
    """The coefficient, or its start."""
    horizon: Positive = 10000
    """Adaptive only: responses over which it adapts."""
    target_kl: PositiveFloat = 0.1
    """Adaptive only: the KL aimed at, in nats a token."""


@dataclass(frozen=True)
class RefConfig:
    """`actor_rollout_ref.ref`: the reference's log-prob pass. Used when a KL term is on."""

    log_prob_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward; null: filled to the token budget."""
    log_prob_use_dynamic_bsz: bool = DERIVED
    """Fill micro-batches to a token budget; null: on unless the key above is given."""
    log_prob_max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch; null: `actor.ppo_max_token_len_per_gpu`."""


@SECTION.null
def resolve(d: Deriver) -> None:
    coef = "algorithm.kl_ctrl.kl_coef"
    spec = ESTIMATORS.assume(d["algorithm.adv_estimator"])
    # what reads named rewards alone would not see the penalty
    is_on = d[coef] > 0 and spec.reads_scores and (d.is_set(coef) or spec.kl_by_default)
    d.fill("algorithm.use_kl_in_reward", is_on, coef if d.is_set(coef) else "algorithm.adv_estimator")


@SECTION.rule("algorithm.kl_ctrl.type", "algorithm.kl_ctrl.kl_coef", "algorithm.use_kl_in_reward")
def adaptive_kl_can_move(c: Config, is_set: IsSet) -> Iterator[str]:
    control = c.algorithm.kl_ctrl
    if control.type == "adaptive" and control.kl_coef == 0:
        yield "algorithm.kl_ctrl.type=adaptive with kl_coef=0: it is multiplied, so it stays 0. Start above 0."


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        NoEffect(
            (REF,),
            lambda c: not uses_reference(c),
            "no reference is needed: algorithm.use_kl_in_reward and actor.use_kl_loss are off",
        ),
        NoEffect(
            (REF,),
            lambda c: not reads_ref_log_probs(c),
            f"{ACTOR}.kl_loss_type=full has the reference compute in the actor's micro-batches",
        ),
        NoEffect(
            ("algorithm.kl_ctrl", "algorithm.kl_penalty"),
            lambda c: not c.algorithm.use_kl_in_reward,
            "algorithm.use_kl_in_reward is off",
        ),
        NoEffect(
            names_of("algorithm.kl_ctrl", "horizon target_kl"),
            lambda c: c.algorithm.kl_ctrl.type == "fixed",
            "algorithm.kl_ctrl.type is fixed",
        ),
        NoEffect(
            names_of(ACTOR, "kl_loss_coef kl_loss_type"),
            lambda c: not c.actor_rollout_ref.actor.use_kl_loss,
            f"{ACTOR}.use_kl_loss is off (for the reward: algorithm.use_kl_in_reward)",
        ),
    ]


@SECTION.warning
def gradient_free_kl(given: dict[str, Any], config: Config) -> Iterator[str]:
    """k1 as a loss: its expected gradient is zero (arXiv:2512.21852)."""
    actor = config.actor_rollout_ref.actor
    if actor.use_kl_loss and actor.kl_loss_type in ("kl", "k1"):
        yield (
            f"{ACTOR}.kl_loss_type={actor.kl_loss_type}: the expected gradient of this estimator as a loss is zero. "
            f"Use low_var_kl, or {actor.kl_loss_type}+ for its value with a true gradient."
        )


@SECTION.warning
def kl_is_ignored(given: dict[str, Any], config: Config) -> Iterator[str]:
    """An explicit `use_kl_in_reward=True` with coefficient 0."""
    if config.algorithm.use_kl_in_reward and config.algorithm.kl_ctrl.kl_coef == 0:
        yield "algorithm.use_kl_in_reward=True with kl_ctrl.kl_coef=0: the KL is measured, and the reward is unchanged."
