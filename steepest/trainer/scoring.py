"""From responses to scores: decoding, the reward pool, and what a failed reward does to a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steepest.core.batch import Batch
from steepest.rewards.api import RewardRequest, RewardResult
from steepest.rewards.pool import RewardPool
from steepest.training.meters import Metrics


@dataclass
class Scorer:
    """Decodes responses (special tokens skipped) and has them scored by the pool."""

    pool: RewardPool
    tokenizer: Any

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
            )
            for sample, text in zip(batch.samples, texts, strict=True)
        ]
        return self.pool.score(requests)


@dataclass
class StepScorer:
    """The reward part of a step: scores into the batch, their statistics, and the responses to a file if asked."""

    scorer: Scorer
    write: Callable[[int, list[dict[str, Any]]], None] | None = None
    """Takes the step and one record a response (`trainer.rollout_data_dir`)."""

    def __call__(self, batch: Batch, step: int) -> Metrics:
        texts = self.scorer.texts(batch)
        results = self.scorer.results(batch, texts)
        if self.write is not None:
            self.write(step, sample_records(batch, texts, results))
        place_scores(batch, results)
        return reward_metrics(results)


def place_scores(batch: Batch, results: Sequence[RewardResult]) -> None:
    """Fill `token_level_scores`: the score on the last response token, 0 elsewhere.

    A row whose reward failed has no score. It leaves the training: its `response_mask` becomes false, so it
    counts in no loss, no statistic and no group.
    """
    scores = torch.zeros(batch.responses.shape, dtype=torch.float32)
    failed = torch.tensor([result.score is None for result in results], dtype=torch.bool)
    found = torch.tensor([0.0 if result.score is None else result.score for result in results])
    scores[torch.arange(len(batch)), batch.response_lengths - 1] = found
    batch.token_level_scores, batch.response_mask = scores, batch.response_mask & ~failed[:, None]


def reward_metrics(results: Sequence[RewardResult]) -> Metrics:
    """`reward/error_rate`, `reward/format_rate`, and the mean of every other part that rewards report."""
    if not results:
        return {}
    metrics = {"reward/error_rate": sum(r.score is None for r in results) / len(results)}
    names = dict.fromkeys(name for r in results for name in r.parts)
    for name in names:
        values = [r.parts[name] for r in results if name in r.parts]
        metrics[f"reward/{'format_rate' if name == 'format' else name}"] = sum(values) / len(values)
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
            **{f"reward/{name}": value for name, value in result.parts.items()},
            "truncated": cut,
        }
        if result.error:
            record["error"] = result.error
        records.append(record)
    return records
