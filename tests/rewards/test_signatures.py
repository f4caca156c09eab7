"""Functions of the user's own: which form they have, what they get, what they may return."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from steepest.config.sections.reward import functions_of
from steepest.errors import ConfigError, DataError
from steepest.rewards.api import RewardRequest, RewardResult
from steepest.rewards.pool import RewardPool
from steepest.rewards.process import Setup
from steepest.rewards.weighted import bind, score_one
from steepest.rewards.worker import Scorer

MESSAGES = [{"role": "user", "content": "2 + 3?"}]
ROW = RewardRequest("a:0", "mine", "It is 5.", "5", {"answer": "5", "level": "easy"}, 4, MESSAGES)
TEXT_ROW = RewardRequest("a:0", "mine", "It is 5.", "5", {"answer": "5", "level": "easy"}, 4, MESSAGES, is_text=True)


def call(function: Any, keywords: dict[str, Any]) -> Any:
    outcome = function(**keywords)
    return asyncio.run(outcome) if inspect.isawaitable(outcome) else outcome


def scored(tmp_path: Path, text: str, request: RewardRequest = ROW, **options: Any) -> RewardResult:
    (tmp_path / "mine.py").write_text(text)
    functions = bind(functions_of({f"{tmp_path}/mine.py:f": {"weight": 1.0, **options}}))
    return score_one(functions, request, mode="strict", call=call)


@pytest.mark.parametrize(
    "text",
    [
        "def f(data_source, solution_str, ground_truth, extra_info=None): return float(ground_truth in solution_str)",
        "def f(solution_str, ground_truth): return float(ground_truth in solution_str)",
        "def f(solution_str, **row): return float(row['extra_info']['level'] == 'easy' and len(row) == 3)",
        "def f(**row): return float(sorted(row) == ['data_source', 'extra_info', 'ground_truth', 'solution_str'])",
        "def f(completions, answer, **kwargs): return [float(answer[0] in c[0]['content']) for c in completions]",
        "def f(prompts, completions, level): return [float(p[-1]['content'] == '2 + 3?') for p in prompts]",
        "def f(completions, ground_truth, extra_info): return (float(ground_truth[0] == extra_info[0]['answer']),)",
        "async def f(completions, **row): return [float(row['level'] == ['easy'])]",
        "import numpy\ndef f(completions, **row): return numpy.ones(len(completions))",
        "def f(completions, completion_ids=None): return [{'score': 1.0, 'length': 3}]",
    ],
)
def test_both_forms_are_called_by_the_names_of_their_parameters(tmp_path: Path, text: str) -> None:
    assert scored(tmp_path, text).score == 1.0


def test_prompts_that_are_texts_give_texts_to_a_function_of_trl(tmp_path: Path) -> None:
    text = "def f(prompts, completions): return [float((prompts, completions) == (['2 + 3?'], ['It is 5.']))]"
    assert scored(tmp_path, text, TEXT_ROW).score == 1.0
    assert scored(tmp_path, text, ROW).score == 0.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def f(answer): return 1.0", "nothing fills its parameter answer"),
        ("def f(solution_str, level): return 1.0", "nothing fills its parameter level"),
        ("def f(ground_truth): return 1.0", "it has neither the parameter solution_str nor completions"),
        ("def f(a, b, /): return 1.0", "nothing fills its parameter a, b"),
        ("def f(completions, completion_ids): return [1.0]", "nothing fills its parameter completion_ids"),
    ],
)
def test_a_function_that_nobody_can_call_is_told_how_to_be_defined(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scored(tmp_path, text)
    assert f"mine.py:f: it cannot be called ({problem})" in str(caught.value) or problem in str(caught.value)
    assert (
        "Define it as def f(data_source, solution_str, ground_truth, extra_info=None), or, as for TRL, def f("
        in str(caught.value)
    )


def test_options_fill_parameters_of_any_kind(tmp_path: Path) -> None:
    text = "def f(solution_str, bonus, *, factor=1.0): return bonus * factor"
    assert scored(tmp_path, text, bonus=0.5, factor=4.0).score == 2.0
    with pytest.raises(ConfigError, match="no keyword bonuss; it takes solution_str, bonus, factor"):
        scored(tmp_path, text, bonuss=1)


def test_a_list_of_another_length_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="returned 2 numbers for 1 completion"):
        scored(tmp_path, "def f(completions): return [1.0, 2.0]")


def test_none_in_a_sum_is_a_reward_that_does_not_apply(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completions): return [None]\ndef g(completions): return [0.5]\n")
    functions = bind(functions_of({f"{tmp_path}/mine.py:f": 1.0, f"{tmp_path}/mine.py:g": 2.0}))
    result = score_one(functions, ROW, mode="strict", call=call)
    assert (result.score, result.scores) == (1.0, {"g": 0.5})
    with pytest.raises(TypeError, match="every reward function returned None"):
        score_one(functions[:1], ROW, mode="strict", call=call)


def test_the_keywords_of_the_configuration_reach_the_custom_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def f(solution_str, ground_truth, threshold, scale=1.0): return threshold * scale\n")
    before = list(sys.path)
    setup = Setup((str(file), "f"), (), "strict", tuple(before), None, custom_kwargs={"threshold": 0.5, "scale": 3})
    scorer = Scorer(setup)
    assert scorer.score(pickle.dumps(ROW), lambda: None) == ["scored", 1.5, {}, {}]
    with pytest.raises(ConfigError, match=r"and custom_reward_kwargs={'treshold': 1} \(no keyword treshold; it takes"):
        Scorer(Setup((str(file), "f"), (), "strict", tuple(before), None, custom_kwargs={"treshold": 1}))
    sys.path[:] = before


def test_the_pool_says_how_it_calls_and_checks_the_columns(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def f(prompts, completions, level, **kwargs):\n"
        "    return [float(p[0]['content'] == '2 + 3?' and x == 'easy') for p, x in zip(prompts, level)]\n"
    )
    with RewardPool(functions=functions_of({f"{file}:f": 1.0}), num_workers=1, timeout_s=60) as pool:
        assert pool.check([], {"answer", "level"}) == [
            "reward f: has a parameter `completions`, so it is called as TRL calls it, with lists of one response and "
            "the columns of its row as keywords (takes: any)."
        ]
        with pytest.raises(DataError, match="reward f: nothing fills its parameter level. .*: answer. Rename"):
            pool.check([], {"answer"})
        assert pool.score([ROW])[0].score == 1.0
    with RewardPool(custom=(str(file), "f"), num_workers=1, timeout_s=60) as pool:
        assert pool.score([ROW])[0].score == 1.0
