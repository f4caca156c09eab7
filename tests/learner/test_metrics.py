from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steepest.learner.metrics import Means, Sums


def test_token_means_add_up_over_micro_batches_and_ignore_masked_positions():
    sums = Sums()
    nan = float("nan")
    sums.add_token_mean("m", torch.tensor([[1.0, nan], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]]), 4.0)
    sums.add_token_mean("m", torch.tensor([[7.0, nan]]), torch.tensor([[True, False]]), 4.0)
    sums.take_max("x", torch.tensor(2.0))
    sums.take_max("x", torch.tensor(1.0))
    assert sums.read() == {"m": 4.0, "x": 2.0}  # (1 + 3 + 5 + 7) / 4


def test_means_are_over_the_mini_batches_that_have_the_number():
    means = Means()
    means.add({"a": 1.0, "b": 4.0})
    means.add({"a": 2.0})
    means.count("skipped", 0)
    means.count("skipped", 1)
    assert means.read() == {"a": pytest.approx(1.5), "b": 4.0, "skipped": 1.0}


def test_sums_are_read_over_ranks_and_maxima_apart():
    """Here both ranks have the same numbers: sums double, maxima stay."""

    class Twice:
        def sum(self, value: Tensor) -> Tensor:
            return 2 * value

        def max(self, value: Tensor) -> Tensor:
            return value

    sums = Sums()
    sums.add("a", torch.tensor(1.0))
    sums.take_max("m", torch.tensor(3.0))
    sums.add("b", torch.tensor(2.0))
    assert sums.read(Twice()) == {"a": 2.0, "b": 4.0, "m": 3.0} and sums.read() == {"a": 1.0, "b": 2.0, "m": 3.0}
    assert Sums().read(Twice()) == {}
