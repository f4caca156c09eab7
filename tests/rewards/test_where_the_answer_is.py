"""Which part of a response is its answer: numbers that touch letters, remarks and headings. By all graders."""
# ruff: noqa: RUF001

from __future__ import annotations

import functools
import re

import pytest

from steepest.rewards.graders.exact import exact
from steepest.rewards.graders.gsm8k import gsm8k
from steepest.rewards.graders.math import math
from steepest.rewards.graders.multiple_choice import chosen, multiple_choice
from steepest.rewards.graders.numeric import numeric


def right(grader, answer: str, truth: object) -> float:
    return grader("any", answer, truth)["acc"]


FLEXIBLE = functools.partial(gsm8k, mode="flexible")
TOUCHING = [
    "答案是72。", "\\boxed{共72}", "#### 共72", "Ответ72", "#### USD72", "共72元", "#### ７２", "คำตอบคือ72บาท",
    "ចម្លើយគឺ72", "#### ٧٢", "उत्तर: ७२", "\\boxed{72元}", "答えは72です。", "정답은 72입니다.", "#### ₹72",
    "#### Rs.72", "#### HK$72", "＃＃＃＃ 72", "4月48个，5月24个，答案：72个",
]  # fmt: skip


@pytest.mark.parametrize("grader", [FLEXIBLE, numeric, math])
@pytest.mark.parametrize("answer", TOUCHING)
def test_a_number_may_touch_a_letter_of_any_script(grader, answer):
    assert right(grader, answer, "72") == 1.0
    assert right(grader, answer, "2") == right(grader, answer, "7") == 0.0


@pytest.mark.parametrize(
    "answer", ["GPT4", "H2O", "x2", "step3", "iPhone72", "x_{72}", "v7.2", "Т34", "第72题", "#### R2D2"]
)
def test_a_number_in_a_name_is_none(answer):
    digits = re.sub("[^0-9]", "", answer)
    assert [right(grader, answer, truth) for grader in (FLEXIBLE, numeric) for truth in (digits, digits[-1])] == [
        0.0
    ] * 4


def test_full_width_numerals():
    for grader in (FLEXIBLE, numeric):
        assert right(grader, "答案是４２．５", "42.5") == right(grader, "#### １，２３４", "1234") == 1.0
        assert right(grader, "答案是４２．５", "425") == right(grader, "共12，34个", "1234") == 0.0
        assert right(grader, "答案是7.2万元", "72000") == 1.0 and right(grader, "答案是7.2万元", "7.2") == 0.0


REMARKS = [
    "The answer is verified.", "#### Explanation", "#### Check 3 times", "The answer is 100% correct.",
    "I am 99% sure.", "#### Step 2: look at it again", "#### 1. Explanation",
    "Let me know if the answer is unclear.", "#### Why?", "**Confidence:** 95%",
    "#### Explanation of the 2 steps\nIt follows.", "The answer is explained above in 2 ways.", "#### 验证",
    "答案是正确的。",
]  # fmt: skip


@pytest.mark.parametrize("remark", REMARKS)
@pytest.mark.parametrize("answer", ["\\boxed{%s}", "Answer: %s", "#### %s", "<answer>%s</answer>", "The answer is %s."])
def test_a_text_about_the_answer_is_no_answer(answer, remark):
    for grader, truth in ((FLEXIBLE, "73"), (numeric, "73"), (math, "73"), (multiple_choice, "B"), (exact, "Lyon")):
        assert right(grader, f"{answer % truth}\n{remark}", truth) == 1.0, grader


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("#### Step 1: halve\n48 / 2\n#### Step 2: add\n5", "5"),
        ("#### 1. April\n48\n#### 2. May\n24\n\n5", "5"),
        ("### Calculation for 2 months\nIt is long.\n\n### Final answer\n5\n\nI hope this helps 2 people.", "5"),
        ("#### Answer\n5", "5"),
        ("The answer is correct: 5", "5"),
        ("The final answer to question 3 is therefore 5.", "5"),
    ],
)
def test_a_heading_is_no_answer(answer, truth):
    assert [right(grader, answer, truth) for grader in (FLEXIBLE, numeric, math, exact)] == [1.0] * 4
    assert right(numeric, answer, "2") == right(FLEXIBLE, answer, "3") == 0.0


def test_a_heading_chooses_nothing_and_hides_no_choice():
    assert chosen("#### Step 1: read\n#### Step 2: exclude A\nTherefore, I choose B.") == "B"
    assert chosen("The answer is B because A is wrong.\n#### Appendix A") == "B"
    assert chosen("The answer is verified.") is None and chosen("#### Explanation") is None


def test_what_looks_like_a_remark_is_an_answer_when_it_is_all_there_is():
    assert right(exact, "The answer is verified.", "verified") == right(exact, "#### Step 2", "Step 2") == 1.0
    assert right(exact, "\\boxed{open}\nThe answer is verified.", "verified") == 0.0
    for truth in ("100", "100%", "1"):
        assert right(numeric, "The answer is 100% correct.", truth) == 0.0
