"""Admission in groups, and the arithmetic of the KV budget."""

from __future__ import annotations

import pytest

from steepest.errors import RolloutError
from steepest.rollout.builtin.scheduler import Scheduler, num_slots_for


def rows(groups):
    return [g.rows for g in groups]


def test_equal_prompts_share_one_prefill_and_rows_keep_their_numbers():
    scheduler = Scheduler([[1, 2], [3], [1, 2]], n=2, num_slots=8)
    groups = scheduler.admit(0, 100)
    assert [(g.prompt, g.rows) for g in groups] == [((1, 2), (0, 1, 4, 5)), ((3,), (2, 3))]
    assert not scheduler


def test_groups_are_admitted_whole_and_cut_only_when_larger_than_all_slots():
    scheduler = Scheduler([[1], [2]], n=3, num_slots=4)
    assert rows(scheduler.admit(0, 100)) == [(0, 1, 2)]
    assert scheduler.admit(3, 100) == []
    assert rows(scheduler.admit(1, 100)) == [(3, 4, 5)]
    cut = Scheduler([[1]], n=5, num_slots=2)
    assert rows(cut.admit(0, 100)) == [(0, 1)] and rows(cut.admit(0, 100)) == [(2, 3)]
    assert rows(cut.admit(0, 100)) == [(4,)]


def test_prefill_tokens_bound_a_pass_but_one_prompt_always_fits():
    scheduler = Scheduler([[1] * 5, [2] * 3, [3] * 3], n=1, num_slots=8)
    assert rows(scheduler.admit(0, 4)) == [(0,)]
    assert rows(scheduler.admit(1, 6)) == [(1,), (2,)]


def test_admission_waits_for_an_eighth_of_the_slots_or_for_as_many_as_wait():
    scheduler = Scheduler([[i] for i in range(20)], n=1, num_slots=16)
    assert len(scheduler.admit(0, 100)) == 16
    assert scheduler.admit(15, 100) == []
    assert len(scheduler.admit(14, 100)) == 2
    assert len(scheduler.admit(13, 1)) == 1  # the token limit left one waiting
    assert len(scheduler.admit(15, 100)) == 1


def test_slots_are_the_least_of_budget_rows_and_limit():
    assert num_slots_for(10, 100, 64, bytes_per_token=8, kv_memory_bytes=80 * 20) == 20
    assert num_slots_for(10, 7, 64, bytes_per_token=8, kv_memory_bytes=80 * 20) == 7
    assert num_slots_for(10, 100, 5, bytes_per_token=8, kv_memory_bytes=80 * 20) == 5


def test_a_budget_below_one_sequence_names_numbers_and_keys():
    with pytest.raises(RolloutError) as error:
        num_slots_for(2048, 10, 64, bytes_per_token=1024, kv_memory_bytes=2**20)
    text = str(error.value)
    assert "1.0 MiB" in text and "2048 tokens needs 2.0 MiB" in text and "max_response_length" in text


def test_the_longest_prompts_come_first_and_equal_ones_in_their_order():
    scheduler = Scheduler([[1], [2, 2, 2], [3, 3], [4, 4]], n=1, num_slots=8)
    assert rows(scheduler.admit(0, 100)) == [(1,), (2,), (3,), (0,)]


def test_the_common_prefix_leaves_each_prompt_a_token_and_has_to_save_a_few_hundred():
    start = list(range(100))
    assert Scheduler([[*start, 7], [*start, 8, 9], [*start, 7, 7], [*start, 5]], 1, 8).common_prefix() == 100
    assert Scheduler([[*start, 7], start, [*start, 7, 7], [*start, 5]], 1, 8).common_prefix() == 99
    assert Scheduler([[*start, 7], [*start, 8]], 1, 8).common_prefix() == 0  # saves 100
    assert Scheduler([[*start, 7]] * 9, 5, 8).common_prefix() == 0  # one prompt, computed once anyway
    assert Scheduler([[i, *start] for i in range(9)], 1, 8).common_prefix() == 0
