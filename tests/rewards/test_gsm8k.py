"""The scorer of GSM8K: the strict rule letter by letter, the flexible rule by value, and how often each is wrong."""

from __future__ import annotations

import json
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.rewards.api import REWARDS
from steepest.rewards.graders.gsm8k import MODES, flexible_answer, gsm8k, strict_answer
from tests.support.work import work_of_at_most

HERE = Path(__file__).parent


def score(answer: str, truth: str = "72", mode: str = "strict") -> float:
    return gsm8k("openai/gsm8k", answer, truth, mode=mode)["score"]


# The table of the reference's scorer, as measured there. (answer, truth, score, format)
REFERENCE = [
    ("#### 72", "72", 1.0, 1.0),
    ("#### 72 dollars", "72", 1.0, 1.0),
    ("#### 5 and then #### 72", "72", 1.0, 1.0),
    ("#### 1,234", "1234", 1.0, 1.0),
    ("####72", "72", 0.0, 0.0),
    ("####  72", "72", 0.0, 0.0),
    ("#### $72", "72", 0.0, 0.0),
    ("#### **72**", "72", 0.0, 0.0),
    ("#### \\boxed{72}", "72", 0.0, 0.0),
    ("#### 72.", "72", 0.0, 1.0),
    ("#### 72.0", "72", 0.0, 1.0),
    ("#### 0072", "72", 0.0, 1.0),
    ("#### 72" + "x" * 301, "72", 0.0, 0.0),
    ("The answer is 72", "72", 0.0, 0.0),
    # at the edges of the same rule
    ("#### 72" + "x" * 293, "72", 1.0, 1.0),  # 7 + 293 = 300 characters
    ("#### 72" + "x" * 294, "72", 0.0, 0.0),  # the first # is cut off
    ("#### 72 and then #### 5", "72", 0.0, 1.0),
    ("#### -5", "-5", 1.0, 1.0),
    ("#### 72,", "72", 1.0, 1.0),
    ("####\n72", "72", 0.0, 0.0),
    ("##### 72", "72", 1.0, 1.0),
    ("#### 72", "72.0", 0.0, 1.0),
    ("", "72", 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "truth", "right", "form"), REFERENCE)
def test_strict_is_the_reference_rule(answer, truth, right, form):
    assert gsm8k("openai/gsm8k", answer, truth) == {"score": right, "acc": right, "format": form}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("#### 72.", 72),
        ("#### $1,234.50", Fraction("1234.5")),
        ("#### **72**", 72),
        ("#### \\boxed{72}", 72),
        ("####72", 72),
        ("####\n\n72 clips", 72),
        ("#### 48 + 24 = 72 clips", 72),
        ("#### 24 in May\n#### 72 in all", 72),
        ("#### 72\n#### Step 2: check", 72),
        ("#### 72\n5 apples", 72),
        ("#### no number\n5 apples, 6 pears", 6),
        ("so \\boxed{72}, 2 months", 72),
        ("\\boxed{7} \\boxed{x}", 7),
        ("5 apples, 6 pears.", 6),
        ("#### \\frac{3}{4}", Fraction(3, 4)),
        ("#### 5/0", None),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("it is 12-5", None),
        ("#### 6 * 12", None),
        ("#### 70-72", None),
        ("#### 2.5 million", 2_500_000),
        ("#### 3 dozen", 36),
        ("#### 3 dozens", 36),
        ("#### 5kg", 5),
        ("#### 1.5e3", 1500),
        ("#### " + "7" * 61, None),
        ("#### " + "7" * 60, int("7" * 60)),
        ("none", None),
        ("", None),
    ],
)
def test_flexible_reads_the_value(answer, value):
    assert flexible_answer(answer) == value


def test_flexible_reads_all_of_the_text_and_keeps_the_strict_format():
    long = "#### 72." + " and so on" * 100
    assert gsm8k("openai/gsm8k", long, "72", mode="flexible") == {"score": 1.0, "acc": 1.0, "format": 0.0}
    assert gsm8k("openai/gsm8k", "#### 72.", "72", mode="flexible") == {"score": 1.0, "acc": 1.0, "format": 1.0}
    assert gsm8k("openai/gsm8k", "#### 73", "72", mode="flexible") == {"score": 0.0, "acc": 0.0, "format": 1.0}


@pytest.mark.parametrize("truth", ["1,23", "72 dollars", "seventy-two", "7" + "\u0662", "#### 72 of 80", "N/A"])
def test_a_ground_truth_that_nothing_can_equal_is_an_error_and_not_a_zero(truth):
    with pytest.raises(ValueError, match="expected a plain number"):
        score("#### 72", truth)


def test_ground_truth_types():
    assert gsm8k("openai/gsm8k", "#### 72", 72)["score"] == gsm8k("openai/gsm8k", "#### 72", 72.0)["score"] == 1.0
    for truth in (True, None, ["72"]):
        with pytest.raises(TypeError, match="ground_truth is"):
            gsm8k("openai/gsm8k", "#### 72", truth)
    for truth in ("", float("nan")):
        with pytest.raises(ValueError, match="ground_truth is"):
            gsm8k("openai/gsm8k", "#### 72", truth)


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match=re.escape("mode='lax': no such mode. Allowed: strict, flexible.")):
        score("#### 72", mode="lax")


def test_both_sources_share_the_scorer():
    assert REWARDS.get("openai/gsm8k").value is REWARDS.get("steepest/arithmetic").value is gsm8k
    assert REWARDS.get("openai/gsm8k").facts["modes"] == MODES == ("strict", "flexible")


FRAGMENTS = st.lists(
    st.one_of(
        st.sampled_from(
            ["#### ", "####", "\\boxed{", "}", "{", "\\frac{", "$", "**", "=", "\n", " ", "/", "-", ",", "."]
        ),
        st.from_regex(r"[0-9]{1,6}", fullmatch=True),
        st.text(max_size=4),
    ),
    max_size=30,
).map("".join)


@given(FRAGMENTS, st.integers(-1000, 1000), st.sampled_from(MODES))
@settings(max_examples=150, deadline=None)
def test_no_response_raises_and_scores_are_zero_or_one(answer, truth, mode):
    result = gsm8k("openai/gsm8k", answer, str(truth), mode=mode)
    assert set(result) == {"score", "acc", "format"} and set(result.values()) <= {0.0, 1.0}
    assert result["format"] == float(strict_answer(answer) is not None)


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["#### {:d}", "#### {:,d}.", "#### ${:,d}.00", "So it is **{:,d}**!"])
)
@settings(max_examples=60, deadline=None)
def test_flexible_accepts_every_integer_in_each_form_and_only_that(value, form):
    assert score(form.format(value), str(value), "flexible") == 1.0
    assert score(form.format(value), str(value + 1), "flexible") == 0.0


@pytest.mark.parametrize(
    "bomb",
    [
        "1" * 50_000,
        "1,111" * 10_000,
        "#### " * 10_000,
        "####\n" * 10_000,
        "####" + "\n" * 50_000,
        "\\boxed{" * 10_000,
        "\\frac{" * 10_000,
        ("1" + " " * 300) * 200,
        "=1" * 20_000,
    ],
    ids=lambda bomb: repr(bomb[:8]),
)
@pytest.mark.parametrize("mode", MODES)
def test_no_response_takes_long(bomb, mode):
    with work_of_at_most(10):
        score(bomb, mode=mode)


@pytest.mark.real
@pytest.mark.parametrize("split", ["train", "test"])
def test_all_solutions_of_gsm8k_are_right_by_both_rules(split):
    shared = Path(os.environ.get("STEEPEST_SHARED", HERE.parents[2] / "shared"))
    path = shared / "gsm8k" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}")
    solutions = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(solutions) == {"train": 7473, "test": 1319}[split]
    for solution in solutions:
        truth = solution.rpartition("#### ")[2].replace(",", "")
        assert score(solution, truth) == score(solution, truth, "flexible") == 1.0
