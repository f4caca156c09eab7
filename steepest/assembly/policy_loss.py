"""The policy loss of a run, with its options bound, from the configuration."""

from __future__ import annotations

from functools import partial

from steepest.config.algorithms import option_values
from steepest.config.schema import Config
from steepest.config.sections.correction import read_band
from steepest.core.policy_losses import POLICY_LOSSES
from steepest.core.rollout_correction import Weighting, bypass_reinforce
from steepest.learner.actor import Choice, PolicyLoss
from steepest.registry import with_options


def build_policy_loss(config: Config) -> tuple[PolicyLoss, Choice | None]:
    """The policy loss with its options, and how it picks tokens over a whole mini-batch, if it does."""
    if (bypass := bypass_loss(config)) is not None:
        return bypass, None
    actor = config.actor_rollout_ref.actor
    entry = POLICY_LOSSES.get(actor.policy_loss.loss_mode)
    options = option_values(entry.spec, actor)
    choose = entry.facts.get("choose")
    return with_options(entry.value, options), None if choose is None else with_options(choose, options)


def bypass_loss(config: Config) -> PolicyLoss | None:
    """The policy loss that bypass mode puts in the place of the configured one; None: it stays."""
    correction = config.algorithm.rollout_correction
    if not correction.bypass_mode or correction.loss_type == "ppo_clip":
        return None
    return partial(bypass_reinforce, weighting=build_weighting(config))


def build_weighting(config: Config) -> Weighting | None:
    """The importance weights that the configuration asks for."""
    correction = config.algorithm.rollout_correction
    if correction.rollout_is is None:
        return None
    low, high = read_band(correction.rollout_is_threshold)
    return Weighting(correction.rollout_is, high, low, correction.rollout_is_batch_normalize)
