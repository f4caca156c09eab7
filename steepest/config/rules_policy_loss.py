"""Rules about the policy loss. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.config.algorithms import LOSSES
from steepest.config.resolve import ACTOR, IsSet
from steepest.config.rules import Rule, rule
from steepest.config.schema import Config

POLICY_LOSS_RULES: list[Rule] = []


@rule(*(f"{ACTOR}.policy_loss.{name}" for name in ("loss_mode", "clip_cov_lb", "clip_cov_ub")), table=POLICY_LOSS_RULES)
def a_covariance_can_lie_between(c: Config, is_set: IsSet) -> Iterator[str]:
    loss = c.actor_rollout_ref.actor.policy_loss
    takes_them = "policy_loss.clip_cov_lb" in LOSSES.assume(loss.loss_mode).keys
    if takes_them and loss.clip_cov_lb >= loss.clip_cov_ub:
        yield (
            f"{ACTOR}.policy_loss.clip_cov_lb={loss.clip_cov_lb:g}: must be below clip_cov_ub={loss.clip_cov_ub:g}, "
            "else no token has a covariance between the two."
        )
