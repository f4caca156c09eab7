"""Weighted sums of rewards: by hand, through real worker processes, and every way to write them wrongly."""

from __future__ import annotations

import pytest

from steepest.config.sections.reward import WeightedFunction, functions_of
from steepest.errors import ConfigError, DataError
from steepest.rewards import RewardPool, RewardRequest
from steepest.rewards.weighted import bind, ground_truth_problem

BOXED = {"weight": 0.2, "form": "boxed"}


def pool(functions: dict, **more) -> RewardPool:
    return RewardPool(functions=functions_of(functions), num_workers=1, **more)


def test_a_weighted_sum_by_hand_with_each_part_by_name():
    # 1.0 * 1 + 0.2 * 1 - 0.5 * ... : length is -(150 - 100) / 100 = -0.5, with weight 0.4: 1 + 0.2 - 0.2 = 1.0
    wanted = {"math": 1.0, "format": BOXED, "length": {"weight": 0.4, "soft": 100, "hard": 200}}
    with pool(wanted) as rewards:
        right, wrong = rewards.score(
            [
                RewardRequest("a", "x", "\\boxed{0.5}", "\\frac{1}{2}", num_tokens=150),
                RewardRequest("b", "x", "Answer: 3", "\\frac{1}{2}", num_tokens=500),
            ]
        )
    assert right.score == pytest.approx(1.0) and right.scores == {"math": 1.0, "format": 1.0, "length": -0.5}
    assert wrong.score == pytest.approx(-0.4) and wrong.scores == {"math": 0.0, "format": 0.0, "length": -1.0}
    assert right.parts == {"acc": 1.0, "math/format": 1.0}
    assert right.named() == {"acc": 1.0, "math/format": 1.0, "math": 1.0, "format": 1.0, "length": -0.5}


def test_the_grader_of_each_row_in_a_sum_and_a_function_of_the_users_own(tmp_path):
    (tmp_path / "helper.py").write_text("BONUS = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "import helper\nasync def bonus(**row):\n    return {'score': helper.BONUS, 'seen': 1}\n"
    )
    with pool({"grader": 2.0, f"{tmp_path}/mine.py:bonus": 1}, mode="flexible") as rewards:
        rewards.check(["openai/gsm8k", "aime2025"])
        gsm8k, aime = rewards.score(
            [RewardRequest("a", "openai/gsm8k", "It is 72.", "72"), RewardRequest("b", "aime2025", "\\boxed{1}", "073")]
        )
        with pytest.raises(DataError, match="data_source 'nowhere': no reward of this name"):
            rewards.check(["nowhere"])
    assert (gsm8k.score, gsm8k.scores) == (2.25, {"grader": 1.0, "bonus": 0.25})
    assert gsm8k.parts == {"acc": 1.0, "grader/format": 0.0, "bonus/seen": 1.0}
    assert (aime.score, aime.parts["acc"]) == (0.25, 0.0)


def test_one_function_that_fails_fails_the_sample_and_says_where(tmp_path):
    (tmp_path / "mine.py").write_text("def broken(**row):\n    return 1 / 0\n")
    with pool({"exact": 1, f"{tmp_path}/mine.py:broken": 1}, max_error_rate=1.0) as rewards:
        (result,) = rewards.score([RewardRequest("a", "x", "Paris", "Paris")])
    assert result.score is None and result.error == "ZeroDivisionError: division by zero (mine.py:2)"


@pytest.mark.parametrize(
    ("functions", "text"),
    [
        ({"length": 1.0}, "reward_functions.length: needs soft and hard: write {length: {weight: 1.0, soft: ...}}."),
        ({"length": {"weight": 1, "soft": 9, "hard": 9}}, "soft=9, hard=9: expected 0 <= soft < hard"),
        ({"length": {"weight": 1, "soft": 0.5, "hard": 9}}, "functions.length: soft=0.5: expected a whole number"),
        ({"format": 1.0}, "functions.format: expected either form (one of boxed, hashes, think, tags) or pattern"),
        ({"format": {"weight": 1, "form": "box"}}, "functions.format: form='box': no such form. Allowed: boxed,"),
        ({"format": {"weight": 1, "pattern": "("}}, "reward_functions.format: pattern='(': not a regular expression"),
        ({"math": {"weight": 1, "tol": 2}}, "reward_functions.math: no option tol. It takes none."),
        ({"numeric": {"weight": 1, "tol": 2}}, "functions.numeric: no option tol. Its options: rel_tol, abs_tol."),
        ({"nowhere.py:f": 1}, "reward_functions='nowhere.py': there is no such file"),
    ],
)  # fmt: skip
def test_wrong_options_are_told_before_the_run(functions, text):
    with pool(functions) as rewards, pytest.raises(ConfigError) as caught:
        rewards.check([])
    assert text in str(caught.value)


def test_a_function_that_cannot_take_the_four_keywords(tmp_path):
    (tmp_path / "mine.py").write_text("def f(answer):\n    return 1.0\n")
    with pytest.raises(ConfigError, match=r"mine.py:f: it cannot be called \(nothing fills its parameter answer\)"):
        bind([WeightedFunction(f"{tmp_path}/mine.py:f", 1.0)])


def test_ground_truths_are_those_of_the_rewards_that_score():
    numeric = functions_of({"numeric": 1.0})
    assert ground_truth_problem("openai/gsm8k", "many") is not None
    assert "expected one number" in (ground_truth_problem("openai/gsm8k", "many", numeric) or "")
    assert ground_truth_problem("openai/gsm8k", "25%", numeric) is None
    assert ground_truth_problem("openai/gsm8k", "many", functions_of({"length": 1.0, "judge": 1.0})) is None
    assert ground_truth_problem("aime24", "") == "ground_truth is empty"
