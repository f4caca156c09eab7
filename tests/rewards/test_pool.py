"""The pool: every way in which a reward can fail is seen, told and contained."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steepest.config.sections.reward import WeightedFunction
from steepest.errors import ConfigError, DataError, RewardError
from steepest.rewards import RewardPool, RewardRequest, RewardResult
from steepest.rewards.pool import allowed_failures
from tests.support.reward_pools import FUNCTIONS, custom_pool, requests


@pytest.fixture(scope="module")
def hasty():
    with custom_pool(timeout_s=2.0) as pool:
        pool.check([])
        yield pool


# ---- what a function may return, and how it may fail


@pytest.mark.parametrize(
    ("solution", "result"),
    [
        ("one", RewardResult(1.0)),
        ("zero", RewardResult(0.0)),  # a score, not a missing one
        ("true", RewardResult(1.0)),
        ("parts", RewardResult(0.25, {"acc": 1.0})),
        ("dataclass", RewardResult(2.0)),
        ("alarm", RewardResult(0.5)),  # signal.alarm works: the worker scores on its main thread
        ("torch", RewardResult(0.0)),
        ("threads", RewardResult(float(os.environ.get("OMP_NUM_THREADS", "1")))),
        ("path", RewardResult(float("PYTHONPATH" in os.environ))),
    ],
)
def test_scores(pool, solution, result):
    assert pool.score(requests(solution)) == [result]
    assert pool.error_rate == 0.0


@pytest.mark.parametrize(
    ("solution", "error"),
    [
        ("nan", "ValueError: the reward function returned nan as a score, which is not finite"),
        ("inf", "ValueError: the reward function returned inf as a score, which is not finite"),
        ("none", "TypeError: the reward function returned None as a score, which is not a number"),
        ("text", "TypeError: the reward function returned str '1.0' as a score, which is not a number"),
        ("no score", "ValueError: the reward function returned a dict without 'score'; it has ['acc']"),
        ("exit", "SystemExit: 3 (functions.py:"),
        ("interrupt", "KeyboardInterrupt (functions.py:"),
        ("rude", "Rude: (its message cannot be shown) (functions.py:"),
        ("recurse", "RecursionError: maximum recursion depth exceeded"),
        ("die", "the worker process exited with code 7"),
        ("segfault", "the worker process was killed by SIGSEGV"),
        ("killed", "the worker process was killed by SIGKILL (out of memory?)"),
        ("stopped", "timeout after 2 s"),
        ("sleep", "timeout after 2 s"),
        ("regex", "timeout after 2 s"),
    ],
)
def test_failures_are_counted_and_named_and_never_zero(request, caplog, solution, error):
    pool = request.getfixturevalue("hasty" if error.startswith("timeout") else "pool")
    [good, bad, zero] = pool.score(requests("1.0", solution, "0.0"))
    assert (good, zero) == (RewardResult(1.0), RewardResult(0.0))
    assert bad.score is None and bad.parts == {} and bad.error.startswith(error)
    assert pool.error_rate == 1 / 3
    [record] = caplog.records
    assert record.levelno == logging.WARNING and record.name == "steepest.rewards"
    start = f"reward: 1 of 3 samples failed (33.3 %). First: sample row:1: {error}"
    assert record.message.startswith(start) and record.message.endswith("These rows get no score.")


def test_an_exception_names_its_line(pool):
    lines = Path(FUNCTIONS).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if text == "    raise error")
    assert pool.score(requests("raise"))[0].error == f"ValueError: bad answer (functions.py:{line})"


def test_one_warning_tells_the_first_sample_of_many(pool, caplog):
    results = pool.score(requests("one", "nan", "one", "raise", "none"))
    assert [result.score for result in results] == [1.0, None, 1.0, None, None]
    [record] = caplog.records
    assert record.message.startswith("reward: 3 of 5 samples failed (60.0 %). First: sample row:1: ValueError: ")


def test_the_time_limit_counts_from_the_start_of_each_sample():
    # one worker, a chunk of 15 first: together above the limit, each far below it
    with custom_pool("slow_score", num_workers=1, timeout_s=2.0) as pool:
        results = pool.score([RewardRequest(str(i), "d", "0.14", "", {}) for i in range(30)])
    assert [result.score for result in results] == [0.14] * 30


def test_all_kinds_of_failure_at_once_off_the_main_thread():
    solutions = ["1", "sleep", "2", "die", "3", "nan", "0", "segfault", "4", "regex", "true", "none", "5", "raise"]
    expected = [1, None, 2, None, 3, None, 0, None, 4, None, 1, None, 5, None]
    got: list[RewardResult] = []
    with custom_pool(timeout_s=2.0) as pool:
        thread = threading.Thread(target=lambda: got.extend(pool.score(requests(*solutions))))
        thread.start()
        thread.join(300)
        assert pool.error_rate == 0.5
    assert [result.score for result in got] == expected


def test_calls_from_several_threads_do_not_mix(pool):
    got: dict[int, list[float | None]] = {}

    def run(base: int) -> None:
        got[base] = [result.score for result in pool.score(requests(*(str(base + i) for i in range(50))))]

    threads = [threading.Thread(target=run, args=(100 * k,)) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join(300) for thread in threads]
    assert got == {100 * k: [100.0 * k + i for i in range(50)] for k in range(4)}


@given(st.lists(st.one_of(st.integers(0, 99).map(str), st.sampled_from(["nan", "raise", "die"])), max_size=80))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_results_come_in_the_order_of_the_requests(pool, solutions):
    if solutions.count("die") > 2:  # each costs the start of a process
        solutions = [solution for solution in solutions if solution != "die"]
    results = pool.score(requests(*solutions))
    bad = ("nan", "raise", "die")
    assert [result.score for result in results] == [None if s in bad else float(s) for s in solutions]
    assert pool.error_rate == sum(s in bad for s in solutions) / max(1, len(solutions))


def test_a_row_that_cannot_be_sent_fails_alone(pool):
    rows = requests("1", "2")
    rows[0].extra_info["f"] = lambda: 0
    bad, good = pool.score(rows)
    assert good == RewardResult(2.0)
    assert bad.score is None and "the row cannot be sent to a worker" in bad.error


# ---- the limit


@pytest.mark.parametrize(
    ("num_samples", "rate", "allowed"),
    [
        (0, 0.1, 0),
        (1, 0.1, 0),
        (2, 0.1, 1),
        (8, 0.1, 1),
        (20, 0.1, 2),
        (256, 0.1, 25),
        (100, 0.29, 29),
        (3, 0.99, 2),
        (8, 0, 0),
        (8, 1, 8),
    ],
)
def test_allowed_failures(num_samples, rate, allowed):
    assert allowed_failures(num_samples, rate) == allowed


def test_too_many_failures_end_the_run_at_once(caplog):
    with custom_pool(max_error_rate=0.1, timeout_s=1.0, num_workers=1) as pool:
        with pytest.raises(RewardError) as caught:
            pool.score(requests(*["sleep"] * 20))  # 3 of 20 are too many: the other 17 are not waited for
        assert str(caught.value) == (
            "reward: 3 of 20 samples failed (15.0 %). First: sample row:0: timeout after 1 s. That is more than "
            "max_error_rate=0.1 allows (2 of 20), so the run ends; 17 samples were left unscored. Fix the "
            "reward function; or raise timeout_s (now 1) or max_error_rate."
        )
        assert pool.error_rate == 0.15 and not caplog.records
        # and the pool is fit for use
        assert [result.score for result in pool.score(requests("zero", "one"))] == [0.0, 1.0]
        assert pool.error_rate == 0.0


def test_just_allowed_is_allowed():
    with custom_pool(max_error_rate=0.1) as pool:
        assert sum(r.score is None for r in pool.score(requests(*["nan"] * 2, *["1"] * 18))) == 2
        with pytest.raises(RewardError, match="3 of 20"):
            pool.score(requests(*["nan"] * 3, *["1"] * 17))


def test_nothing_to_score(pool):
    assert pool.score([]) == [] and pool.error_rate == 0.0


# ---- custom functions and check()


def test_async_functions_and_their_time_limit():
    with custom_pool("async_score", timeout_s=2.0) as pool:
        pool.check(["anything"])
        results = pool.score(requests(*map(str, range(20)), "sleep", "raise"))
    assert [result.score for result in results] == [*map(float, range(20)), None, None]
    assert results[20].error == "timeout after 2 s"


def test_functions_get_the_four_keywords():
    with custom_pool("see") as pool:
        assert pool.score([RewardRequest("id", "d", "s", [1], {"k": "v"})]) == [RewardResult(1.0)]


def test_a_custom_function_that_cannot_be_used_is_told_at_the_start(tmp_path):
    # the ways in which a file can be unusable are in test_worker.py
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(2)\n")
    message = r"^custom_reward_path='.*exits.py': importing it raised SystemExit: 2 \(exits.py:2\)$"
    with RewardPool(custom=(str(tmp_path / "exits.py"), "f"), num_workers=2) as pool:
        for _ in range(2):  # the second time as well
            with pytest.raises(ConfigError, match=message):
                pool.check([])
        with pytest.raises(ConfigError, match=message):
            pool.score(requests("1"))


def test_a_custom_file_that_never_finishes_its_import_is_told(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    with (
        RewardPool(custom=(str(tmp_path / "slow.py"), "f"), num_workers=1, start_seconds=0.5) as pool,
        pytest.raises(ConfigError, match=r"slow.py': importing it took more than 0.5 s"),
    ):
        pool.check([])


def test_a_custom_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 0.5\n")
    (tmp_path / "mine.py").write_text("import neighbour\ndef compute_score(**_):\n    return neighbour.VALUE\n")
    with RewardPool(custom=(str(tmp_path / "mine.py"), "compute_score"), num_workers=1) as pool:
        assert pool.score(requests("x")) == [RewardResult(0.5)]


def test_check_knows_data_sources_and_modes():
    with RewardPool(num_workers=1) as pool:
        pool.check(["openai/gsm8k", "steepest/arithmetic"])
        with pytest.raises(DataError, match=r"data_source 'openai/gsm8'.*Did you mean 'openai/gsm8k'"):
            pool.check(["openai/gsm8k", "openai/gsm8"])
        with pytest.raises(DataError, match=r"Known: .*math, .*openai/gsm8k, steepest/arithmetic"):
            pool.check(["os:system"])  # a row of the data cannot name code to be run
    with (
        RewardPool(num_workers=1, mode="flexibel") as pool,
        pytest.raises(ConfigError, match="Did you mean 'flexible'"),
    ):
        pool.check(["openai/gsm8k"])
    with custom_pool(mode="flexible") as pool, pytest.raises(ConfigError, match="has no effect with custom_reward"):
        pool.check([])


def test_an_unknown_data_source_is_a_failure_and_not_a_zero():
    with RewardPool(num_workers=1) as pool, pytest.raises(RewardError, match="no reward for data_source 'os:system'"):
        pool.score(requests("#### 72", source="os:system"))


@pytest.mark.parametrize(("mode", "scores"), [("strict", [1.0, 0.0, 0.0]), ("flexible", [1.0, 1.0, 0.0])])
def test_built_in_functions_follow_the_mode(mode, scores):
    with RewardPool(num_workers=1, mode=mode) as pool:
        results = pool.score(requests("#### 72", "#### 72.", "#### 73", source="openai/gsm8k"))
    assert [result.score for result in results] == scores
    assert [result.parts for result in results] == [{"acc": s, "format": 1.0} for s in scores]


def test_bad_options_are_all_told_at_once():
    with pytest.raises(ConfigError) as caught:
        RewardPool(num_workers=0, timeout_s=0, max_error_rate=2)
    assert [problem.split("=")[0] for problem in caught.value.problems] == [
        "num_workers",
        "timeout_s",
        "max_error_rate",
    ]


def test_a_large_batch_goes_to_the_same_workers_again_and_again():
    rows = [
        RewardRequest(str(i), "openai/gsm8k", f"{i} + 1 = {i + 1}\n#### {i + 1}", str(i + 1), {}) for i in range(256)
    ]
    with RewardPool(num_workers=2) as pool:
        pool.check(["openai/gsm8k"])
        pids = pool.worker_pids()
        for _ in range(10):
            assert all(result.score == 1.0 for result in pool.score(rows))
        assert pool.worker_pids() == pids


def test_workers_start_while_the_caller_does_other_things():
    with RewardPool(num_workers=2) as pool:
        pool.start()
        pids = pool.worker_pids()
        assert len(pids) == 2
        pool.check(["openai/gsm8k"])
        assert pool.worker_pids() == pids


# ---- answers that a built-in grader cannot grade in time


@pytest.fixture
def slow_grader(tmp_path, monkeypatch):
    """A grader of the package, in the workers, that never ends on the answer `slow`."""
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "from steepest.rewards.api import REWARDS\n"
        "@REWARDS.register('graded', check_ground_truth=str)\n"
        "def graded(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    while solution_str == 'slow': time.sleep(1)\n"
        "    return {'score': 1.0, 'acc': 1.0}\n"
    )
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(root))))


@pytest.mark.parametrize("functions", [(), (WeightedFunction("graded", 2.0),)])
def test_an_answer_that_takes_too_long_to_grade_scores_zero_and_ends_no_run(slow_grader, functions, caplog):
    """More than max_error_rate of them: the policy wrote them, so the run goes on."""
    asked = [RewardRequest(f"row:{i}", "graded", text, "1") for i, text in enumerate(["slow", "fast", "slow"])]
    with RewardPool(functions=functions, timeout_s=3.0, num_workers=2, max_error_rate=0.0) as pool:
        results = pool.score(asked)
        assert pool.error_rate == 0.0
    scores = {"graded": 0.0} if functions else {}
    slow = RewardResult(0.0, {"acc": 0.0}, scores=scores, timed_out=True)
    fast = RewardResult(2.0 if functions else 1.0, {"acc": 1.0}, scores={"graded": 1.0} if functions else {})
    assert results == [slow, fast, slow]
    assert [record.getMessage() for record in caplog.records if record.name == "steepest.rewards"] == [
        "reward: 2 of 3 responses took more than 3 s to grade and score 0. First: sample row:0."
    ]


def test_a_preparation_is_not_on_the_time_of_a_sample(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import time\n"
        "from steepest.rewards.api import REWARDS\n"
        "@REWARDS.register('prepared', prepare=lambda: time.sleep(1.5))\n"
        "def prepared(data_source, solution_str, ground_truth, extra_info=None): return 1.0\n"
    )
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(root))))
    with RewardPool(timeout_s=1.0, num_workers=1) as pool:
        assert pool.score([RewardRequest("row:0", "prepared", "x", "1")]) == [RewardResult(1.0)]


def test_a_slow_function_or_pattern_of_the_users_own_is_a_failure():
    pattern = WeightedFunction("format", 1.0, {"pattern": "(a+)+$"})
    with (
        RewardPool(functions=[pattern], timeout_s=1.0, num_workers=1, max_error_rate=0.1) as pool,
        pytest.raises(RewardError, match="timeout after 1 s.* Fix the reward function; or raise timeout_s"),
    ):
        pool.score([RewardRequest(f"row:{i}", "any", "a" * 60 + "b", "1") for i in range(2)])
