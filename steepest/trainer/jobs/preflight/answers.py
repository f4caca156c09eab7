"""Sampled answers: their ends, their scores, their groups."""

from __future__ import annotations

from steepest.checks import Check, ok, problem, warning
from steepest.trainer.experience.api import Experience
from steepest.trainer.jobs.preflight.report import Answer

LIMIT = "data.max_response_length"


def shown_answers(experience: Experience, most: int) -> list[Answer]:
    """The first answers."""
    part = experience.responses[0]
    rows = zip(
        part.batch.samples,
        part.texts,
        part.results,
        part.batch.response_lengths.tolist(),
        part.batch.truncated.tolist(),
        strict=True,
    )
    found = [
        Answer(sample.uid, text, result.score, str(sample.ground_truth), length, cut, result.error)
        for sample, text, result, length, cut in rows
    ]
    return found[:most]


def answer_checks(experience: Experience, n: int) -> list[Check]:
    """Check all answers that were sampled, `n` for each prompt."""
    return [limit(experience), rewards(experience), groups(experience, n)]


def limit(experience: Experience) -> Check:
    """How many reach the length limit."""
    batch = experience.batch
    share, longest = batch.truncated.float().mean().item(), int(batch.response_lengths.max())
    text = f"{share:.0%} of {len(batch)} answers were cut at {LIMIT}; the longest has {longest} tokens"
    if share >= 0.9:
        return problem("limit", f"{text}: the reward sees no finished answer", f"raise {LIMIT}")
    return warning("limit", text, f"raise {LIMIT}") if share > 0.25 else ok("limit", text)


def rewards(experience: Experience) -> Check:
    """Whether the rewards work and differ."""
    results = [result for part in experience.responses for result in part.results]
    failed = [result.error for result in results if result.score is None]
    if failed:
        text = f"{len(failed)} of {len(results)} rewards failed. First: {failed[0]}"
        return problem("scores", text, "correct the function of custom_reward_function.path or reward.functions")
    scores = [result.score for result in results if result.score is not None]
    low, high = min(scores), max(scores)
    text = f"{low:g} to {high:g}, mean {sum(scores) / len(scores):.3g}, of {len(scores)} answers"
    if low < high:
        return ok("scores", text)
    return warning(
        "scores",
        f"all {len(scores)} answers score {low:g}: steps of such answers teach nothing",
        "read the answers above; try easier rows (data.train_files), a reward that also pays for parts "
        "(reward.functions), or a model that can answer at times (actor_rollout_ref.model.path)",
    )


def groups(experience: Experience, n: int) -> Check:
    """Whether each prompt has its `n` answers, and how many prompts have answers that differ in score."""
    batch = experience.batch
    sizes = batch.group_ids.bincount()
    if n == 1:
        return ok("groups", "one answer for each prompt (actor_rollout_ref.rollout.n=1)")
    if bool((sizes[sizes > 0] != n).any()):
        text = f"prompts have {sorted(set(sizes[sizes > 0].tolist()))} answers"
        return problem("groups", text, f"actor_rollout_ref.rollout.n={n} asks for the same number each")
    assert batch.token_level_scores is not None
    scores = batch.token_level_scores.sum(dim=1).view(-1, n)
    equal = int((scores == scores[:, :1]).all(dim=1).sum())
    return ok("groups", f"{n} answers for each prompt; in {equal} of {len(scores)} prompts all score the same")
