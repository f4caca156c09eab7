"""The graders beside GSM8K's: cases by hand, ground truths, texts made to be slow; and all corpora with their rates."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.__main__ import app
from steepest.config.sections.reward import IN_WORKERS
from steepest.errors import ConfigError, DataError, RewardError
from steepest.rewards import REWARDS
from steepest.rewards.answers import statements, visible
from steepest.rewards.api import data_source_names, entry_for
from steepest.rewards.check import CORPORA, check, corpus_of, describe, read_corpus
from steepest.rewards.graders.exact import exact, normalise
from steepest.rewards.graders.math import math, prepare
from steepest.rewards.graders.multiple_choice import chosen, multiple_choice
from steepest.rewards.graders.numeric import numeric, numeric_answer
from steepest.rewards.graders.shaping import format_reward, length
from tests.support.work import work_of_at_most

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


def right(grader, answer: str, truth: object, **options: object) -> float:
    return grader("any", answer, truth, **options)["acc"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so \\boxed{1} or \\fbox{\\frac{1}{2}}", ["1", "\\frac{1}{2}"]),
        ("\\boxed 7 and \\boxed{open", ["7"]),
        ("<answer>\nParis\n</answer> #### 5 apples", ["Paris", "5 apples"]),
        ("Answer:\n\nB. Paris\n", ["B. Paris"]),
        ("The answer is 1.5. I hope so.", ["1.5."]),
        ("Answer: 1\nNo. The answer is 2", ["1", "2"]),
        ("I answered it", []),
    ],
)
def test_where_an_answer_is_stated(text, found):
    assert [statement.text.strip() for statement in statements(text)] == found


def test_thinking_states_nothing():
    assert visible("<think>\\boxed{1}</think> \\boxed{2}") == " \\boxed{2}"
    assert visible("<think>\\boxed{1}") == "" and visible("plain") == "plain"


# (corpus, mode, false accepts, wrong, false rejects, right): the figures of docs/rewards.md
RATES = [
    ("gsm8k", "strict", 48, 207, 202, 241),
    ("gsm8k", "flexible", 5, 207, 6, 241),
    ("math", None, 1, 315, 30, 517),
    ("multiple_choice", None, 2, 277, 13, 322),
    ("exact", None, 0, 270, 30, 353),
    ("numeric", None, 6, 378, 10, 445),
]
# of the cases that were written when the grader was finished
UNSEEN = [
    ("math", 0, 25, 1, 33),
    ("multiple_choice", 0, 10, 0, 10),
    ("exact", 0, 11, 0, 12),
    ("numeric", 0, 16, 0, 22),
]


@pytest.mark.parametrize(("name", "mode", "accepts", "wrong", "rejects", "rights"), RATES)
def test_error_rates_on_the_adversarial_corpus(name, mode, accepts, wrong, rejects, rights):
    report = check(name, mode=mode)
    assert (len(report.false_accepts), report.num_wrong) == (accepts, wrong), describe(report)
    assert (len(report.false_rejects), report.num_right) == (rejects, rights), describe(report)
    assert len({(case.answer, case.truth) for case in report.cases}) == len(report.cases) >= 80
    called = f"{name} {mode}" if mode else name
    shares = f"{accepts} of {wrong} = {accepts / wrong:.1%} | {rejects} of {rights} = {rejects / rights:.1%}"
    assert f"| `{called}` | {shares} |" in PAGE.read_text(encoding="utf-8")
    assert report.rates() == (
        f"wrong answers accepted: {accepts} of {wrong} = {accepts / wrong:.1%}\n"
        f"right answers rejected: {rejects} of {rights} = {rejects / rights:.1%}"
    )


@pytest.mark.parametrize(("name", "accepts", "wrong", "rejects", "rights"), UNSEEN)
def test_error_rates_on_the_cases_that_no_rule_was_made_for(name, accepts, wrong, rejects, rights):
    unseen = check(name).unseen()
    assert (len(unseen.false_accepts), unseen.num_wrong) == (accepts, wrong)
    assert (len(unseen.false_rejects), unseen.num_right) == (rejects, rights)
    said = f"`{name}` {accepts} of {wrong} and {rejects} of {rights}"
    assert said in " ".join(PAGE.read_text(encoding="utf-8").split())


def test_a_grader_of_the_users_own_is_checked_on_a_corpus_of_their_own(tmp_path):
    grader = tmp_path / "mine.py"
    grader.write_text(
        "async def contains(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(ground_truth in solution_str)\n"
        "def broken(**row):\n    raise KeyError('x')\n"
    )
    corpus = tmp_path / "hard.jsonl"
    corpus.write_text(
        '{"answer": "112", "truth": "12", "right": false}\n{"answer": "a dozen", "truth": "12", "right": true}'
    )
    text = describe(check(f"{grader}:contains", corpus=corpus))
    assert text.splitlines() == [
        "accepted, but wrong:",
        '  "12" <- "112"',
        "rejected, but right:",
        '  "12" <- "a dozen"',
        "2 cases, 1 right and 1 wrong",
        "wrong answers accepted: 1 of 1 = 100.0%",
        "right answers rejected: 1 of 1 = 100.0%",
    ]
    with pytest.raises(RewardError, match="broken raised KeyError: 'x'; the answer is \"112\""):
        check(f"{grader}:broken", corpus=corpus)


def test_the_command(capsys):
    assert _command("rewards", "check", "aime2024") == 0
    printed = capsys.readouterr().out
    assert "accepted, but wrong:" in printed and printed.endswith("right answers rejected: 30 of 517 = 5.8%\n")
    assert _command("rewards", "check", "mth") == 2
    assert "no such grader: mth. Did you mean math?" in capsys.readouterr().err


def _command(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        app(list(words), prog_name="steepest")
    return ended.value.code


def test_what_cannot_be_checked_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no such grader: mth. Did you mean math?"):
        check("mth")
    with pytest.raises(ConfigError, match="--mode flexible: math has no such mode. It has none."):
        check("math", mode="flexible")
    with pytest.raises(DataError, match="cannot be read"):
        check("math", corpus=tmp_path / "none.jsonl")
    with pytest.raises(DataError, match='c, line 2: expected {"answer": text, "truth": ..., "right": true or false}'):
        read_corpus('{"answer": "a", "truth": "b", "right": true}\n{"answer": 1}', "c")
    with pytest.raises(DataError, match="c: no cases"):
        read_corpus("", "c")


def test_names_and_data_sources():
    for source in ("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "math_dapo", "aime2024", "aime_25", "aime"):
        entry = entry_for(source)
        assert entry is not None and entry.value is math
    assert entry_for("openai/gsm8k").value is REWARDS.get("gsm8k").value  # type: ignore[union-attr]
    assert entry_for("length") is None and entry_for("mathematics") is None
    assert {"length", "format"}.isdisjoint(data_source_names())
    assert {name for name in IN_WORKERS if name != "grader"} == {
        entry.value.__name__.removesuffix("_reward") for entry in map(REWARDS.get, REWARDS.names())
    }
    assert all(REWARDS.get(name) for name in CORPORA)


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("\\boxed{\\frac{2}{4}}", "\\frac12", 1.0),
        ("\\boxed{\\frac{2}{4}}", "Thus the answer is $\\boxed{\\frac{1}{2}}$.", 1.0),  # a whole solution as the truth
        ("Answer: $x^2+2x+1$", "(x+1)^2", 1.0),
        ("\\boxed{112}", "12", 0.0),
        ("12", "12", 1.0),
        ("We looked at 12 cases", "12", 0.0),
        ("\\boxed{073}", 73, 1.0),
    ],
)
def test_math(answer, truth, score):
    assert right(math, answer, truth) == score
    assert math("any", answer, truth)["format"] == float(answer != "We looked at 12 cases")


def test_math_uses_no_signal_and_runs_off_the_main_thread(monkeypatch):
    """verl's MATH rewards were all 0 because signal.alarm raises there and the error was swallowed."""
    prepare()
    monkeypatch.setattr(signal, "alarm", lambda seconds: pytest.fail("signal.alarm was called"))
    found = []
    thread = threading.Thread(target=lambda: found.append(right(math, "\\boxed{\\sqrt{12}}", "2\\sqrt{3}")))
    thread.start()
    thread.join(30)
    assert found == [1.0]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("A or B", None), ("The answer is a matter of taste.", None), ("It is not A. So I choose C.", "C")],
)
def test_multiple_choice(answer, letter):
    assert chosen(answer) == letter
    assert multiple_choice("any", answer, "(b)")["format"] == float(letter is not None)


def test_exact():
    assert (
        normalise("\u201cThe  U.S.A.\u201d") == "usa" and normalise("C++") == "c++" and normalise("10\u00b2") == "10^2"
    )
    assert right(exact, "Answer: Lyon", ["Paris", "lyon"]) == 1.0 and right(exact, "", "x") == 0.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [("x = 72", 72), ("1 1/2", 1.5), ("-$5", -5), ("3 x 10^2", 300), ("25%", 0.25), ("70-72", None), ("x72", None)],
)
def test_numeric_reads_the_value(answer, value):
    found = numeric_answer(answer)
    assert (None if found is None else float(found.value)) == value


@pytest.mark.parametrize(
    ("spellings", "value"),
    [
        (["12,\\!345", "12\\,345", "12{,}345", "12 345", "12'345", "1.2345\u00d710\u2074"], 12345),
        (["\u00bd", "1\u20442", "\\frac12", "{1 \\over 2}", "5\u00d710\u207b\u00b9", "one half", "\\dfrac{1}{2}"], 0.5),
        (["1\u00bd", "1\\frac12", "1 1/2", "one and a half", "3\u00f72"], 1.5),
        (["10\u2076", "1M", "1.000.000", "1,\\!000,\\!000", "1 million"], 10**6),
        (["\u2212\u00bc", "-\\frac14", "negative 0.25", "\\boldsymbol{-0.25}"], -0.25),
        (["72\u2088", "|-7|", "72\u00b2", "\u221a72", "72\u2030"], None),
    ],
)
def test_spellings_of_one_number(spellings, value):
    found = {text: numeric_answer(text) for text in spellings}
    assert {text: None if one is None else float(one.value) for text, one in found.items()} == dict.fromkeys(
        found, value
    )


@pytest.mark.parametrize(
    "spellings",
    [
        ["12345", "12,345", "12,\\!345", "12{,}345", "12\\,345"], ["10%", "10\\%", "10 %", "10 \\%"],
        ["1/2", "\u00bd", "1\u20442"], ["x^2", "x\u00b2", "x^{2}"], ["\u2205", "\\emptyset", "\\varnothing"],
        ["90\u00b0", "90^\\circ"], ["Paris", "\\boldsymbol{Paris}", "(Paris)", "<b>Paris</b>"],
        ["-3", "- 3", "\u22123"],
        ["1, 2, 3", "1,2,3"], ["5 cm", "5\\,\\mathrm{cm}"], ["\u2264", "\\leq"], ["\u03c0", "\\pi"],
    ],
)  # fmt: skip
def test_exact_reads_spellings_of_one_text_both_ways(spellings):
    assert {right(exact, f"Answer: {one}", other) for one in spellings for other in spellings} == {1.0}


def test_numeric_tolerances_by_hand():
    # |3.14 - 3.14159| = 0.00159; relative to the truth 0.000506
    assert right(numeric, "3.14", "3.14159") == 0.0
    assert (
        right(numeric, "3.14", "3.14159", rel_tol=6e-4) == 1.0
        and right(numeric, "3.14", "3.14159", rel_tol=5e-4) == 0.0
    )
    assert right(numeric, "3.14", "3.14159", abs_tol=0.0016) == 1.0
    with pytest.raises(ValueError, match="tolerances are at least 0"):
        numeric("any", "1", "1", rel_tol=-1.0)


def test_length_by_hand():
    # 0 to 100 tokens; (150 - 100) / (200 - 100) = 0.5; 1 from 200 on
    scores = [length("d", "", "", num_tokens=n, soft=100, hard=200) for n in (1, 100, 150, 200, 900)]
    assert scores == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("form", "yes", "no"),
    [
        ("boxed", "so \\boxed{\\frac{1}{2}}", "so \\boxed{ }"),
        ("hashes", "5\n#### 5", "x #### 5"),
        ("think", "<think>a\nb</think>\n5", "<think>a</think>"),
        ("tags", "<think>a</think> <answer>5</answer>", "<think>a</think> <answer>5</answer> bye"),
    ],
)
def test_format(form, yes, no):
    assert format_reward("d", yes, "", form=form) == 1.0 and format_reward("d", no, "", form=form) == 0.0
    assert format_reward("d", "abc", "", pattern="^b") == 0.0 and format_reward("d", "abc", "", pattern="b") == 1.0


@pytest.mark.parametrize(
    ("grader", "truth", "error"),
    [
        (math, "", ValueError), (math, None, TypeError), (math, ["1"], TypeError), (math, True, TypeError),
        (multiple_choice, "AB", ValueError), (multiple_choice, 3, ValueError), (numeric, "many", ValueError),
        (numeric, "1 or 2", ValueError), (exact, [], ValueError), (exact, " ", ValueError),
        (exact, {"a": 1}, TypeError),
    ],
)  # fmt: skip
def test_a_ground_truth_that_nothing_can_equal_is_an_error_and_not_a_zero(grader, truth, error):
    with pytest.raises(error, match="ground_truth is"):
        grader("any", "Answer: 1", truth)
    name = re.sub("_reward$", "", grader.__name__)
    with pytest.raises(error):
        REWARDS.get(name).facts["check_ground_truth"](truth)


GRADERS = [(math, "\\frac{1}{3}"), (multiple_choice, "B"), (exact, "Paris"), (numeric, "0.25")]
PIECES = st.sampled_from(
    ["\\boxed{", "}", "{", "answer: ", "####", "<answer>", "</answer>", "<think>", "</think>", "\\frac", "^", "$", "B",
     "1/3", "25%", "(", ")", "\n", " or ", "=", "-", ",", "."]
)  # fmt: skip


@pytest.mark.parametrize(("grader", "truth"), GRADERS)
@given(st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=20).map("".join))
@settings(max_examples=60, deadline=None)
def test_no_response_raises_and_scores_are_zero_or_one(grader, truth, answer):
    assert set(grader("any", answer, truth).values()) <= {0.0, 1.0}


BOMBS = [
    "1" * 25_000, "1,111" * 5_000, "####\n" * 5_000, "\\boxed{" * 10_000, "=1" * 10_000, "answer: " * 5_000,
    "answer" + " " * 25_000, "<answer>" * 5_000, "<think>" * 5_000, "so " * 8_000, "not " * 8_000, "$" * 25_000,
    "\\boxed{9^{9^{9}}}", "\\boxed{99999999!}", "\\boxed{(x+1)^{999}}", "\\boxed{\\sum_{n=1}^{10^9} n}",
    "\\boxed{10^{99}!}", "\\boxed{((9!)!)!}", "Answer: 10^{99}!", "1e999999", "\\boxed{1e-999999999}",
    "\\boxed{\\sqrt{" * 40,
    "\\boxed{" + "\\sin " * 49 + "x}", "\\boxed{" + "\\pm 1" * 40 + "}",
    "<answer>" + "\\(" * 12_000 + "</answer>", "abc " * 6_000 + "}",
    "I choose B " * 2_000, "\u5171" * 25_000, "#### step " * 2_500, "one hundred " * 2_000,
    "1/2 " * 6_000, "\u7b54\u6848\u662f" * 8_000, "\u202f" * 25_000 + "72", "\u00bd" * 25_000,
    "\\boxed{(a+b+c+d+e+f)^{29}}", "\\boxed{10^{999}}", "\\boxed{" + "(" * 200 + ")" * 200 + "}", "\\boxed{1e999}",
]  # fmt: skip


@pytest.mark.parametrize(("grader", "truth"), GRADERS)
def test_no_response_takes_long(grader, truth):
    prepare()
    for bomb in BOMBS:
        with work_of_at_most(5, what=bomb[:30]):
            grader("any", bomb, truth)


def test_the_corpora_say_what_a_person_says_of_traps():
    """Labels, not graders: some that must never be changed to suit a grader."""
    said = {(case.truth, case.answer): case.right for name in CORPORA for case in corpus_of(name)}
    assert said["12", "\\boxed{112}"] is False and said["72", ""] is False and said["B", "Answer: A or B"] is False
    assert said["Paris", "The capital is Paris."] is True and said["0.5", "50%"] is True
