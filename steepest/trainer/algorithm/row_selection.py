"""Which responses a step learns from, and how much of them: objects that are chosen at start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steepest.config.schema import Config
from steepest.core.batch import Batch, RowStatus
from steepest.core.row_selection import (
    draw_rows,
    in_varied_groups,
    monte_carlo_returns,
    overlong_penalty,
    pf_ppo_weights,
)
from steepest.learner.metrics import Metrics
from steepest.rewards.api import RewardResult
from steepest.trainer.experience.single_turn import step_seed


@dataclass
class OverlongPenalty:
    """Adds `core.row_selection.overlong_penalty` to every score, before anything reads it."""

    max_length: int
    buffer: int
    factor: float
    log: bool

    def __call__(self, batch: Batch, results: list[RewardResult]) -> list[RewardResult]:
        penalties = overlong_penalty(
            batch.response_lengths, max_length=self.max_length, buffer=self.buffer, factor=self.factor
        )
        return [self._lowered(result, penalty) for result, penalty in zip(results, penalties.tolist(), strict=True)]

    def _lowered(self, result: RewardResult, penalty: float) -> RewardResult:
        if result.score is None:
            return result
        parts = {"overlong_reward": penalty, "overlong": float(penalty < 0)} if self.log else {}
        return replace(result, score=result.score + penalty, parts={**result.parts, **parts})


def mask_truncated(batch: Batch) -> Metrics:
    """DAPO's overlong filtering: a response cut at the length limit is left out of the training, as TRUNCATED.

    As one whose reward failed it counts in no loss, no denominator and no group: what is learnt is what a batch without
    it would teach. Lengths still count it.
    """
    batch.leave_out(batch.truncated, RowStatus.TRUNCATED)
    return {"mask_truncated/ratio": batch.truncated.float().mean().item()}


def mask_equal_groups(batch: Batch) -> Metrics:
    """A prompt whose responses all have one score is left out of the training, so that it does not dilute the others.

    Its rows become EQUAL_GROUP. Compared are the rows with a token of trained_mask.
    """
    assert batch.token_level_scores is not None
    counted = batch.trained_mask.any(1)
    equal = counted & ~in_varied_groups(batch.token_level_scores.sum(1), batch.group_ids, counted)
    batch.leave_out(equal, RowStatus.EQUAL_GROUP)
    return {"mask_equal_groups/ratio": (equal.sum() / counted.sum().clamp(min=1)).item()}


@dataclass
class InTurn:
    """Several of them, one after the other."""

    parts: Sequence[Callable[[Batch], Metrics]]

    def __call__(self, batch: Batch) -> Metrics:
        metrics: Metrics = {}
        for part in self.parts:
            metrics |= part(batch)
        return metrics


def build_shaping(config: Config) -> Callable[[Batch, list[RewardResult]], list[RewardResult]]:
    """What is added to the rewards' own scores in training."""
    overlong_buffer = config.reward.overlong_buffer
    if not overlong_buffer.enable:
        return lambda batch, results: results
    assert overlong_buffer.len is not None, "checked by config.sections.reward"
    return OverlongPenalty(
        config.data.max_response_length, overlong_buffer.len, overlong_buffer.penalty_factor, overlong_buffer.log
    )


def build_left_out(config: Config) -> Callable[[Batch], Metrics]:
    """Leaves rows of a scored batch out of the training."""
    parts: list[Callable[[Batch], Metrics]] = []
    if config.algorithm.mask_truncated:
        parts.append(mask_truncated)
    if config.algorithm.mask_equal_groups:  # of what is left
        parts.append(mask_equal_groups)
    return InTurn(parts)


def all_rows(batch: Batch, step: int) -> tuple[Batch, Metrics]:
    """The updates read the whole batch."""
    return batch, {}


@dataclass(frozen=True)
class DrawnRows:
    """PF-PPO's draw: the rows of a step's updates, the same ones for actor and critic, and for a step that is repeated.

    Rows with a token of loss_mask are drawn; advantages are those of the whole batch.
    """

    method: str
    weight_pow: float
    seed: int

    def __call__(self, batch: Batch, step: int) -> tuple[Batch, Metrics]:
        """The batch of the drawn rows, and `pf_ppo/distinct_ratio`, the share of distinct rows among them."""
        assert batch.token_level_scores is not None
        weights = pf_ppo_weights(
            batch.token_level_scores.sum(1),
            batch.loss_mask.any(1),
            method=self.method,
            weight_pow=self.weight_pow,
        )
        rows = draw_rows(weights, step_seed(self.seed, step))
        return batch.select(rows), {"pf_ppo/distinct_ratio": len(rows.unique()) / max(1, len(rows))}


def estimated_returns(batch: Batch, step: int) -> Batch:
    """The critic learns the estimator's returns."""
    return batch


@dataclass(frozen=True)
class PretrainingReturns:
    """In the first `num_steps` steps the critic learns the rewards that followed, not its own estimate of them.

    The policy stands still in those steps, so this is VC-PPO's value pretraining on its rollouts. The returns are made
    of the rewards on all tokens of trained_mask, including those that the losses leave out.
    """

    num_steps: int
    gamma: float

    def __call__(self, batch: Batch, step: int) -> Batch:
        if step > self.num_steps:
            return batch
        assert batch.token_level_rewards is not None
        returns = monte_carlo_returns(batch.token_level_rewards, batch.trained_mask, gamma=self.gamma)
        return replace(batch, returns=returns)


def build_row_selection(config: Config) -> Callable[[Batch, int], tuple[Batch, Metrics]]:
    """The rows that a step's updates read."""
    algorithm = config.algorithm
    if not algorithm.use_pf_ppo:
        return all_rows
    pf_ppo = algorithm.pf_ppo
    return DrawnRows(pf_ppo.reweight_method, pf_ppo.weight_pow, config.actor_rollout_ref.rollout.seed)


def build_critic_targets(config: Config) -> Callable[[Batch, int], Batch]:
    """What the critic learns in a step."""
    trainer = config.trainer
    if trainer.critic_warmup and trainer.critic_warmup_returns == "monte_carlo":
        return PretrainingReturns(trainer.critic_warmup, config.algorithm.gamma)
    return estimated_returns
