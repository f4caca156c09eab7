"""The grader of mathematics: spellings of one value, units, remarks about the answer, truths, and bounded cost."""

# ruff: noqa: RUF001 (signs that look like others are the subject)

from __future__ import annotations

from itertools import pairwise

import pytest

from steepest.rewards.api import REWARDS
from steepest.rewards.cost import MAX_BITS, MAX_CHARS, is_affordable, size
from steepest.rewards.evaluate import read, same_value
from steepest.rewards.graders.math import math, same
from steepest.rewards.spelling import latex_of
from steepest.rewards.structure import structure_of
from steepest.rewards.units import unit_of, without_unit


def score(answer: str, truth: object) -> float:
    return math("any", answer, truth)["score"]


ONE_VALUE = [
    ["12345", "12,345", "12,\\!345", "12\\,345", "12{,}345", "12 345", "12'345", "１２３４５", "12345.0", "1.2345e4"],
    ["10\\%", "10%", "10 percent", "10\\text{ percent}", "10 \\%", "１０％"],
    ["\\frac{1}{2}", "\\dfrac12", "\\tfrac{1}{2}", "{1 \\over 2}", "1/2", "½", "1⁄2", "0.5", ".5", "2^{-1}", "a half"],
    ["1\\frac{1}{2}", "1½", "1 1/2", "\\frac32", "1.5", "1 \\tfrac12"],
    ["2\\sqrt{3}", "2√3", "2*sqrt(3)", "\\sqrt{12}", "2\\cdot 3^{1/2}", "2 sqrt 3", "12**(1/2)"],
    ["2\\pi", "2π", "2𝜋", "2*pi", "2 pi", "\\pi + \\pi"],
    ["3\\times10^{5}", "3×10⁵", "3 x 10^5", "3e5", "300{,}000", "3*10^5"],
    ["x^2+1", "x²+1", "x**2 + 1", "1+x\\cdot x"],
    ["\\frac{1}{3}", "⅓", "0.333...", "0.\\overline{3}", "0.\\dot{3}", "0.333333", "33\\frac13\\%"],
    ["\\boldsymbol{13}", "\\bm{13}", "{\\bf 13}", "\\color{red}{13}", "\\mathit{13}", "thirteen", "13"],
    ["\\varnothing", "\\emptyset", "∅", "\\{\\}", "\\text{no solution}"],
    ["\\pm 3", "±3", "3, -3", "\\{-3, 3\\}", "x = 3 or x = -3"],
    ["[1,4)", "1 \\le x < 4", "\\left[1, 4\\right)", "1 ≤ x < 4"],
    ["x > 3", "3 < x", "(3, \\infty)", "x ＞ 3", "(3, ∞)"],
    ["101_2", "101_{2}", "101₂", "(101)_2", "101_{\\text{two}}"],
    ["3:4", "3 : 4", "6:8", "3 to 4", "\\frac34"],
    ["(2,-1)", "（2，−1）", "\\langle 2, -1\\rangle", "\\left(2,-1\\right)"],
    ["\\sqrt[3]{-8}", "-2", "∛(-8)"],
    ["y = 2x + 3", "2x - y + 3 = 0", "3 + 2x = y"],
    ["90^\\circ", "90°", "90^{\\circ}", "90 degrees", "90\\text{ deg}"],
]  # fmt: skip


@pytest.mark.parametrize("spellings", ONE_VALUE, ids=lambda spellings: spellings[0])
def test_each_spelling_of_a_value_is_met_by_each_other_one(spellings):
    pairs = [(one, spellings[0]) for one in spellings] + list(pairwise(spellings))
    assert [pair for pair in pairs if not same(*pair) or not same(*pair[::-1])] == []


UNEQUAL = [
    ("0", "10^{-9}"), ("0", "1e-300"), ("10^{-9}", "2\\cdot10^{-9}"), ("10^{-200}", "10^{-201}"), ("23", "2\\cdot 3"),
    ("\\frac12", "1½"), ("1½", "\\frac{11}{2}"), ("1\\frac12", "1\\cdot\\frac12"), ("\\pi", "3.14"),
    ("0.1", "10"), ("\\frac13", "0.3333"), ("1024", "1024.0005"), ("x^2+1", "x2+1"), ("101_2", "101"), ("3:4", "4:3"),
    ("2\\sqrt3", "2+\\sqrt3"), ("\\frac12", "0.500001"), ("x>3", "x\\ge3"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"),
    ("10^{20}", "10^{20}+1"), ("x", "\\sqrt{x^2}"), ("\\pm3", "3"), ("12", "1 2"), ("13", "\\text{not }13"),
    ("2t", "2"), ("72", "不是72"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), UNEQUAL)
def test_what_looks_alike_and_is_not_equal(one, other):
    assert not same(one, other) and not same(other, one)


def test_a_percentage_is_met_by_its_number_and_not_the_other_way_round():
    assert same("12", "12\\%") and not same("12\\%", "12") and same("0.12", "12\\%") and not same("0.12\\%", "12\\%")


@pytest.mark.parametrize(
    ("stated", "truth", "right"),
    [
        ("5\\text{ cm}", "5\\text{ cm}", True), ("5", "5\\text{ cm}", True), ("5\\text{ cm}", "5", True),
        ("5 centimetres", "5\\,\\mathrm{cm}", True), ("5cm", "5\\text{ cm}", True),
        ("5\\text{ m}", "5\\text{ cm}", False),
        ("5\\text{ m}", "5\\text{ m}^2", False), ("12 m²", "12\\text{ m}^2", True),
        ("500\\text{ cm}", "5\\text{ m}", False),
        ("60 miles per hour", "60\\text{ mph}", True), ("60\\text{ km/h}", "60\\text{ mph}", False),
        ("€5.40", "\\$5.40", False), ("5.40 dollars", "\\$5.40", True), ("10 apples", "10\\text{ oranges}", True),
        ("5\\%", "5\\text{ cm}", False), ("90^\\circ\\text{C}", "90^\\circ", False), ("12x", "12", False),
    ],
)  # fmt: skip
def test_a_unit_is_the_same_or_left_out(stated, truth, right):
    assert same(stated, truth) is right


def test_units_by_hand():
    assert without_unit("12\\text{m}^{2}") == ("12", "m^2") and without_unit("3x") == ("3x", "")
    assert [unit_of(words) for words in ("square metres", "cubic feet", "m/s^2", "apples")] == [
        "m^2",
        "ft^3",
        "m/s^2",
        "",
    ]


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("\\boxed{73}\n\nThe answer is verified.", "73", 1.0), ("\\boxed{73}\n#### Explanation\nIt is so.", "73", 1.0),
        ("\\boxed{73}\n#### Step by step", "73", 1.0), ("#### 73\nThe answer is correct!", "73", 1.0),
        ("\\boxed{x+1}. The answer is as above.", "x+1", 1.0), ("\\boxed{73}\nThe answer is **unique**.", "73", 1.0),
        ("\\boxed{\\text{Evelyn}}\nThe answer is verified.", "\\text{Evelyn}", 1.0),
        ("\\boxed{\\text{Evelyn}}\nThe answer is Angela.", "\\text{Evelyn}", 0.0),
        ("\\boxed{73}\nThe answer is 74.", "73", 0.0), ("\\boxed{73}\nThe answer is $x$.", "73", 0.0),
        ("The answer is seventy-three.", "73", 1.0), ("\\boxed{答案是73}", "73", 1.0), ("\\boxed{73个}", "73", 1.0),
        ("\\boxed{\\text{The answer is } 73}", "73", 1.0), ("Ответ: 73 рубля\n\\boxed{73\\text{ рубля}}", "73", 1.0),
    ],
)  # fmt: skip
def test_a_remark_about_the_answer_is_not_the_answer(answer, truth, right):
    assert score(answer, truth) == right


@pytest.mark.parametrize(
    ("truth", "answer"),
    [
        ("Answer: 180", "180"), ("#### 180", "180"), ("The answer is $\\frac12$.", "\\frac12"), ("\\boxed{180}", "180"),
        ("$180$", "180"), ("so it is 9.\n#### 180", "180"), (180, "180"), ("\\text{Monday}", "Monday"),
        ("∅", "\\emptyset"),
    ],
)  # fmt: skip
def test_a_truth_is_read_as_it_is_commonly_written(truth, answer):
    assert score(f"\\boxed{{{answer}}}", truth) == 1.0


@pytest.mark.parametrize(
    "truth", ["N/A", "?", "unknown", "...", "-", "The proof follows from the lemma by induction on n"]
)
def test_a_truth_that_is_no_answer_is_refused(truth):
    with pytest.raises(ValueError, match="ground_truth is .*, expected an answer such as"):
        REWARDS.get("math").facts["check_ground_truth"](truth)


DEAR = [
    "10^{99}!", "(10^{99})!", "9^{9^{9}}", "99999999!", "((9!)!)!", "5!!!", "\\binom{10^9}{5}", "\\exp(10^{6})",
    "\\sinh(99999)", "e^{e^{e^{e}}}", "10^{9999}", "(10^9)_{3}", "2^{99999}", "10^{-99999}", "1e99999", "1e-99999",
    "(x+1)^{100000}", "x^{x^{99}}", "\\sum_{n=1}^{10^9} n", "\\prod_{n=1}^9 n", "\\int_0^1 x dx", "\\lim_{x\\to 0} x",
    "\\operatorname{eye}(99999)", "\\Gamma(10^9)", "\\det A", "x!|_{x=10^{99}}",
    "\\begin{vmatrix}a&b\\\\c&d\\end{vmatrix}",
    "1" * 101, "(" * 11 + "1" + ")" * 11, "{" * 11 + "1" + "}" * 11, "\\sqrt{" * 11 + "2" + "}" * 11, "1+" * 120 + "1",
    "1" * (MAX_CHARS + 1), "10^{" * 9 + "9" + "}" * 9, "}" * 20 + "9^{9^{9}}", "((99!)!)^{2}", "\\frac{1}{999999!}",
]  # fmt: skip


@pytest.mark.parametrize("expression", DEAR, ids=lambda text: text[:24])
def test_what_would_take_long_is_refused_before_it_is_read(expression):
    assert not is_affordable(expression)
    misses = read.cache_info().misses
    assert read(expression) is None and read.cache_info().misses <= misses + 1
    assert score(f"\\boxed{{{expression}}}", "\\frac{1}{3}") == 0.0
    assert same(expression, expression)  # equal texts need no value


def test_sizes_by_hand():
    # 10^99 has 329 bits; 100! at most 100 log2(100) = 664; 2^100 has 100; 2^2^... reads the number that stands there
    assert 328 < size("10^{99}") < 330 and 664 < size("100!") < 665 and round(size("2^{100}")) == 100
    assert size("10^{99}!") == float("inf") and size("9^{9^{9}}") > MAX_BITS
    assert size("\\frac{1}{2}") == 2.0 and round(size("x^{18}")) == 36


def test_what_is_small_is_evaluated():
    for one, other in [
        ("100!", "99!\\cdot 100"), ("\\binom{10}{3}", "120"), ("2^{100}", "1267650600228229401496703205376"),
        ("(x+1)^{20}", "(1+x)^{20}"), ("10^{999}", "10^{1000}/10"), ("\\sqrt{3+2\\sqrt{2}}", "1+\\sqrt{2}"),
        ("\\sin^2 x", "1-\\cos^2 x"), ("\\log_2 3", "\\frac{\\ln 3}{\\ln 2}"), ("\\frac{1}{\\sqrt2-1}", "1+\\sqrt2"),
    ]:  # fmt: skip
        assert is_affordable(one) and same(one, other) and same(other, one), (one, other)
    # values that grow although the text is short end the evaluation, not the process
    assert not same_value(read("2^2^2^2^2^2^2"), read("2"))
    assert not same("10^{999}+1", "10^{999}")


def test_spelling_and_structure_by_hand():
    assert latex_of("1½ × √2 ≤ π") == "1\\frac{1}{2} \\times  \\sqrt{2} \\le  \\pi"
    assert latex_of("1.234,5") == "1234.5" and latex_of("(1,234)") == "(1,234)" and latex_of("1.234") == "1.234"
    assert latex_of("0.1666...") == "\\frac{15}{90}"
    assert structure_of("1 , 2").kind == "list" and structure_of("(1,2]").kind == "(]"  # type: ignore[union-attr]
