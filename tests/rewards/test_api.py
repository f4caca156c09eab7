"""What counts as a score."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from steepest.rewards.api import read_outcome


@pytest.mark.parametrize(
    ("outcome", "score"),
    [
        (1.5, 1.5),
        (0.0, 0.0),
        (0, 0.0),
        (-3, -3.0),
        (True, 1.0),
        (False, 0.0),
        (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.bool_(True), 1.0),
        (np.array(0.75), 0.75),
    ],
)
def test_numbers_are_scores(outcome, score):
    assert read_outcome(outcome) == (score, {})
    assert read_outcome({"score": outcome}) == (score, {})
    assert type(read_outcome(outcome)[0]) is float


def test_a_tensor_of_no_dimension_is_a_number():
    torch = pytest.importorskip("torch")
    assert read_outcome(torch.tensor(0.125)) == (0.125, {})
    with pytest.raises(TypeError, match="returned Tensor"):
        read_outcome(torch.tensor([0.125]))


@pytest.mark.parametrize(
    ("outcome", "error", "words"),
    [
        (None, TypeError, "returned None as a score"),
        ("1.0", TypeError, "returned str '1.0' as a score"),
        ([1.0], TypeError, "returned list"),
        (np.array([1.0]), TypeError, "returned ndarray"),
        (1j, TypeError, "returned complex"),
        (Decimal("1"), TypeError, "returned Decimal"),
        (float("nan"), ValueError, "nan as a score"),
        (float("inf"), ValueError, "inf as a score"),
        (np.float64("-inf"), ValueError, "-inf as a score"),
        (10**400, ValueError, "inf as a score"),
        ({}, ValueError, "without 'score'"),
        ({"acc": 1.0, "b": 2}, ValueError, "it has ['acc', 'b']"),
        ({"score": None}, TypeError, "returned None as 'score'"),
        ({"score": 1.0, "acc": float("nan")}, ValueError, "nan as 'acc'"),
    ],
)
def test_what_is_no_finite_number_is_an_error(outcome, error, words):
    with pytest.raises(error) as caught:
        read_outcome(outcome)
    assert words in str(caught.value)


def test_numbers_beside_the_score_are_parts_and_the_rest_is_left_out():
    outcome = {"score": 1, "acc": True, "format": np.float64(0.5), "pred": "72", "trace": [1, 2], "none": None, 3: 4}
    assert read_outcome(outcome) == (1.0, {"acc": 1.0, "format": 0.5, "3": 4.0})


def test_importing_rewards_loads_nothing_heavy():
    code = (
        "import sys, steepest.rewards as r; assert 'gsm8k' in r.REWARDS.names(); "
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
