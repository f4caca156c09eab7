"""What a worker does inside: it loads the user's function and puts errors into words."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest

from steepest.errors import ConfigError
from steepest.rewards.api import RewardRequest
from steepest.rewards.process import Setup
from steepest.rewards.weighted import prepare_once
from steepest.rewards.worker import Scorer, describe, load_custom

FUNCTIONS = str(Path(__file__).parent / "functions.py")


def begin(kind: str) -> None:
    """What a worker says to its parent before and after preparations."""


@pytest.fixture(autouse=True)
def same_path():
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("nowhere.py", "f", "there is no such file"),
        (FUNCTIONS, "compute_scor", "defines no such function. Did you mean 'compute_score'?"),
        (FUNCTIONS, "not_callable", "this is int, not a function"),
        (FUNCTIONS, "positional", "cannot be called with the keywords data_source, solution_str, ground_truth"),
        ("syntax.py", "f", "importing it raised SyntaxError"),
        ("raises.py", "f", "importing it raised ZeroDivisionError: division by zero"),
        ("exits.py", "f", "importing it raised SystemExit: 2 (exits.py:2)"),
    ],
)
def test_a_custom_function_that_cannot_be_used(tmp_path, path, name, message):
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(2)\n")
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_custom(str(tmp_path / path), name)
    assert str(caught.value).startswith("custom_reward_")


@pytest.mark.parametrize(
    "text",
    [
        "def f(data_source, solution_str, ground_truth, extra_info=None): return 1.0",
        "def f(data_source, solution_str, ground_truth, extra_info, *, weight=1.0): return 1.0",
        "def f(**row): return 1.0",
        "async def f(solution_str, **row): return 1.0",
        "class F:\n    def __call__(self, **row): return 1.0\nf = F()",
        "import functools\ndef g(weight, **row): return weight\nf = functools.partial(g, 1.0)",
    ],
)
def test_every_kind_of_callable_with_the_four_keywords_will_do(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    scorer = Scorer(Setup((str(tmp_path / "mine.py"), "f"), (), "strict", tuple(sys.path), None))
    assert scorer.score(pickle.dumps(RewardRequest("id", "d", "s", "t")), begin) == ["scored", 1.0, {}, {}]


def test_an_error_names_the_innermost_line_of_the_functions_own_file():
    def mine() -> None:
        re.compile("(")  # raises deep inside the standard library

    line = mine.__code__.co_firstlineno + 1
    with pytest.raises(re.error) as caught:
        mine()
    assert describe(caught.value, __file__).endswith(f"(test_worker.py:{line})")
    assert "test_worker.py" not in describe(caught.value, "/some/other/file.py")


def test_error_texts_are_one_short_line():
    text = describe(ValueError("a\nb  c" + "x" * 10_000), "")
    assert (
        text.startswith("ValueError: a b cxxx")
        and text.endswith("x...")
        and len(text) == len("ValueError: ") + 500 + len("...")
    )
    assert describe(KeyError(), "") == "KeyError"


def test_a_payload_that_cannot_be_read_fails_alone():
    scorer = Scorer(Setup(None, (), "strict", tuple(sys.path), None))
    kind, error = scorer.score(b"not a pickle", begin)
    assert kind == "failed" and error.startswith("UnpicklingError")
    row = RewardRequest("id", "openai/gsm8k", "#### 1", "1")
    assert scorer.score(pickle.dumps(row), begin) == ["scored", 1.0, {"acc": 1.0, "format": 1.0}, {}]


def test_a_preparation_runs_once_a_process_and_the_samples_time_begins_after_it():
    begun = []
    scorer = Scorer(Setup(None, (), "strict", tuple(sys.path), None))
    row = pickle.dumps(RewardRequest("id", "aime2024", "\\boxed{073}", "73"))
    prepare_once.cache_clear()
    assert [scorer.score(row, begun.append)[1] for _ in range(2)] == [1.0, 1.0]
    assert begun == ["preparing", "begun"]
