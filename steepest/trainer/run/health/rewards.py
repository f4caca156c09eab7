"""Whether the rewards teach anything, and what they teach."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from steepest.trainer.run.health.checks import Check, Seen


def same_score(seen: Seen) -> float | None:
    """The score of the step's responses where all have the same."""
    high, low = seen.number("critic/score/max"), seen.number("critic/score/min")
    return high if high is not None and high == low else None


@dataclass
class CutAnswers(Check):
    """Most responses reach the length limit."""

    name = "cut_answers"
    is_problem = False
    limit: float = 0.5
    steps: int = 3

    def __call__(self, seen: Seen) -> str | None:
        value = seen.number("response_length/clip_ratio") or 0.0
        if not self.in_a_row(value > self.limit, self.steps):
            return None
        return (
            f"{value:.0%} of the responses were cut at data.max_response_length and never ended, in {self.steps} steps "
            "in a row more than half: the reward sees unfinished answers. Raise data.max_response_length"
        )


@dataclass
class EqualGroups(Check):
    """Within every prompt all responses have the same score. Where all scores are the same, `ConstantReward` says
    more."""

    name = "equal_groups"
    steps: int = 5

    def __call__(self, seen: Seen) -> str | None:
        equal = seen.number("group/equal_ratio") == 1.0 and same_score(seen) is None
        if not self.in_a_row(equal, self.steps):
            return None
        return (
            f"in {self.steps} steps in a row all responses to each prompt had the same score: an estimator that "
            "compares the responses of a prompt learns nothing. Raise actor_rollout_ref.rollout.n or "
            "actor_rollout_ref.rollout.temperature, or set algorithm.filter_groups.enable=True"
        )


@dataclass
class ConstantReward(Check):
    """All responses have the same score."""

    name = "constant_reward"
    steps: int = 5

    def __call__(self, seen: Seen) -> str | None:
        score = same_score(seen)
        if not self.in_a_row(score is not None, self.steps):
            return None
        return (
            f"in {self.steps} steps in a row every response of a step had the same score (now {score:.3g}): there is "
            "nothing to learn from. Read some answers (trainer.rollout_data_dir=FOLDER), then change the reward "
            "(reward.functions, custom_reward_function.path) or the rows (data.train_files)"
        )


@dataclass
class RewardErrors(Check):
    """Rewards that failed. How many may fail is limited elsewhere (`reward.max_error_rate`)."""

    name = "reward_errors"
    is_problem = False

    def __call__(self, seen: Seen) -> str | None:
        value = seen.number("reward/error_rate") or 0.0
        if value <= 0.0:
            return None
        return (
            f"{value:.1%} of the rewards failed, and those responses were left out of the step. "
            "trainer.rollout_data_dir=FOLDER writes each error next to its response; then correct the function of "
            "custom_reward_function.path or reward.functions"
        )


@dataclass
class LengthHacking(Check):
    """The score rises because responses become longer: longer ones score higher within a prompt, and over the last
    steps length and score grew together."""

    name = "length_hacking"
    limit: float = 0.5
    """Least correlation, of score with length."""
    growth: float = 1.2
    """Least growth of the mean length, from the first half of the window to the second."""
    steps: int = 10

    def __call__(self, seen: Seen) -> str | None:
        score, length = seen.number("critic/score/mean"), seen.number("response_length/mean")
        if score is None or length is None:
            return None
        within = self.last("within", seen.number("response_length/score_corr") or 0.0, self.steps)
        scores, lengths = self.last("score", score, self.steps), self.last("length", length, self.steps)
        if len(scores) < self.steps:
            return None
        half = self.steps // 2
        growth = fmean(lengths[half:]) / fmean(lengths[:half])
        over = correlation(scores, lengths)
        if fmean(within) < self.limit or over < self.limit or growth < self.growth:
            return None
        return (
            f"the score rises with the length of the responses (correlation {fmean(within):.2f} within a step, "
            f"{over:.2f} over {self.steps} steps, in which they became {growth:.2g} times as long): the reward may pay "
            "for length. Read some answers (trainer.rollout_data_dir=FOLDER); set reward.overlong_buffer.enable=True, "
            "or change the reward (reward.functions, custom_reward_function.path)"
        )


@dataclass
class Validation(Check):
    """The validation falls while the score of the training rises. A validation stands for the `steps` steps before
    it."""

    name = "validation"
    drop: float = 0.1
    """Least drop below the best validation, as a share of it; the last two are as low."""
    steps: int = 10

    def __call__(self, seen: Seen) -> str | None:
        scores = self.kept.get("score", [])
        known, means = self.kept.setdefault("step", []), self.kept.setdefault("mean", [])
        newest = max((step for step in seen.validations if step < seen.step), default=0)
        if newest > 0 and scores and newest not in known:  # first seen in the step after it
            known.append(float(newest))
            means.append(fmean(scores))
        score = seen.number("critic/score/mean")
        if score is not None:
            self.last("score", score, self.steps)
        return self._compare(seen, {int(step): mean for step, mean in zip(known, means, strict=True)})

    def _compare(self, seen: Seen, means: dict[int, float]) -> str | None:
        there = [step for step in sorted(means) if step in seen.validations]
        if len(there) < 3:
            return None
        *earlier, before, newest = there
        best = max(earlier, key=lambda step: seen.validations[step])
        high, low = seen.validations[best], max(seen.validations[before], seen.validations[newest])
        if high - low <= self.drop * abs(high) or means[newest] <= means[best]:
            return None
        return (
            f"the validation fell from {high:.3g} (step {best}) to {seen.validations[newest]:.3g} (step {newest}) "
            f"while the score of the training rose from {means[best]:.3g} to {means[newest]:.3g}: the policy learns "
            f"what only the training pays for. Take the checkpoint of step {best}; lower trainer.total_training_steps "
            "or actor_rollout_ref.actor.optim.lr, or add rows to data.train_files"
        )


def correlation(x: list[float], y: list[float]) -> float:
    """Pearson's; 0 where one of them does not vary."""
    mx, my = fmean(x), fmean(y)
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    xx, yy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else 0.0
