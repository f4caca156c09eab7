"""A ground truth is read as its plainest answer, or refused before the run: none scores every response 0."""

from __future__ import annotations

import pytest

from steepest.data.prompts import Prompt
from steepest.errors import DataError
from steepest.rewards.api import REWARDS
from steepest.rewards.check import CORPORA, corpus_of
from steepest.rewards.weighted import ground_truth_problem
from steepest.trainer.jobs.ppo import check_ground_truths

READ = [
    ("gsm8k", "#### 180", "#### 180"), ("gsm8k", "1,000", "#### 1000"), ("gsm8k", "$72", "#### 72"),
    ("gsm8k", 72.0, "#### 72"), ("gsm8k", " 72.\n", "#### 72"), ("gsm8k", "48 + 24 = 72\n#### 72", "#### 72"),
    ("gsm8k", "-1,234.50", "#### -1234.50"),
    ("math", "#### 180", "\\boxed{180}"), ("math", "Answer: 180", "\\boxed{180}"), ("math", 180, "\\boxed{180}"),
    ("math", "so it is $\\boxed{\\frac{1}{2}}$", "\\boxed{0.5}"),
    ("multiple_choice", "B)", "B"), ("multiple_choice", "(B)", "B"), ("multiple_choice", "b", "B"),
    ("multiple_choice", "B. Paris", "B"), ("multiple_choice", "Answer: B", "B"), ("multiple_choice", "\\boxed{B}", "B"),
    ("multiple_choice", "Option B", "B"), ("multiple_choice", "#### B", "B"),
    ("numeric", "#### 180", "180"), ("numeric", "Answer: 180 km", "180"), ("numeric", "1,000", "1000"),
    ("numeric", 2.5, "2.5"),
    ("numeric", "two thousand and five hundred and forty", "2540"),
    ("exact", "Paris.", "Paris"), ("exact", "#### Step 2", "Step 2"), ("exact", "The answer is on.", "on"),
    ("exact", "Answer: Paris", "Answer: Paris"),
   
    ("exact", ["Paris", "Lyon"], "Lyon"), ("exact", "Dr. No. A film", "Dr. No. A film"), ("exact", 7, "7"),
]  # fmt: skip
REFUSED = [
    ("gsm8k", "N/A"), ("gsm8k", "72 dollars"), ("gsm8k", "12, 13"), ("gsm8k", float("nan")), ("gsm8k", None),
    ("math", "N/A"), ("math", "The proof follows by induction on the number of sides."), ("math", "\\frac{1}{2"),
    ("math", "?"), ("math", float("inf")),
    ("multiple_choice", "1"), ("multiple_choice", 1), ("multiple_choice", "Paris"), ("multiple_choice", "A or B"),
    ("multiple_choice", "A dog"), ("multiple_choice", "not B"),
    ("numeric", "N/A"), ("numeric", "There are 12 cats and 3 dogs in the house"), ("numeric", "1 or 2"),
    ("numeric", "x72"),
    ("exact", "."), ("exact", "<think>"), ("exact", ["...", "!"]), ("exact", float("nan")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "truth", "answer"), READ)
def test_a_ground_truth_is_read(name, truth, answer):
    assert ground_truth_problem(name, truth) is None
    grade = REWARDS.get(name).value
    assert grade("", answer, truth)["score"] == 1.0 and grade("", "", truth)["score"] == 0.0


@pytest.mark.parametrize(("name", "truth"), REFUSED)
def test_a_ground_truth_that_no_response_can_equal_is_refused(name, truth):
    problem = ground_truth_problem(name, truth)
    assert problem is not None and problem.startswith("ground_truth is")


def test_a_number_as_the_choice_is_refused_with_the_reason():
    problem = ground_truth_problem("multiple_choice", 1)
    assert problem is not None and problem.endswith("A number does not say whether 0 or 1 is A.")


@pytest.mark.parametrize("name", CORPORA)
def test_every_ground_truth_of_the_corpora_can_be_met(name):
    for truth in {case.truth: None for case in corpus_of(name)}:
        assert ground_truth_problem(name, truth) is None, truth


def test_the_row_is_named_and_equal_ground_truths_are_checked_once():
    rows = [Prompt(f"rows:{place}", [], "exact", truth, {}, ()) for place, truth in enumerate(["a"] * 1000 + ["..."])]
    with pytest.raises(DataError, match=r"row rows:1000 \(file:row, from 0\), column reward_model: ground_truth is"):
        check_ground_truths(rows)
