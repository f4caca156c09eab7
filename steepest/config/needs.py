"""What a run needs, as the configuration says it. Rules and warnings ask here; the trainer reads the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steepest.config.schema import Config


def uses_reference(c: Config) -> bool:
    """Whether any KL term is on."""
    return bool(c.algorithm.use_kl_in_reward) or c.actor_rollout_ref.actor.use_kl_loss


def reads_ref_log_probs(c: Config) -> bool:
    """Whether the reference's log-probs are read: the exact KL (full) reads its distributions in the update instead."""
    actor = c.actor_rollout_ref.actor
    return bool(c.algorithm.use_kl_in_reward) or (actor.use_kl_loss and actor.kl_loss_type != "full")


def corrects(c: Config) -> bool:
    """Whether old and rollout log-probs are compared before the update, to weigh or to reject."""
    correction = c.algorithm.rollout_correction
    return correction.rollout_is is not None or bool(correction.rollout_rs)


def updates_per_step(c: Config) -> int:
    """Optimizer steps of the actor a step: mini-batches times `ppo_epochs`."""
    actor, batch = c.actor_rollout_ref.actor, c.data.train_batch_size
    return batch // (actor.ppo_mini_batch_size or batch) * actor.ppo_epochs
