"""The policy loss's keys without effect, and settings that are allowed and hardly meant. See no_effect.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steepest.config.idle import Idle
from steepest.config.policy_losses import CLIP_RANGES, MEANS_OF_ROWS, TAKES, takes
from steepest.config.resolve import ACTOR
from steepest.config.schema import Config

WIDE_FOR_GSPO = 0.02
"""A geometric mean of ratios that is further from 1 than this is a policy far away, so that the clip comes too late."""


def updates_per_step(config: Config) -> int:
    """Optimizer steps of the actor a step."""
    actor, batch = config.actor_rollout_ref.actor, config.data.train_batch_size
    return batch // (actor.ppo_mini_batch_size or batch) * actor.ppo_epochs


def wide_sequence_clip(given: dict[str, Any], config: Config) -> Iterator[str]:
    """gspo with the clip range of a token's ratio."""
    actor = config.actor_rollout_ref.actor
    low, high = CLIP_RANGES["gspo"]
    if actor.policy_loss.loss_mode == "gspo" and max(actor.clip_ratio_low, actor.clip_ratio_high) > WIDE_FOR_GSPO:
        yield (
            f"{ACTOR}.clip_ratio_low={actor.clip_ratio_low:g}, clip_ratio_high={actor.clip_ratio_high:g} with "
            f"policy_loss.loss_mode=gspo: a response's ratio lies near 1, so this clip hardly ever acts. The paper's "
            f"are {low:g} and {high:g}, the default without these keys."
        )


def other_mean_than_the_papers(given: dict[str, Any], config: Config) -> Iterator[str]:
    """Losses of whole responses, aggregated as losses of tokens."""
    actor = config.actor_rollout_ref.actor
    loss, mode = actor.policy_loss.loss_mode, actor.loss_agg_mode
    if loss in MEANS_OF_ROWS and mode != "seq-mean-token-mean":
        yield (
            f"{ACTOR}.loss_agg_mode={mode} with policy_loss.loss_mode={loss}: a response weighs as much as it has "
            "tokens. The paper's mean, which verl takes whatever this key says, is seq-mean-token-mean, the default "
            "without the key."
        )


def off_policy_without_a_ratio(given: dict[str, Any], config: Config) -> Iterator[str]:
    """gpg with several updates a batch."""
    updates = updates_per_step(config)
    if config.actor_rollout_ref.actor.policy_loss.loss_mode == "gpg" and updates > 1:
        yield (
            f"{ACTOR}.policy_loss.loss_mode=gpg with {updates} updates a step: this loss has no ratio, so from the "
            "second one on nothing corrects for the policy having moved. Use one (ppo_mini_batch_size = "
            "train_batch_size, ppo_epochs=1), or another loss."
        )


def penalty_of_an_unmoved_policy(given: dict[str, Any], config: Config) -> Iterator[str]:
    """kl_cov with one update a batch."""
    if config.actor_rollout_ref.actor.policy_loss.loss_mode == "kl_cov" and updates_per_step(config) == 1:
        yield (
            f"{ACTOR}.policy_loss.loss_mode=kl_cov with one update a step: its penalty is on the distance to the "
            "policy before the update, which is 0 then. Use a smaller ppo_mini_batch_size, or more ppo_epochs."
        )


def _of_other_losses(option: str) -> Idle:
    return Idle(
        (f"{ACTOR}.{option}",),
        lambda c: not takes(c.actor_rollout_ref.actor.policy_loss.loss_mode, option),
        f"only {ACTOR}.policy_loss.loss_mode={'|'.join(TAKES[option])} takes it",
    )


def _never_draws(c: Config) -> bool:
    actor = c.actor_rollout_ref.actor
    return not actor.shuffle and actor.policy_loss.loss_mode != "clip_cov"


POLICY_LOSS_IDLE = [
    *(_of_other_losses(option) for option in TAKES),
    Idle(
        (f"{ACTOR}.data_loader_seed",),
        _never_draws,
        f"{ACTOR}.shuffle is off",
    ),
]
POLICY_LOSS_WARNINGS = [
    wide_sequence_clip,
    other_mean_than_the_papers,
    off_policy_without_a_ratio,
    penalty_of_an_unmoved_policy,
]
