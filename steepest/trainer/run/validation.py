"""Validation: every prompt of the validation set answered and scored, the last partial batch included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steepest.data.prompts import Prompt
from steepest.data.sampler import batches
from steepest.learner.metrics import Metrics
from steepest.progress import STEP
from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer.experience.scoring import Scorer, sample_records
from steepest.trainer.experience.single_turn import Generates, generate_batch, step_seed
from steepest.trainer.run.statistics import Answered, mean_at


@dataclass
class Evaluation:
    """What one validation found."""

    metrics: Metrics
    score: float
    """Mean accuracy over all prompts: what 'best so far' means."""
    samples: list[dict[str, Any]]
    """One record a response: prompt, response, score, ground truth."""
    accuracies: list[float]
    """The accuracy of each response, see `accuracy`."""


@dataclass
class Evaluator:
    """Answers the validation set with its own sampling and scores it with the training reward."""

    engine: Generates
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    scorer: Scorer
    batch_size: int | None
    pad_id: int

    def __call__(self) -> Evaluation:
        with STEP.activity("validation", len(self.prompts)) as answered:
            return self._evaluate(answered.advance)

    def _evaluate(self, advance: Callable[[int], None]) -> Evaluation:
        records: list[dict[str, Any]] = []
        results: list[RewardResult] = []
        truncated = tokens = 0
        for number, rows in enumerate(batches(len(self.prompts), self.batch_size)):
            sampling = replace(self.sampling, seed=step_seed(self.sampling.seed, number))
            batch = generate_batch(self.engine, [self.prompts[i] for i in rows], sampling, pad_id=self.pad_id)
            texts = self.scorer.texts(batch)
            scored = self.scorer.results(batch, texts)
            results += scored
            records += sample_records(batch, texts, scored)
            advance(len(rows))
            truncated += int(batch.truncated.sum())
            tokens += int(batch.response_lengths.sum())
        metrics = accuracy_metrics(records, results, num_samples=self.sampling.n)
        metrics["val-aux/response_length/mean"] = tokens / len(records)
        metrics["val-aux/response_length/clip_ratio"] = truncated / len(records)
        metrics["val-aux/num_prompts"] = float(len(self.prompts))
        metrics["val-aux/accuracy_low"], metrics["val-aux/accuracy_high"] = interval(records, results)
        metrics |= {f"val-aux/{name}": value for name, value in self.scorer.costs().items()}
        return Evaluation(metrics, mean_accuracy(results), records, [accuracy(result) for result in results])


def accuracy(result: RewardResult) -> float:
    """A response's accuracy: the reward's own `acc` where it reports one, else its score. 0 when scoring failed.

    A failed reward is not left out here, as in training: the mean is over the whole set, and
    `val-aux/error_rate` says how many failed.
    """
    if result.score is None:
        return 0.0
    return result.parts.get("acc", result.score)


def mean_accuracy(results: Sequence[RewardResult]) -> float:
    return sum(map(accuracy, results)) / len(results)


def interval(records: Sequence[dict[str, Any]], results: Sequence[RewardResult]) -> tuple[float, float]:
    """The 95 % interval of `mean_accuracy` over prompts like these; see `statistics.mean_at`."""
    prompts: dict[str, list[float]] = defaultdict(list)
    for record, result in zip(records, results, strict=True):
        prompts[record["id"]].append(accuracy(result))
    found = mean_at([Answered(tuple(group)) for group in prompts.values()])
    return found.low, found.high


def accuracy_metrics(
    records: Sequence[dict[str, Any]], results: Sequence[RewardResult], *, num_samples: int
) -> Metrics:
    """Per data source: `val-core/<source>/acc/mean@n`, `best@n` for n > 1, format rate, and the error rate of all."""
    by_source: dict[str, dict[str, list[RewardResult]]] = defaultdict(lambda: defaultdict(list))
    for record, result in zip(records, results, strict=True):
        by_source[record["data_source"]][record["id"]].append(result)
    metrics: Metrics = {}
    for source, groups in by_source.items():
        flat = [result for group in groups.values() for result in group]
        metrics[f"val-core/{source}/acc/mean@{num_samples}"] = mean_accuracy(flat)
        if num_samples > 1:
            best = [max(map(accuracy, group)) for group in groups.values()]
            metrics[f"val-core/{source}/acc/best@{num_samples}"] = sum(best) / len(best)
        formats = [r.parts["format"] for r in flat if "format" in r.parts]
        if formats:
            metrics[f"val-aux/{source}/format_rate"] = sum(formats) / len(formats)
    metrics["val-aux/error_rate"] = sum(r.score is None for r in results) / len(results)
    if any(r.timed_out for r in results):
        metrics["val-aux/timeout_rate"] = sum(r.timed_out for r in results) / len(results)
    return metrics
