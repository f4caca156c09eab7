"""From responses to scores: decoding, the reward pool, and what a failed reward does to a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steepest.core.batch import Batch, RowStatus
from steepest.learner.metrics import Metrics
from steepest.rewards.api import RewardRequest, RewardResult, ScoresResponses


@dataclass
class Scorer:
    """Decodes responses (special tokens skipped) and has them scored."""

    rewards: ScoresResponses
    tokenizer: Any
    costs: Callable[[], Metrics] = dict
    """What the rewards have cost since they were last asked."""

    def texts(self, batch: Batch) -> list[str]:
        rows = [row[:n] for row, n in zip(batch.responses.tolist(), batch.response_lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def results(self, batch: Batch, texts: Sequence[str]) -> list[RewardResult]:
        requests = [
            RewardRequest(
                sample_id=sample.uid,
                data_source=sample.data_source,
                solution=text,
                ground_truth=sample.ground_truth,
                extra_info=sample.extra_info,
                num_tokens=length,
                messages=sample.messages,
            )
            for sample, text, length in zip(batch.samples, texts, batch.response_lengths.tolist(), strict=True)
        ]
        return self.rewards.score(requests)


@dataclass(frozen=True)
class Rated:
    """Responses with their texts and what their rewards said."""

    batch: Batch
    texts: list[str]
    results: list[RewardResult]


@dataclass
class StepScorer:
    """The reward part of a step: scores into the batch, their statistics, and the responses to a file if asked."""

    scorer: Scorer
    write: Callable[[int, list[dict[str, Any]]], None] | None = None
    """Takes the step and one record a response (`trainer.rollout_data_dir`)."""
    shape: Callable[[Batch, list[RewardResult]], list[RewardResult]] = lambda batch, results: results
    """What the run adds to the rewards' own scores, e.g. a penalty for length."""
    curate: Callable[[Batch], Metrics] = lambda batch: {}
    """Takes responses out of the finished, scored batch."""
    fills: Sequence[Callable[[Batch, list[RewardResult]], None]] = ()
    """What the estimator reads beside the scores, put into a batch that has been scored."""

    def __call__(self, batch: Batch, step: int) -> Metrics:
        rated = self.rate(batch)
        self.finish(step, [rated])
        return reward_metrics(rated.results) | self.curate(batch)

    def rate(self, batch: Batch) -> Rated:
        """Score some responses of a step, and place the scores."""
        texts = self.scorer.texts(batch)
        results = self.results(batch, texts)
        place_scores(batch, results)
        for fill in self.fills:
            fill(batch, results)
        return Rated(batch, texts, results)

    def results(self, batch: Batch, texts: Sequence[str]) -> list[RewardResult]:
        """What the rewards say of responses, with what the run adds to it."""
        return self.shape(batch, self.scorer.results(batch, texts))

    def finish(self, step: int, parts: Sequence[Rated]) -> None:
        """Write down all responses of a step, where that is asked for."""
        if self.write is not None:
            self.write(step, [row for part in parts for row in sample_records(part.batch, part.texts, part.results)])


def with_costs(score: Callable[[Batch, int], Metrics], costs: Callable[[], Metrics]) -> Callable[[Batch, int], Metrics]:
    """The reward part of a step, with what its rewards cost among the metrics."""
    return lambda batch, step: score(batch, step) | costs()


def place_scores(batch: Batch, results: Sequence[RewardResult]) -> None:
    """Fill `token_level_scores` (B, T) f32: the score on the last token of response_mask, 0 elsewhere.

    That is the policy's last token: rewards are read where the policy acted, so a score on the tool output that a
    trajectory ends in would be lost. A row without a policy token has its score nowhere.

    A row whose reward failed has no score either. It is left out of the training as REWARD_FAILED, so it counts in no
    loss, no statistic and no group.
    """
    scores = torch.zeros(batch.responses.shape, dtype=torch.float32)
    failed = torch.tensor([result.score is None for result in results], dtype=torch.bool)
    found = torch.tensor([0.0 if result.score is None else result.score for result in results])
    last = batch.last_policy_token
    acted = (last >= 0).nonzero()[:, 0]
    scores[acted, last[acted]] = found[acted]
    batch.token_level_scores = scores
    batch.leave_out(failed, RowStatus.REWARD_FAILED)


def reward_metrics(results: Sequence[RewardResult]) -> Metrics:
    """`reward/error_rate`, `reward/format_rate`, the mean of every other part that rewards report, and mean, max and
    min of each reward of a weighted sum, before its weight."""
    if not results:
        return {}
    metrics = {"reward/error_rate": sum(r.score is None for r in results) / len(results)}
    names = dict.fromkeys(name for r in results for name in r.parts)
    for name in names:
        values = [r.parts[name] for r in results if name in r.parts]
        metrics[f"reward/{'format_rate' if name == 'format' else name}"] = sum(values) / len(values)
    for name in dict.fromkeys(name for r in results for name in r.scores):
        values = [r.scores[name] for r in results if name in r.scores]
        metrics |= {
            f"reward/{name}/mean": sum(values) / len(values),
            f"reward/{name}/max": max(values),
            f"reward/{name}/min": min(values),
        }
    return metrics


def sample_records(batch: Batch, texts: Sequence[str], results: Sequence[RewardResult]) -> list[dict[str, Any]]:
    """One JSON-able record a response."""
    records = []
    for sample, text, result, cut in zip(batch.samples, texts, results, batch.truncated.tolist(), strict=True):
        record = {
            "id": sample.uid,
            "data_source": sample.data_source,
            "prompt": sample.messages,
            "response": text,
            "ground_truth": sample.ground_truth,
            "score": result.score,
            **{f"reward/{name}": value for name, value in result.named().items()},
            "truncated": cut,
        }
        if result.error:
            record["error"] = result.error
        records.append(record)
    return records
