"""Validation counts every prompt once, the last partial batch included, and says what it counted."""

from __future__ import annotations

import pytest

from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer.experience.scoring import Scorer
from steepest.trainer.run.validation import Evaluator, interval
from tests.support.fake_parts import EchoEngine, FakePool, NumberTokenizer, exact, prompt


def evaluator(function=exact, *, num: int = 7, size: int | None = 3, n: int = 1, finish: str = "stop") -> Evaluator:
    return Evaluator(
        engine=EchoEngine(finish),
        prompts=[prompt(number, source="even" if number % 2 == 0 else "odd") for number in range(num)],
        sampling=SamplingParams(max_tokens=1, temperature=0.0, n=n),
        scorer=Scorer(FakePool(function), NumberTokenizer()),
        batch_size=size,
        pad_id=0,
    )


@pytest.mark.parametrize("size", [None, 1, 3, 7, 100])
def test_every_prompt_is_scored_once(size):
    found = evaluator(size=size)()
    assert [sample["id"] for sample in found.samples] == [f"rows:{number}" for number in range(7)]
    assert found.metrics["val-aux/num_prompts"] == 7
    assert found.score == 1.0


def test_accuracy_is_told_for_each_source():
    found = evaluator(lambda r: RewardResult(float(r.ground_truth in "024"), {"format": 0.5}))()
    assert found.metrics["val-core/even/acc/mean@1"] == 0.75  # 0, 2, 4 of 0, 2, 4, 6
    assert found.metrics["val-core/odd/acc/mean@1"] == 0.0
    assert found.metrics["val-aux/even/format_rate"] == 0.5
    assert abs(found.score - 3 / 7) < 1e-9


def test_several_samples_give_mean_and_best():
    found = evaluator(n=4)()  # only the first of four answers is right
    assert found.metrics["val-core/odd/acc/mean@4"] == 0.25
    assert found.metrics["val-core/odd/acc/best@4"] == 1.0
    assert len(found.samples) == 28


def test_a_failed_reward_counts_as_wrong_and_is_told():
    found = evaluator(lambda r: RewardResult(None, {}, "boom") if r.ground_truth == "3" else RewardResult(1.0))()
    assert abs(found.score - 6 / 7) < 1e-9
    assert abs(found.metrics["val-aux/error_rate"] - 1 / 7) < 1e-9
    assert [s["error"] for s in found.samples if "error" in s] == ["boom"]


def test_acc_wins_over_a_shaped_score():
    found = evaluator(lambda r: RewardResult(0.3, {"acc": 1.0}))()
    assert found.score == 1.0


def test_cut_responses_are_counted():
    assert evaluator(finish="length")().metrics["val-aux/response_length/clip_ratio"] == 1.0
    assert evaluator()().metrics["val-aux/response_length/clip_ratio"] == 0.0


def interval_of(*groups: list[float]) -> tuple[float, float]:
    """The interval of prompts with the accuracies of their answers."""
    records = [{"id": str(number)} for number, group in enumerate(groups) for _ in group]
    return interval(records, [RewardResult(value) for group in groups for value in group])


def test_the_interval_of_right_and_wrong_answers_is_that_of_wilson():
    # 3 of 4: p = 0.75, z^2 / n = 0.96036, (0.75 + 0.48018 -+ sqrt(0.96036 * 0.1875 + 0.23057)) / 1.96036
    assert interval_of([1.0], [1.0], [0.0], [1.0]) == pytest.approx((0.300642, 0.954413), abs=1e-5)
    # none of 8: 0 and z^2 / n / (1 + z^2 / n), z^2 / n = 0.48018
    assert interval_of(*[[0.0]] * 8) == pytest.approx((0.0, 0.324408), abs=1e-5)
    found = evaluator(lambda r: RewardResult(float(r.ground_truth == "0")))()
    assert (found.metrics["val-aux/accuracy_low"], found.metrics["val-aux/accuracy_high"]) == interval_of(
        [1.0], *[[0.0]] * 6
    )


def test_answers_to_one_prompt_do_not_count_as_prompts():
    # two prompts, all answers of one right and of the other wrong: two observations, not twenty
    assert interval_of([1.0] * 10, [0.0] * 10) == pytest.approx(interval_of([1.0], [0.0]))
    # prompts that do not differ: each answer is one
    assert interval_of([1.0, 0.0], [0.0, 1.0]) == pytest.approx(interval_of([1.0], [0.0], [0.0], [1.0]))


def test_the_interval_of_other_scores_is_normal():
    # mean 1, variance 1, 2 prompts
    assert interval_of([0.0], [2.0]) == pytest.approx((1 - 1.959964 * 0.5**0.5, 1 + 1.959964 * 0.5**0.5))
