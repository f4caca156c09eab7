"""Values that follow from the configuration together with the data and the estimator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from steepest.config.algorithms import ESTIMATORS, LOSSES, EstimatorSpec
from steepest.config.needs import corrects, reads_ref_log_probs, updates_per_step, uses_reference
from steepest.config.schema import Config, SFTConfig
from steepest.config.sections.model import OptimConfig
from steepest.config.sections.sft import SFTTrainerConfig
from steepest.config.sections.trainer import TrainerConfig
from steepest.errors import ConfigError

OldLogProbs = Literal["pass", "update", "engine", "rollout"]
"""pass: a pass of their own. update: those of the step's one update. engine: the engine's, checked on a sample of rows;
with one update a step they serve the KL in the reward only, and the update takes its own. rollout: the engine's, as
they are (bypass mode)."""


@dataclass(frozen=True)
class Plan:
    """How much a PPO run does, and what it needs: everything that follows from the configuration and the data.

    Example: the reference command (256 prompts per step, one response each, mini-batches of 64 prompts, one epoch over
    them, `gae` with a critic, the KL penalty in the reward, 15 epochs, float32) on GSM8K's 7,473 rows has

        steps_per_epoch=29          7473 // 256; the last 49 rows of each epoch are left out
        total_steps=435             29 steps x 15 epochs
        rows_per_step=256           256 prompts x 1 response
        mini_batch_rows=64          64 prompts x 1 response
        updates_per_step=4          256 / 64 mini-batches x 1 epoch
        estimator_needs=("values",) gae reads values,
        needs_critic=True           so there is a critic;
        values_by_update=False      it makes 4 updates, so the values have their own pass
        needs_reference=True        for the KL in the reward,
        reads_ref_log_probs=True    which reads log-probs from a pass of the reference
        old_log_probs="engine"      4 updates in float32: the engine's log-probs, checked on a sample of rows

    With `actor_rollout_ref.actor.ppo_mini_batch_size=256` there is one update, and `values_by_update` is True if the
    critic makes one update too.
    """

    steps_per_epoch: int
    total_steps: int
    rows_per_step: int
    """Responses a step: prompts times `rollout.n`."""
    mini_batch_rows: int
    """Responses an actor update."""
    critic_mini_batch_rows: int
    updates_per_step: int
    """Optimizer steps of the actor a step: mini-batches times `ppo_epochs`."""
    actor_warmup_steps: int
    """Steps of learning-rate warm-up."""
    critic_lr_warmup_steps: int
    """Steps of learning-rate warm-up of the critic (not `trainer.critic_warmup`)."""
    estimator_needs: tuple[str, ...]
    """What the advantage estimator reads in addition to rewards and masks."""
    needs_critic: bool
    values_by_update: bool
    """The critic's one update a step computes the values too: each micro-batch goes backward with its own returns."""
    needs_reference: bool
    reads_ref_log_probs: bool
    """The reference has a pass of its own. False with the exact KL alone, for which it computes in the update."""
    corrects: bool
    """Old and rollout log-probs are compared before the update, to weigh tokens or to reject them."""
    old_log_probs: OldLogProbs
    """Where the log-probs before the update come from."""
    sums_squares: bool
    """Their pass also sums the squared probabilities of the vocabulary, for the advantage estimator."""
    notes: tuple[str, ...]
    """Decisions to be printed at the start, one sentence each."""


@dataclass(frozen=True)
class SFTPlan:
    """How much an SFT run does."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    notes: tuple[str, ...]


def make_plan(
    config: Config,
    num_train_samples: int,
    estimator: EstimatorSpec | None = None,
    *,
    half_precision: bool = False,
) -> Plan:
    """Derive the run's numbers.

    `num_train_samples` counts the rows left after filtering. `estimator` is what the advantage estimator states
    (`ADVANTAGE_ESTIMATORS.get(name).spec`); it may be left out for a built-in. `half_precision` says that the engine or
    the actor computes in it. Raises ConfigError when no batch is ever full, the critic does not fit, or the actor would
    never be trained; ValueError for an estimator of the user's own without its statement.
    """
    spec = estimator or ESTIMATORS.find(config.algorithm.adv_estimator)
    if spec is None:
        raise ValueError(f"algorithm.adv_estimator={config.algorithm.adv_estimator}: pass the statement of its file")
    arr, critic, trainer = config.actor_rollout_ref, config.critic, config.trainer
    actor, n = arr.actor, arr.rollout.n
    batch = config.data.train_batch_size
    mini, critic_mini = actor.ppo_mini_batch_size or batch, critic.ppo_mini_batch_size or batch
    per_epoch = _steps_per_epoch(num_train_samples, batch)
    total = trainer.total_training_steps or per_epoch * trainer.total_epochs
    needs_critic = _needs_critic(config, spec)
    _check_critic_warmup(config, total)
    updates = updates_per_step(config)
    source, why = _old_log_probs(config, updates, half_precision, spec.needs)
    plan = Plan(
        steps_per_epoch=per_epoch,
        total_steps=total,
        rows_per_step=batch * n,
        mini_batch_rows=mini * n,
        critic_mini_batch_rows=critic_mini * n,
        updates_per_step=updates,
        actor_warmup_steps=_warmup_steps(actor.optim, total),
        critic_lr_warmup_steps=_warmup_steps(critic.optim, total),
        estimator_needs=spec.needs,
        needs_critic=needs_critic,
        values_by_update=needs_critic
        and spec.by_row
        and _values_by_update(config, batch // critic_mini * critic.ppo_epochs),
        needs_reference=uses_reference(config),
        reads_ref_log_probs=reads_ref_log_probs(config),
        corrects=corrects(config),
        old_log_probs=source,
        sums_squares="sum_pi_squared" in spec.needs,
        notes=(),
    )
    return _with_notes(plan, config, num_train_samples, why)


def _old_log_probs(
    config: Config, updates: int, half_precision: bool, needs: tuple[str, ...]
) -> tuple[OldLogProbs, str]:
    """Where the log-probs before the update come from, and the sentence that says so."""
    key, rollout = "actor_rollout_ref.actor.old_log_probs", config.actor_rollout_ref.rollout
    kl, own_pass = config.algorithm.use_kl_in_reward, "Old log-probs are computed by a pass of their own"
    if config.algorithm.rollout_correction.bypass_mode:
        if "sum_pi_squared" in needs:
            raise ConfigError(_squares_in_bypass(config))
        return "rollout", "The rollout's log-probs are the old ones, unchecked (rollout_correction.bypass_mode)."
    if config.actor_rollout_ref.actor.old_log_probs == "recompute":
        return "pass", f"{own_pass} ({key}=recompute)."
    if {"old_log_probs", "sum_pi_squared"} & {*needs}:
        return "pass", f"{own_pass}: algorithm.adv_estimator={config.algorithm.adv_estimator} reads them."
    if corrects(config):
        return "pass", f"{own_pass}: algorithm.rollout_correction compares the engine's with them."
    if updates == 1 and not kl:
        note = "The update's own log-probs are the old ones: the pass that would compute them first is left out."
        return "update", note
    if rollout.top_p < 1 or rollout.top_k != -1:
        return "pass", f"{own_pass}: the engine's are those of a filtered choice."
    if half_precision:
        return "pass", f"{own_pass}: in half precision the engine's are not exact."
    use = "serve the KL in the reward" if updates == 1 else "are the old ones"
    return "engine", (
        f"The engine's log-probs {use}, checked on a sample of rows in each step; beyond the bound all are computed "
        f"again. Always again: {key}=recompute."
    )


def _squares_in_bypass(config: Config) -> str:
    return (
        "algorithm.rollout_correction.bypass_mode=True with "
        f"algorithm.adv_estimator={config.algorithm.adv_estimator}: the estimator reads the squared probabilities of "
        "the whole vocabulary, from the pass that bypass mode leaves out. Remove one of them."
    )


def _values_by_update(config: Config, updates: int) -> bool:
    pretrains = config.trainer.critic_warmup and config.trainer.critic_warmup_returns == "monte_carlo"
    if pretrains or config.algorithm.use_pf_ppo:  # other returns, other rows than those of the pass
        return False
    return updates == 1 and config.critic.share_base != "head"


def make_sft_plan(config: SFTConfig, num_train_samples: int) -> SFTPlan:
    """Derive the SFT run's numbers. Raises ConfigError when no batch is ever full."""
    per_epoch = _steps_per_epoch(num_train_samples, config.data.train_batch_size)
    total = config.trainer.total_training_steps or per_epoch * config.trainer.total_epochs
    notes = tuple(_step_notes(config.trainer, per_epoch, total, num_train_samples, config.data.train_batch_size))
    return SFTPlan(per_epoch, total, _warmup_steps(config.optim, total), notes)


def _steps_per_epoch(num_samples: int, batch: int) -> int:
    if num_samples < batch:
        raise ConfigError(
            f"data.train_batch_size={batch}: the training data has {num_samples} usable rows, so no batch is ever "
            f"full. Use data.train_batch_size <= {num_samples}, or more data."
        )
    return num_samples // batch


def _warmup_steps(optim: OptimConfig, total_steps: int) -> int:
    """`lr_warmup_steps` when above 0, else the ratio's share of all steps, rounded down (as verl)."""
    return optim.lr_warmup_steps if optim.lr_warmup_steps > 0 else int(optim.lr_warmup_steps_ratio * total_steps)


def _needs_critic(config: Config, spec: EstimatorSpec) -> bool:
    enable, name = config.critic.enable, config.algorithm.adv_estimator
    if enable is False and spec.needs_critic:
        raise ConfigError(f"critic.enable=False: algorithm.adv_estimator={name} needs values. Remove critic.enable.")
    needs_critic = spec.needs_critic if enable is None else enable
    if config.trainer.critic_warmup and not needs_critic:
        raise ConfigError(
            f"trainer.critic_warmup={config.trainer.critic_warmup} without a critic (adv_estimator={name}): "
            "nothing would be trained in those steps. Remove it."
        )
    return needs_critic


def _check_critic_warmup(config: Config, total_steps: int) -> None:
    """The rule `actor_is_trained` knows total_training_steps only; here the steps of the epochs are known too."""
    trainer = config.trainer
    if trainer.critic_warmup >= total_steps and not trainer.val_only:
        raise ConfigError(
            f"trainer.critic_warmup={trainer.critic_warmup}: the actor would never be trained, the run has "
            f"{total_steps} steps (trainer.total_epochs={trainer.total_epochs}). Use less, or more epochs."
        )


def _with_notes(plan: Plan, config: Config, num_samples: int, old_log_probs: str) -> Plan:
    actor = config.actor_rollout_ref.actor
    notes = list(_kl_notes(config))
    at_one = plan.updates_per_step == 1 and plan.old_log_probs != "rollout"
    loss = LOSSES.assume(actor.policy_loss.loss_mode)
    if at_one and loss.has_ratio:
        notes.append(f"One update a step: the ratio is 1 throughout, so the {loss.idle_at_ratio_one} never acts.")
    notes.append(old_log_probs)
    if config.algorithm.filter_groups.enable:
        notes.append(
            "Dynamic sampling is on: a step takes 1 to "
            f"{config.algorithm.filter_groups.max_num_gen_batches} batches of prompts, so epochs pass faster than the "
            "number of steps says (training/epoch)."
        )
    if plan.values_by_update:
        notes.append(
            "The critic's one update computes the values too: the pass that would read them first is left out."
        )
    notes.extend(
        _step_notes(config.trainer, plan.steps_per_epoch, plan.total_steps, num_samples, config.data.train_batch_size)
    )
    return dataclasses.replace(plan, notes=tuple(notes))


def _kl_notes(config: Config) -> Iterator[str]:
    """Why the KL is or is not in the reward, where the user made no choice. Its coefficient is in the summary."""
    key = "algorithm.use_kl_in_reward"
    why = config.provenance.sources.get(key, "default")
    if why != "default" and not why.startswith("derived from "):
        return
    if config.algorithm.use_kl_in_reward:
        yield f"KL in the reward is on ({why}); off: {key}=False."
    elif not config.actor_rollout_ref.actor.use_kl_loss:
        yield f"KL in the reward is off ({why}); on: {key}=True."


def _step_notes(
    trainer: TrainerConfig | SFTTrainerConfig, per_epoch: int, total: int, num_samples: int, batch: int
) -> list[str]:
    notes = []
    if left := num_samples % batch:
        notes.append(f"{per_epoch} steps an epoch; the last {left} of {num_samples} rows of each epoch are left out.")
    if trainer.total_training_steps and total > per_epoch * trainer.total_epochs:
        notes.append(
            f"trainer.total_training_steps={total} wins over trainer.total_epochs={trainer.total_epochs} "
            f"({per_epoch * trainer.total_epochs} steps): {total / per_epoch:.1f} epochs."
        )
    return notes
