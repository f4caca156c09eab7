"""Whether the reward accepts the ground truth as the answer, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from steepest.checks import Check, ok, problem, warning
from steepest.data.prompts import Prompt
from steepest.rewards.api import RewardRequest, ScoresResponses, entry_for
from steepest.trainer.jobs.ppo import Job

REMEDY = "correct the reward (custom_reward_function.path, reward.functions), or the data_source of the rows, which chooses it"
MOST = 16
"""Rows that are looked at."""
_FORMS = ("{}", "#### {}", "\\boxed{{{}}}", "The answer is {}.", "<answer>{}</answer>")


def grader_checks(job: Job) -> list[Check]:
    """Score the ground truth of some rows as their answer, in several forms, and answers that are wrong."""
    rewards = job.scorer.rewards
    if getattr(rewards, "others", ()):
        return [ok("ground truth", "not scored as an answer: a model or a judge takes part in the reward")]
    rows = [*job.data.train[: MOST // 2], *job.data.val[: MOST // 2]]
    rows = [row for row in rows if plain(row.ground_truth) is not None]
    if not rows:
        return [ok("ground truth", "not scored as an answer: it is no plain text or number")]
    return [agreement(rewards, rows)]


def plain(truth: Any) -> str | None:
    """A ground truth as a text that an answer may state; the first of several."""
    if isinstance(truth, (list, tuple)) and truth:
        return plain(truth[0])
    return str(truth) if isinstance(truth, (str, int, float)) and str(truth) else None


def answers(row: Prompt) -> Iterator[str]:
    """Forms in which an answer may state the row's ground truth."""
    truth = plain(row.ground_truth)
    yield from (form.format(truth) for form in _FORMS)
    entry = entry_for(row.data_source)
    if entry is not None and "plain_answers" in entry.facts:
        yield from entry.facts["plain_answers"](row.ground_truth)
    if isinstance(solution := row.extra_info.get("answer"), str):  # GSM8K's worked solution
        yield solution


def agreement(rewards: ScoresResponses, rows: Sequence[Prompt]) -> Check:
    """Compare the best score of a row's right answers with that of an answer without content."""
    right = [(row, text) for row in rows for text in answers(row)]
    wrong = [(row, text) for row in rows for text in ("", "I do not know.")]
    results = rewards.score([_request(row, text) for row, text in (*right, *wrong)])
    failed = [result.error for result in results if result.score is None]
    if failed:
        return problem("ground truth", f"{len(failed)} of {len(results)} rewards failed. First: {failed[0]}", REMEDY)
    best: dict[str, float] = {}
    empty: dict[str, float] = {}
    for target, pairs, found in (
        (best, right, results[: len(right)]),
        (empty, wrong, results[len(right) :]),
    ):
        for (row, _), result in zip(pairs, found, strict=True):
            target[row.uid] = max(target.get(row.uid, -float("inf")), result.score or 0.0)
    refused = [row for row in rows if best[row.uid] <= empty[row.uid]]
    if not refused:
        return ok("ground truth", f"scores above an empty answer in each of {len(rows)} rows")
    row = refused[0]
    text = (
        f"in {len(refused)} of {len(rows)} rows the ground truth as the answer scores no more than an empty answer; "
        f"row {row.uid}: {plain(row.ground_truth)!r} scores {best[row.uid]:g}, an empty answer {empty[row.uid]:g}"
    )
    if len(refused) == len(rows):
        return problem("ground truth", text, REMEDY)
    return warning("ground truth", text, REMEDY)


def _request(row: Prompt, text: str) -> RewardRequest:
    return RewardRequest(
        sample_id=row.uid,
        data_source=row.data_source,
        solution=text,
        ground_truth=row.ground_truth,
        extra_info=row.extra_info,
        messages=row.messages,
        is_text=row.is_text,
    )
