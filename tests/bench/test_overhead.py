"""The split of a step into model calls and the rest: by a clock that is set by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bench.overhead import Clock, Split


class Hands:
    """Call it to let so many seconds pass; processor seconds are half of them."""

    def __init__(self):
        self.time = 0.0

    def __call__(self, seconds):
        self.time += seconds

    def clock(self):
        return Clock(now=lambda: (self.time, self.time / 2))


@pytest.fixture
def hands():
    return Hands()


def test_a_call_inside_a_call_counts_once_and_a_failed_one_too(hands):
    model = SimpleNamespace(inner=lambda: hands(2))
    model.outer = lambda: (hands(1), model.inner(), hands(1))
    model.fails = lambda: (hands(3), 1 / 0)
    clock = hands.clock()
    for name in ("inner", "outer", "fails"):
        clock.around(model, name)
    model.outer()
    assert clock.spent == (4.0, 2.0)
    model.inner()
    with pytest.raises(ZeroDivisionError):
        model.fails()
    assert clock.spent == (9.0, 4.5)


def test_the_share_is_of_the_step_and_its_logging_without_the_first_steps(hands):
    model, clock = SimpleNamespace(call=hands), hands.clock()
    clock.around(model, "call")
    split = Split(clock, skip=1)
    for model_seconds, rest in ((100, 100), (6, 1), (6, 1)):
        with split.part("step"):
            with split.part("gen"):
                model.call(model_seconds)
            hands(rest)
        with split.part("log"):
            hands(1)
    assert split.steps == 2
    assert split.whole["step"] == (14.0, 7.0) and split.inside["gen"] == (12.0, 6.0)
    assert split.whole["log"] == (2.0, 1.0)
    assert split.share(0) == split.share(1) == pytest.approx(1 - 12 / 16)
    assert "gen" in split.table() and "6000.0" in split.table()
