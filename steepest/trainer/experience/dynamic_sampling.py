"""DAPO's dynamic sampling: prompts that teach nothing are replaced by further ones until the batch is full.

Yu et al. 2025, https://arxiv.org/abs/2503.14476. Generation and scoring take turns here, so this stands in the place of
both parts of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steepest.core.batch import Batch
from steepest.core.row_selection import in_varied_groups
from steepest.errors import RewardError
from steepest.learner.metrics import Metrics
from steepest.registry import nearest
from steepest.rewards.api import RewardResult
from steepest.trainer.experience.scoring import Rated, StepScorer, reward_metrics

SCORES = ("reward", "score", "seq_reward")
"""verl's names of the score itself; any other name is a part that the reward function reports."""


@dataclass
class PromptPosition:
    """How many batches of prompts a run has used: more than its steps, and saved with it, so that a resumed run draws
    the prompts and the random numbers that the uninterrupted one would have drawn."""

    taken: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def restore(self, state: dict[str, int] | None, step: int) -> None:
        """Go on at `step`; without a state (no dynamic sampling until then) each step has used one batch."""
        self.taken = max(step, (state or {}).get("taken", 0))


@dataclass
class DynamicSampling:
    """`generate` and `score` of a step whose groups must differ in `metric`.

    A round is one batch of prompts with the seed of its number. Rounds go on until `num_groups` groups differ, for
    `max_rounds` at most; groups beyond the batch are not used, and groups that are missing then are filled with the
    first ones that were dropped, so that the batch always has its size. `generate` includes the scoring, in time too.
    """

    rollouts: Callable[[int], Batch]
    """Responses for the prompts of round N, counted from 1 over the whole run."""
    scorer: StepScorer
    position: PromptPosition
    num_groups: int
    metric: str
    max_rounds: int
    epoch: Callable[[int], int]
    """The epoch, from 0, of a round that is counted from 0."""
    pad_id: int
    say: Callable[[str], None]
    release: Callable[[], None] = lambda: None
    """Called when all responses of the step are there."""
    _metrics: Metrics = field(default_factory=dict)
    _told: bool = False

    def generate(self, step: int) -> Batch:
        """A full, scored batch."""
        rounds: list[Rated] = []
        varied: list[Batch] = []
        equal: list[Batch] = []
        found = 0
        while found < self.num_groups and len(rounds) < self.max_rounds:
            rated = self._round()
            rounds.append(rated)
            keep = self._keeps(rated)
            varied.append(rated.batch.select(keep))
            equal.append(rated.batch.select(~keep))
            found += num_groups(varied[-1])
        self.release()
        self.scorer.finish(step, rounds)
        batch = first_groups(Batch.cat([*varied, *equal], pad_id=self.pad_id), self.num_groups)
        self._metrics = self._describe(rounds, found)
        self._warn(found, len(rounds))
        return batch

    def score(self, batch: Batch, step: int) -> Metrics:
        """What rewards said of all responses, dropped ones included, and what the filter did."""
        return self._metrics | self.scorer.curate(batch)

    def _round(self) -> Rated:
        self.position.taken += 1
        return self.scorer.rate(self.rollouts(self.position.taken))

    def _keeps(self, rated: Rated) -> Tensor:
        batch = rated.batch
        return in_varied_groups(values_of(rated.results, self.metric), batch.group_ids, batch.trained_mask.any(1))

    def _describe(self, rounds: Sequence[Rated], found: int) -> Metrics:
        results = [result for part in rounds for result in part.results]
        scores = [result.score for result in results if result.score is not None]
        generated = sum(num_groups(part.batch) for part in rounds)
        return reward_metrics(results) | {
            "training/epoch": float(self.epoch(self.position.taken - 1)),
            "train/num_gen_batches": float(len(rounds)),
            "filter_groups/generated": float(generated),
            "filter_groups/dropped": float(generated - found),
            "filter_groups/unused": float(max(0, found - self.num_groups)),
            "filter_groups/filled": float(max(0, self.num_groups - found)),
            "filter_groups/score_mean": sum(scores) / len(scores) if scores else 0.0,
        }

    def _warn(self, found: int, rounds: int) -> None:
        if found >= self.num_groups or self._told:
            return
        self._told = True
        self.say(
            f"warning: dynamic sampling found {found} of {self.num_groups} prompts whose responses differ in "
            f"{self.metric} in {rounds} rounds (algorithm.filter_groups.max_num_gen_batches): the batch is filled with "
            "prompts that were dropped. filter_groups/filled counts them; this is told once. Prompts that are too easy "
            "or too hard, or too few responses a prompt, are the usual reasons."
        )


def values_of(results: Sequence[RewardResult], metric: str, *, key: str = "algorithm.filter_groups.metric") -> Tensor:
    """(B,) f32, the number of each response that `key` names; 0 for one whose reward failed.

    Raises RewardError for a part that a reward function did not report.
    """
    values = []
    for result in results:
        if result.score is None:
            values.append(0.0)
        elif metric in SCORES:
            values.append(result.score)
        elif metric in result.named():
            values.append(result.named()[metric])
        else:
            known = [SCORES[0], *result.named()]
            guess = nearest(metric, known)
            hint = f" Did you mean {guess}?" if guess else ""
            raise RewardError(f"{key}={metric}: a reward reported no such part.{hint} It reported: {', '.join(known)}.")
    return torch.tensor(values)


def num_groups(batch: Batch) -> int:
    """Prompts that the batch has responses to."""
    return len(batch.group_ids.unique())


def first_groups(batch: Batch, number: int) -> Batch:
    """The rows of the first `number` groups; groups are numbered from 0 in the order of their rows."""
    return batch.select(batch.group_ids < number)
