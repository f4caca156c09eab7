"""DAPO's dynamic sampling: prompts that teach nothing are replaced by further ones until the batch is full.

Yu et al. 2025, https://arxiv.org/abs/2503.14476.
"""

from __future__ import annotations

import threading
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
from steepest.trainer.experience.api import Collector, Experience
from steepest.trainer.loop import Timer

SCORES = ("reward", "score", "seq_reward")
"""verl's names of the score itself; any other name is a part that the reward function reports."""


@dataclass
class PromptPosition:
    """How many batches of prompts a run has used: more than its steps where sampling is dynamic, and saved with it, so
    that a resumed run draws the prompts and the random numbers that the uninterrupted one would have drawn.

    This is state of the run, not of a collector: `taken` is what collectors have used, `learnt` what the steps that
    have been learnt from had used. A checkpoint saves `learnt`.
    """

    taken: int = 0
    learnt: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def take(self) -> int:
        """The number of the next batch of prompts, counted from 1 over the whole run; no two callers get the same."""
        with self._lock:
            self.taken += 1
            return self.taken

    def learn(self, prompts_taken: int | None) -> None:
        """A step has been learnt from whose experience had used so many. Another step may have used later ones before:
        then these stay used, since they were learnt from."""
        if prompts_taken is not None:
            self.learnt = max(self.learnt, prompts_taken)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.learnt}

    def restore(self, state: dict[str, int] | None, step: int) -> None:
        """Resume at `step`; without a state (no dynamic sampling until then) each step has used one batch."""
        self.taken = self.learnt = max(step, (state or {}).get("taken", 0))


@dataclass
class DynamicSampling:
    """Collects rounds until the groups of a batch differ in `metric`.

    A round is one batch of prompts with the seed of its number. Rounds end when `num_groups` groups differ, after
    `max_rounds` at most. Groups beyond the batch are not used, and groups that are missing then are filled with the
    first ones that were dropped, so that the batch always has its size.
    """

    collect: Collector
    """Scored responses to the prompts of round N, counted from 1 over the whole run."""
    position: PromptPosition
    num_groups: int
    metric: str
    max_rounds: int
    epoch: Callable[[int], int]
    """The epoch, from 0, of a round that is counted from 0."""
    pad_id: int
    warn_once: Callable[[str], None]
    """Prints a warning the first time that it is called."""
    timer: Callable[[], Timer] = Timer
    release: Callable[[], None] = lambda: None
    """Called when all responses of the step are there, see SingleTurn."""

    def __call__(self, step: int) -> Experience:
        rounds: list[Experience] = []
        varied: list[Batch] = []
        equal: list[Batch] = []
        found, taken, timed = 0, self.position.taken, self.timer()
        while found < self.num_groups and len(rounds) < self.max_rounds:
            taken = self.position.take()
            one = self.collect(taken)
            timed.add(one.seconds, one.flops)
            rounds.append(one)
            keep = self._keeps(one)
            varied.append(one.batch.select(keep))
            equal.append(one.batch.select(~keep))
            found += num_groups(varied[-1])
        with timed("gen"):
            self.release()
        self._warn(found, len(rounds))
        return Experience(
            batch=first_groups(Batch.cat([*varied, *equal], pad_id=self.pad_id), self.num_groups),
            responses=[part for one in rounds for part in one.responses],
            metrics=self._describe(rounds, found, taken),
            seconds=timed.seconds,
            flops=timed.flops,
            prompts_taken=taken,
        )

    def _keeps(self, one: Experience) -> Tensor:
        batch, results = one.batch, [result for part in one.responses for result in part.results]
        return in_varied_groups(values_of(results, self.metric), batch.group_ids, batch.trained_mask.any(1))

    def _describe(self, rounds: Sequence[Experience], found: int, taken: int) -> Metrics:
        results = [result for one in rounds for part in one.responses for result in part.results]
        scores = [result.score for result in results if result.score is not None]
        generated = sum(num_groups(one.batch) for one in rounds)
        return {
            "training/epoch": float(self.epoch(taken - 1)),
            "train/num_gen_batches": float(len(rounds)),
            "filter_groups/generated": float(generated),
            "filter_groups/dropped": float(generated - found),
            "filter_groups/unused": float(max(0, found - self.num_groups)),
            "filter_groups/filled": float(max(0, self.num_groups - found)),
            "filter_groups/score_mean": sum(scores) / len(scores) if scores else 0.0,
        }

    def _warn(self, found: int, rounds: int) -> None:
        if found >= self.num_groups:
            return
        self.warn_once(
            f"warning: dynamic sampling found {found} of {self.num_groups} prompts whose responses differ in "
            f"{self.metric} in {rounds} rounds (algorithm.filter_groups.max_num_gen_batches): the batch is filled with "
            "prompts that were dropped. filter_groups/filled counts them; this is printed once. Prompts that are too "
            "easy or too hard, or too few responses a prompt, are the usual reasons."
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
