"""From responses to scores: decoding, the rewards, and what a failed reward does to a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.core.batch import Batch, RowStatus
from steepest.learner.metrics import Metrics
from steepest.rewards.api import RewardRequest, RewardResult, ScoresResponses
from steepest.trainer.experience.api import Collector, Experience, Responses
from steepest.trainer.experience.response_text import WritesTexts
from steepest.trainer.loop import Timer


@dataclass
class Scorer:
    """Decodes responses and has them scored."""

    rewards: ScoresResponses
    writer: WritesTexts
    costs: Callable[[], Metrics] = dict
    """What the rewards have cost since they were last asked."""
    text_ids: Tensor | None = None
    """The ids that the tokenizer has a text for, sorted; None: they are not counted."""
    end_ids: Tensor | None = None
    """The ids that end a response; None: they are not counted."""

    def count(self, batch: Batch) -> Metrics:
        """The share of the policy's tokens that have no text, which a reward does not see; and of the responses that
        were not cut, the share whose last token of the policy is an end token."""
        found: Metrics = {}
        tokens = batch.responses[batch.response_mask]
        if self.text_ids is not None and len(tokens):
            unknown = torch.isin(tokens, self.text_ids, invert=True)
            found["rollout/no_text_ratio"] = unknown.float().mean().item()
        ended = ((batch.last_policy_token >= 0) & ~batch.truncated).nonzero()[:, 0]
        if self.end_ids is not None and len(ended):
            last = batch.responses[ended, batch.last_policy_token[ended]]
            found["rollout/end_token_ratio"] = torch.isin(last, self.end_ids).float().mean().item()
        return found

    def texts(self, batch: Batch) -> list[str]:
        return self.writer.texts(batch)

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
                is_text=sample.is_text,
                opening=self.writer.opening(sample.token_ids),
            )
            for sample, text, length in zip(batch.samples, texts, batch.response_lengths.tolist(), strict=True)
        ]
        return self.rewards.score(requests)


@dataclass
class StepScorer:
    """Scores responses and writes the scores, and what the estimator reads in addition to them, into their batch."""

    scorer: Scorer
    shape: Callable[[Batch, list[RewardResult]], list[RewardResult]] = lambda batch, results: results
    """What the run adds to the rewards' own scores, e.g. a penalty for length."""
    fills: Sequence[Callable[[Batch, list[RewardResult]], None]] = ()
    """Writers of `Batch.extras`, called after the scores have been placed."""

    def rate(self, batch: Batch) -> Responses:
        """Score some responses of a step, and place the scores."""
        texts = self.scorer.texts(batch)
        results = self.results(batch, texts)
        place_scores(batch, results)
        for fill in self.fills:
            fill(batch, results)
        return Responses(batch, texts, results)

    def results(self, batch: Batch, texts: Sequence[str]) -> list[RewardResult]:
        """What the rewards return for responses, with what the run adds to it."""
        return self.shape(batch, self.scorer.results(batch, texts))


@dataclass
class Finished:
    """The outermost collector: statistics of all rewards, responses to a file, and rows that the run leaves out."""

    collect: Collector
    leave_out: Callable[[Batch], Metrics] = lambda batch: {}
    """Gives rows that are not to be trained their `row_status`."""
    write: Callable[[int, list[dict[str, Any]]], None] | None = None
    """Takes the step and one record a response (`trainer.rollout_data_dir`)."""
    costs: Callable[[], Metrics] = dict
    """What the rewards have cost since they were last asked."""
    timer: Callable[[], Timer] = Timer
    count: Callable[[Batch], Metrics] = lambda batch: {}
    """Statistics of the responses themselves."""

    def __call__(self, step: int) -> Experience:
        found, timed = self.collect(step), self.timer()
        with timed("reward"):
            if self.write is not None:
                rows = [sample_records(part.batch, part.texts, part.results) for part in found.responses]
                self.write(step, [row for part in rows for row in part])
            results = [result for part in found.responses for result in part.results]
            found.metrics |= reward_metrics(results) | self.count(found.batch)
            found.metrics |= self.leave_out(found.batch) | self.costs()
        timed.add(found.seconds, found.flops)
        found.seconds, found.flops = timed.seconds, timed.flops
        return found


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
    """`reward/error_rate`, `reward/timeout_rate` where a grader was stopped, `reward/format_rate`, the mean of
    every other part that rewards report, and mean, max and min of each reward of a weighted sum, before its weight."""
    if not results:
        return {}
    metrics = {"reward/error_rate": sum(r.score is None for r in results) / len(results)}
    if any(r.timed_out for r in results):
        metrics["reward/timeout_rate"] = sum(r.timed_out for r in results) / len(results)
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
