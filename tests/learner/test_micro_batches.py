from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steepest.core.batch import Batch
from steepest.learner.micro_batches import MicroBatches, split, split_groups
from steepest.learner.mini_batches import UpdateSettings, iterate_mini_batches
from steepest.learner.trainable import move


def test_extras_go_to_the_device_with_the_batch():
    batch = Batch.from_sequences([[1]], [[2]], group_ids=[0], truncated=[False])
    batch.extras = {"one": torch.ones(1)}
    moved = move(batch, torch.device("meta"))
    assert moved.responses.device.type == moved.extras["one"].device.type == "meta"
    assert batch.extras["one"].device.type == "cpu"


def test_rows_are_neighbours_in_order():
    assert split([9, 1, 5, 5, 2], rows=2) == [[0, 1], [2, 3], [4]]
    assert split([], rows=2) == []


def test_token_bins_are_filled_longest_first():
    # order by length 9, 5, 5, 2, 1 with room 10: [9] -> [5, 5] -> the 2 opens a third bin -> the 1 joins the 9
    assert split([9, 1, 5, 5, 2], tokens=10) == [[0, 1], [2, 3], [4]]


def test_a_sequence_over_the_budget_goes_alone():
    assert split([3, 40, 3], tokens=6) == [[0, 2], [1]]


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_every_row_once_and_no_bin_over_the_budget(lengths, budget):
    bins = split(lengths, tokens=budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget or len(b) == 1 for b in bins)
    # no two bins could have been one: at most one bin is no more than half full
    assert sum(sum(lengths[i] for i in b) * 2 <= budget for b in bins) <= 1


def test_rows_win_over_tokens_and_bad_numbers_are_refused():
    assert MicroBatches(rows=1, tokens=100).split([1, 1]) == [[0], [1]]
    assert MicroBatches(tokens=100).split([1, 1]) == [[0, 1]]
    with pytest.raises(ValueError, match="rows=0: must be at least 1"):
        MicroBatches(rows=0)
    with pytest.raises(ValueError, match="need a number of rows"):
        MicroBatches(tokens=None)
    with pytest.raises(ValueError, match="not both"):
        split([1], rows=1, tokens=1)


def test_mini_batches_are_contiguous_and_the_last_may_be_smaller():
    settings = UpdateSettings(mini_batch_rows=4, epochs=2)
    found = [rows.tolist() for rows in iterate_mini_batches(10, settings, iteration=3)]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert settings.num_updates(10) == 6


def test_shuffle_is_a_function_of_seed_iteration_and_epoch():
    def order(seed, iteration, epochs=1):
        settings = UpdateSettings(mini_batch_rows=50, epochs=epochs, shuffle=True, seed=seed)
        return [rows.tolist() for rows in iterate_mini_batches(50, settings, iteration)]

    torch.manual_seed(0)
    first = order(1, 2)
    torch.manual_seed(1)  # the global generator has no say
    assert order(1, 2) == first
    assert sorted(first[0]) == list(range(50)) != first[0]
    assert order(2, 1) != first and order(1, 3) != first
    one, two = order(1, 2, epochs=2)
    assert one == first[0] and two != one


def test_groups_stay_together_and_their_prompt_counts_once():
    # prompts of 10 and 20 tokens; group 0 costs 10 + 3 * 5, group 1 20 + 2 * 5
    prompts, responses, groups = [10, 20, 10, 20, 10], [5] * 5, [0, 1, 0, 1, 0]
    assert split_groups(prompts, responses, groups, tokens=55) == [[0, 1, 2, 3, 4]]
    assert split_groups(prompts, responses, groups, tokens=54) == [[0, 2, 4], [1, 3]]


def test_a_group_larger_than_the_budget_is_cut_and_each_piece_has_the_prompt():
    # two responses with the prompt are 20 tokens; a budget below one row gives each row a pass of its own
    prompts, responses, groups = [10] * 5, [5] * 5, [0] * 5
    assert split_groups(prompts, responses, groups, tokens=20) == [[0, 1], [2, 3], [4]]
    assert split_groups(prompts, responses, groups, tokens=1) == [[0], [1], [2], [3], [4]]
    assert MicroBatches(tokens=20).split_groups(prompts, responses, groups) == [[0, 1], [2, 3], [4]]
    assert MicroBatches(rows=3).split_groups(prompts, responses, groups) == [[0, 1, 2], [3, 4]]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=20),
    st.integers(1, 120),
)
def test_every_row_of_a_group_occurs_once_and_no_pass_exceeds_the_budget(rows, tokens):
    sizes = [4, 9, 1, 17]
    groups, responses = [g for g, _ in rows], [n for _, n in rows]
    bins = split_groups([sizes[g] for g in groups], responses, groups, tokens=tokens)
    assert sorted(row for found in bins for row in found) == list(range(len(rows)))
    for found in bins:
        cost = sum(responses[row] for row in found) + sum(sizes[g] for g in {groups[row] for row in found})
        assert cost <= tokens or len(found) == 1
