"""Plans: in one process the cut that there always was, on several ranks as many passes and steps on each."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch

from steepest.core.aggregation import LossDenominators
from steepest.core.batch import Batch, RowStatus
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings, iterate_mini_batches, seed_of
from steepest.learner.update_plan import of_rows, plan_passes, plan_sequences, plan_update, spread

CUTS = {"rows": MicroBatches(rows=2), "tokens": MicroBatches(tokens=40), "whole": MicroBatches()}


def batch_of(seed: int, rows: int = 24, group: int = 3) -> Batch:
    """Rows in groups that share a prompt, of very unequal lengths; a third of the rows and one whole group left out."""
    g = torch.Generator().manual_seed(seed)

    def size(most: int) -> int:
        return int(torch.randint(1, most, (1,), generator=g))

    prompts = [[5] * size(9) for _ in range(rows // group)]
    batch = Batch.from_sequences(
        [prompts[row // group] for row in range(rows)],
        [[7] * size(30) for _ in range(rows)],
        group_ids=[row // group for row in range(rows)],
        truncated=[False] * rows,
    )
    batch.leave_out(torch.rand(rows, generator=g) < 1 / 3, RowStatus.TRUNCATED)
    batch.leave_out(torch.arange(rows) < group, RowStatus.EQUAL_GROUP)
    return batch


@pytest.mark.parametrize("cut", CUTS)
def test_one_process_has_the_cut_of_its_mini_batches(cut):
    """Written out: rows with a token in the order of the mini-batch, cut by their lengths."""
    settings = UpdateSettings(mini_batch_rows=8, micro=CUTS[cut], epochs=2, shuffle=True, seed=3)
    batch = batch_of(0)
    (plan,) = plan_update(batch, settings, step=5)
    assert plan.ranks == 1 and len(plan.mini_batches) == settings.num_updates(len(batch)) == 6
    for number, (mini, rows) in enumerate(zip(plan.mini_batches, iterate_mini_batches(24, settings, 5), strict=True)):
        mask = batch.loss_mask[rows]
        used = [row for row, some in zip(rows.tolist(), mask.any(1).tolist(), strict=True) if some]
        parts = CUTS[cut].split([int(batch.lengths[row]) for row in used])
        assert mini.rows == tuple(rows.tolist()) and mini.seed == seed_of(3, 5, number)
        assert mini.micro == tuple(tuple(used[i] for i in part) for part in parts)
        assert mini.denominators == LossDenominators.of(mask)


@pytest.mark.parametrize("shares_prompts", [False, True])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_have_as_many_steps_and_micro_batches_and_each_row_once(ranks, cut, shares_prompts):
    """Traps 35 and 36."""
    settings = UpdateSettings(mini_batch_rows=6, micro=CUTS[cut], shuffle=not shares_prompts)
    for seed in range(5):
        batch = batch_of(seed)
        (alone,) = plan_update(batch, settings, 1, shares_prompts=shares_prompts)
        plans = plan_update(batch, settings, 1, ranks=ranks, shares_prompts=shares_prompts)
        assert len(plans) == ranks and {plan.ranks for plan in plans} == {ranks}
        assert {len(plan.mini_batches) for plan in plans} == {len(alone.mini_batches)}
        for number, mini in enumerate(alone.mini_batches):
            parts = [plan.mini_batches[number] for plan in plans]
            assert {len(part.micro) for part in parts} == {max(len(part.micro) for part in parts)}
            assert any(all(part.micro) for part in parts), "no more empty ones than are needed"
            assert all((p.rows, p.denominators, p.seed) == (mini.rows, mini.denominators, mini.seed) for p in parts)
            rows = [row for part in parts for micro in part.micro for row in micro]
            assert sorted(rows) == sorted(row for micro in mini.micro for row in micro)
            if shares_prompts:
                homes = {(int(batch.group_ids[r]), rank) for rank, p in enumerate(parts) for m in p.micro for r in m}
                assert max(Counter(group for group, _ in homes).values()) == 1, "a group on one rank"


def test_a_mini_batch_without_a_token_is_in_no_plan():
    batch = batch_of(0)
    batch.leave_out(torch.arange(24) < 12, RowStatus.REJECTED)
    settings = UpdateSettings(mini_batch_rows=6)
    plans = plan_update(batch, settings, 1, ranks=2)
    assert [[min(mini.rows) for mini in plan.mini_batches] for plan in plans] == [[12, 18]] * 2
    # the seed is that of its place among all mini-batches, as if the first ones had been stepped
    assert [mini.seed for mini in plans[0].mini_batches] == [seed_of(42, 1, number) for number in (2, 3)]
    batch.leave_out(torch.ones(24, dtype=torch.bool), RowStatus.REJECTED)
    assert all(plan.mini_batches == () for plan in plan_update(batch, settings, 1, ranks=2))


def test_passes_are_planned_alike():
    batch = batch_of(1)
    used = batch.trained_mask.any(1).nonzero()[:, 0].tolist()
    for micro in CUTS.values():
        (alone,) = plan_passes(batch, micro, batch.trained_mask)
        assert sorted(row for part in alone for row in part) == used
        cuts = plan_passes(batch, micro, batch.trained_mask, ranks=3, every_row=True)
        assert len({len(cut) for cut in cuts}) == 1
        assert sorted(row for cut in cuts for part in cut for row in part) == list(range(24))
    cuts = plan_passes(batch.select([3]), MicroBatches(), batch.trained_mask[[3]], ranks=3, every_row=True)
    assert cuts == (((0,),), ((),), ((),))


def test_sequences_are_planned_by_their_lengths():
    assert plan_sequences([5, 9, 1], MicroBatches(tokens=10)) == (((0,), (1, 2)),)
    assert plan_sequences([5, 9, 1], MicroBatches(tokens=10), ranks=2) == (((1,),), ((0, 2),))
    assert plan_sequences([5, 9, 1], MicroBatches(rows=1), ranks=2) == (((0,), (2,)), ((1,), ()))


def test_units_go_to_the_rank_with_the_least_so_far():
    assert spread([3, 1, 5, 2], range(4), 2) == [[1, 2], [0, 3]]
    assert spread([3, 1, 5, 2], [7, 8, 7, 8], 2) == [[0, 2], [1, 3]]
    assert spread([4], [0], 3) == [[0], [], []] and spread([], [], 2) == [[], []]
    assert spread([1, 9], range(2), 1) == [[0, 1]]


def test_lengths_are_balanced_within_the_longest_row():
    for seed in range(5):
        batch = batch_of(seed, rows=48)
        cuts = plan_passes(batch, MicroBatches(), batch.response_mask, ranks=4)
        tokens = [sum(int(batch.lengths[row]) for part in cut for row in part) for cut in cuts]
        assert max(tokens) - min(tokens) <= int(batch.lengths.max())


def test_numbers_of_the_rows_of_a_cut():
    found = torch.arange(1.0, 5.0)
    assert of_rows(found, None) is found
    assert of_rows(found, ((0, 3), ())).tolist() == [1.0, 0.0, 0.0, 4.0]


def test_a_plan_is_sent_as_numbers():
    plans = plan_update(batch_of(0), UpdateSettings(mini_batch_rows=6), 1, ranks=2)
    assert pickle.loads(pickle.dumps(plans)) == plans
    assert len(pickle.dumps(plans[0])) < 2000


def test_the_order_of_the_update_is_the_shuffle_of_seed_and_step():
    batch, settings = batch_of(0), UpdateSettings(mini_batch_rows=6, shuffle=True)
    first, again, later = (plan_update(batch, settings, step)[0] for step in (1, 1, 2))
    assert first == again != later
    assert first != plan_update(batch, replace(settings, seed=1), 1)[0]
