"""The policy loss's keys without effect, and settings that are allowed and hardly meant. See no_effect.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steepest.config.algorithms import LOSSES, LossSpec
from steepest.config.idle import Idle
from steepest.config.needs import updates_per_step
from steepest.config.resolve import ACTOR
from steepest.config.schema import Config


def _spec(config: Config) -> LossSpec:
    return LOSSES.assume(config.actor_rollout_ref.actor.policy_loss.loss_mode)


def wide_sequence_clip(given: dict[str, Any], config: Config) -> Iterator[str]:
    """A loss of one ratio a response (gspo) with the clip range of a token's ratio."""
    actor, spec = config.actor_rollout_ref.actor, _spec(config)
    if spec.widest_clip is None or spec.clip_range is None:
        return
    if max(actor.clip_ratio_low, actor.clip_ratio_high) > spec.widest_clip:
        low, high = spec.clip_range
        yield (
            f"{ACTOR}.clip_ratio_low={actor.clip_ratio_low:g}, clip_ratio_high={actor.clip_ratio_high:g} with "
            f"policy_loss.loss_mode={spec.name}: a response's ratio lies near 1, so this clip hardly ever acts. The "
            f"paper's are {low:g} and {high:g}, the default without these keys."
        )


def other_mean_than_the_papers(given: dict[str, Any], config: Config) -> Iterator[str]:
    """Losses of whole responses, aggregated as losses of tokens."""
    spec, mode = _spec(config), config.actor_rollout_ref.actor.loss_agg_mode
    if spec.mean == "seq-mean-token-mean" and mode != spec.mean:
        yield (
            f"{ACTOR}.loss_agg_mode={mode} with policy_loss.loss_mode={spec.name}: a response weighs as much as it has "
            "tokens. The paper's mean, which verl takes whatever this key says, is seq-mean-token-mean, the default "
            "without the key."
        )


def off_policy_without_a_ratio(given: dict[str, Any], config: Config) -> Iterator[str]:
    """A loss without a ratio (gpg) with several updates a batch."""
    updates, spec = updates_per_step(config), _spec(config)
    if not spec.has_ratio and updates > 1:
        yield (
            f"{ACTOR}.policy_loss.loss_mode={spec.name} with {updates} updates a step: this loss has no ratio, so from "
            "the second one on nothing corrects for the policy having moved. Use one (ppo_mini_batch_size = "
            "train_batch_size, ppo_epochs=1), or another loss."
        )


def penalty_of_an_unmoved_policy(given: dict[str, Any], config: Config) -> Iterator[str]:
    """A loss that is the plain policy gradient until the policy has moved (kl_cov), with one update a batch."""
    spec = _spec(config)
    if spec.pointless_in_one_update and updates_per_step(config) == 1:
        yield (
            f"{ACTOR}.policy_loss.loss_mode={spec.name} with one update a step: its {spec.idle_at_ratio_one} is "
            "on the distance to the policy before the update, which is 0 then. Use a smaller "
            "ppo_mini_batch_size, or more ppo_epochs."
        )


def policy_loss_idle() -> list[Idle]:
    """One entry for each key that some losses read; clip_ratio is what gives its sides their values."""
    return [
        _of_other_losses("clip_ratio", "clip_ratio_low"),
        *(_of_other_losses(key, key) for key in LOSSES.option_keys()),
        Idle((f"{ACTOR}.data_loader_seed",), _never_draws, f"{ACTOR}.shuffle is off"),
    ]


def _of_other_losses(key: str, read: str) -> Idle:
    return Idle(
        (f"{ACTOR}.{key}",),
        lambda c: not LOSSES.takes(c.actor_rollout_ref.actor.policy_loss.loss_mode, read),
        f"only {ACTOR}.policy_loss.loss_mode={'|'.join(LOSSES.takers(read))} takes it",
    )


def _never_draws(c: Config) -> bool:
    actor = c.actor_rollout_ref.actor
    spec = LOSSES.find(actor.policy_loss.loss_mode)
    return not actor.shuffle and spec is not None and not spec.draws


POLICY_LOSS_WARNINGS = [
    wide_sequence_clip,
    other_mean_than_the_papers,
    off_policy_without_a_ratio,
    penalty_of_an_unmoved_policy,
]
