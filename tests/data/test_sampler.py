"""The order: a pure function of seed and step (trap 32); validation keeps its last batch (trap 33)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.data.sampler import PromptSampler, batches, permutation
from steepest.errors import ConfigError, DataError


def test_the_order_is_the_same_for_ever() -> None:
    # recorded once: a change here changes what every resumed run trains on
    assert permutation(10, "order 0 0") == [3, 8, 4, 2, 9, 0, 7, 6, 5, 1]
    assert PromptSampler(10, 3, shuffle=True, seed=0).indices(0) == [3, 8, 4]


@given(num=st.integers(1, 60), seed=st.integers(-5, 5))
@settings(deadline=None)
def test_a_permutation_holds_every_number_once(num: int, seed: int) -> None:
    assert sorted(permutation(num, f"{seed}")) == list(range(num))


@given(num=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 3), shuffle=st.booleans())
@settings(deadline=None)
def test_an_epoch_uses_no_row_twice_and_drops_less_than_a_batch(num: int, size: int, seed: int, shuffle: bool) -> None:
    if size > num:
        with pytest.raises(DataError):
            PromptSampler(num, size, shuffle=shuffle, seed=seed)
        return
    sampler = PromptSampler(num, size, shuffle=shuffle, seed=seed)
    assert sampler.steps_per_epoch == num // size
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        assert {sampler.epoch(step) for step in steps} == {epoch}
        rows = [row for step in steps for row in sampler.indices(step)]
        assert len(rows) == len(set(rows)) == num - num % size and set(rows) <= set(range(num))
        assert shuffle or rows == list(range(num - num % size))


@given(stop=st.integers(0, 11), seed=st.integers(0, 3))
@settings(deadline=None)
def test_a_run_goes_on_exactly_where_it_stopped(stop: int, seed: int) -> None:
    # 10 rows, batch 3: an epoch has 3 steps, so `stop` falls on, before and after three epoch boundaries
    whole = PromptSampler(10, 3, shuffle=True, seed=seed)
    want = [whole.indices(step) for step in range(12)]
    before, after = PromptSampler(10, 3, shuffle=True, seed=seed), PromptSampler(10, 3, shuffle=True, seed=seed)
    got = [before.indices(step) for step in range(stop)] + [after.indices(step) for step in range(stop, 12)]
    assert got == want
    assert [whole.indices(step) for step in reversed(range(12))] == want[::-1]


def test_epochs_and_seeds_differ() -> None:
    sampler = PromptSampler(100, 100, shuffle=True, seed=0)
    orders = [tuple(sampler.indices(step)) for step in range(3)]
    orders += [tuple(PromptSampler(100, 100, shuffle=True, seed=seed).indices(0)) for seed in (1, 2)]
    assert len(set(orders)) == 5


def test_what_a_caller_does_to_a_batch_does_not_reach_the_next() -> None:
    sampler = PromptSampler(6, 3, shuffle=False, seed=0)
    sampler.indices(0).clear()
    assert sampler.indices(0) == [0, 1, 2]


def test_too_few_rows_and_wrong_numbers() -> None:
    with pytest.raises(DataError, match="^train_batch_size=8 is more than the 5 training prompts.*=5 or less"):
        PromptSampler(5, 8)
    with pytest.raises(DataError, match="there are no training prompts"):
        PromptSampler(0, 8)
    with pytest.raises(ConfigError, match="^train_batch_size=0: expected a number above 0"):
        PromptSampler(5, 0)
    with pytest.raises(ValueError, match="step -1 is below 0"):
        PromptSampler(5, 1).indices(-1)


@given(num=st.integers(0, 50), size=st.one_of(st.none(), st.integers(1, 60)))
@settings(deadline=None)
def test_validation_batches_hold_every_row_once_in_order(num: int, size: int | None) -> None:
    parts = batches(num, size)
    assert [row for part in parts for row in part] == list(range(num))
    assert all(len(part) == size for part in parts[:-1]) and all(parts)


def test_the_last_validation_batch_is_kept() -> None:
    assert [len(part) for part in batches(1319, 256)] == [256, 256, 256, 256, 256, 39]
    assert [len(part) for part in batches(1319, None)] == [1319]
    assert batches(0, None) == []
    with pytest.raises(ConfigError, match="^val_batch_size=0"):
        batches(3, 0)
