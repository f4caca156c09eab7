"""What a collector returns, and what a collector is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from steepest.core.batch import Batch
from steepest.learner.metrics import Metrics
from steepest.rewards.api import RewardResult


@dataclass(frozen=True)
class Responses:
    """Responses that were generated together, their texts and what their rewards returned, row by row."""

    batch: Batch
    texts: list[str]
    results: list[RewardResult]


@dataclass
class Experience:
    """What one step learns from: a scored batch, and how it came about.

    Example: a collector with dynamic sampling generated 2 rounds of 4 prompts to fill a batch of 4. `batch` has the
    rows of the 4 prompts that are kept, `responses` has 2 entries with all 8 prompts, `metrics` has
    `train/num_gen_batches` 2.0, `seconds` has the time of both rounds under "gen" and "reward", and `prompts_taken` is
    2 larger than in the step before.
    """

    batch: Batch
    """Rows to learn from, with `token_level_scores` and the extras that the advantage estimator needs."""
    responses: Sequence[Responses]
    """Everything that was generated for it, dropped rows included."""
    metrics: Metrics = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Part of the step ("gen", "reward") -> seconds."""
    flops: dict[str, float] = field(default_factory=dict)
    """Part of the step -> floating-point operations of the models."""
    prompts_taken: int | None = None
    """Batches of prompts that the run has used up to here, where that is not the number of the step."""


class Collector(Protocol):
    """Generates and scores the responses of a step.

    Collectors wrap one another: `Finished(DynamicSampling(GreedyBaseline(SingleTurn(...))))`. A collector keeps nothing
    between two calls, so that the experience of step N + 1 may be collected before step N has been learnt from.
    Example: `collect(3).batch` is the scored batch of step 3, and the same call gives the same batch while the engine
    has the same weights. With dynamic sampling each call takes the run's next prompts (`PromptPosition`) instead.
    """

    def __call__(self, step: int) -> Experience: ...
