"""Answers that look right and are not, and right ones in the formats of present models. By all graders."""

from __future__ import annotations

import functools

import pytest

from steepest.rewards.answers import statements, visible, without_open_box
from steepest.rewards.graders.exact import exact
from steepest.rewards.graders.gsm8k import gsm8k
from steepest.rewards.graders.math import math
from steepest.rewards.graders.multiple_choice import chosen
from steepest.rewards.graders.numeric import numeric

FLEXIBLE = functools.partial(gsm8k, mode="flexible")
READERS = [FLEXIBLE, numeric, math]


def right(grader, answer: str, truth: object) -> float:
    return grader("any", answer, truth)["acc"]


NOT_72 = [
    "#### not 72", "#### less than 72", "#### > 72", "The answer cannot be 72.", "The answer is unlikely to be 72",
    "#### no es 72", "#### nicht 72", "Ответ: не 72", "답은 72가 아닙니다", "答えは72ではない", "#### minus 72",
    "#### 72, 73", "\\boxed{(72, 73)}", "\\boxed{72x}", "\\boxed{x^{72}}", "\\boxed{\\sqrt{72}}", "\\boxed{72\\sqrt2}",
    "\\boxed{72!}", "\\boxed{\\geq 72}", "#### 72 hours 30 minutes", "#### 72 ft 6 in", "#### 72 and a half",
    "#### 72½", "#### 72 crore", "#### 72 thousand", "#### 72nd", "#### 72 mod 5", "F-72", "\\boxed{72",
    "<think>The answer is 72. Wait", "<think>\\boxed{72}</think>", "If the answer is 72, step 1 is wrong.",
    "Is the answer 72?", "The wrong answer is 72", "The answer is 72 times 3",
]  # fmt: skip


@pytest.mark.parametrize("grader", READERS)
@pytest.mark.parametrize("answer", NOT_72)
def test_a_text_with_the_number_in_it_that_does_not_state_it(grader, answer):
    assert right(grader, answer, "72") == 0.0


STATED_72 = [
    "The answer is:\n\\[\n72\n\\]", "The answer is\n$$\n72\n$$", "Answer -> 72", "Answer → 72", '{"answer": 72}',
    "{'answer': '72', 'steps': 4}", "#### 72<|im_end|>", "#### 72</s>", "| **Answer** | **72** |", "#### 72!",
    "<answer>\n**72** apples\n</answer>", "The answer is 72, since 80 - 8 = 72.", "Answer: 72 (rounded from 71.96)",
    "Die Antwort lautet 72.", "La risposta è: 72", "Đáp án: 72", "Svar: 72", "Απάντηση: 72", "תשובה: 72", "উত্তর: ৭২",
    "#### 72₽", "#### ₫72", "#### Rp72", "Answer: 72 minutes (1 hour and 12 minutes)",
]  # fmt: skip


@pytest.mark.parametrize("grader", READERS)
@pytest.mark.parametrize("answer", STATED_72)
def test_formats_of_present_models(grader, answer):
    assert right(grader, answer, "72") == 1.0


def test_scales_and_signs_are_read_by_all():
    for grader in READERS:
        for text, truth in [("1.5 million", "1500000"), ("5 lakh", "500000"), ("2 dozen", "24"), ("minus 5", "-5")]:
            assert right(grader, f"#### {text}", truth) == 1.0, (grader, text)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("\\lfloor 3.7\\rfloor", "3", 1.0), ("\\arctan 1", "\\frac\\pi4", 1.0), ("\\angle ABC = 3^\\circ", "3", 1.0),
        ("0.(27)", "\\frac{3}{11}", 1.0), ("\\mathbb{R}", "(-\\infty,\\infty)", 1.0), ("{\\large 3}", "3", 1.0),
        ("\\geq 5", "x\\ge5", 1.0), ("\\leq 5", "x\\ge5", 0.0), ("\\geq 5", "5", 0.0), ("3;", "3", 1.0),
        ("\\text{all real numbers}", "\\mathbb{R}", 1.0), ("\\text{no real numbers}", "\\mathbb{R}", 0.0),
        ("2**3", "8", 1.0), ("**8**", "8", 1.0), ("5 \\text{ million}", "5", 0.0),
    ],
)  # fmt: skip
def test_mathematics(one, other, equal):
    assert right(math, f"\\boxed{{{one}}}", other) == equal


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("D is the one.", "D"), ("Ans: B", "B"), ("Option: B", "B"), ("The answer is 'B'.", "B"),
        ("The answer is <b>B</b>", "B"), ("【B】", "B"), ("La respuesta correcta es B.", "B"),
        ("Statement B is correct", "B"), ("Vitamin C is best", None), ("Plan C is the best", None),
        ("A. Paris\nB. Rome", None), ("If the answer is B, then 0 = 1.", None), ("The wrong answer is B", None),
        ("The wrong option is C.", None),
    ],
)  # fmt: skip
def test_choices(answer, letter):
    assert chosen(answer) == letter


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("$20", "20", 0.0), ("20", "$20", 0.0), ("$20$", "20", 1.0), ("£ 20", "£20", 1.0), ("20 €", "20€", 1.0),
        (".5", "5", 0.0), ("NET", ".NET", 0.0), ("!a", "a", 0.0), ("...Rome...", "Rome", 1.0), ("٧٢", "72", 1.0),
        ("\\frac{1}{2}", "1/2", 1.0), ("Rome<|im_end|>", "Rome", 1.0),
    ],
)  # fmt: skip
def test_texts(answer, truth, equal):
    assert right(exact, answer, truth) == right(exact, f"Answer: {answer}", truth) == equal


def test_what_was_cut_or_supposed_states_nothing():
    assert without_open_box("a \\boxed{7") == "a " and without_open_box("\\boxed{7}") == "\\boxed{7}"
    assert [one.text for one in statements("If the answer is 5, no. The answer is 6")] == ["6"]
    assert visible("x<|eot_id|>y") == "x\ny"
