"""Which rows go through a model together, decided for all ranks at once and before any model runs.

The ranks of a sharded model gather weights and sum gradients in every pass. If one of them makes a pass less than the
others, all wait for ever. So the driver plans the passes of all ranks: every rank has the same number of optimizer
steps, of micro-batches in each, and of passes without a gradient. Where a rank has no rows left its micro-batch is
empty: one forward and one backward pass of a single token, whose loss is 0. In one process none is empty.

Plans are numbers: they are pickled to a worker as they are. Every rank holds the whole batch, of which its plan names
rows; rows that no loss and no pass needs are in no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.aggregation import LossDenominators
from steepest.core.batch import Batch
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings, iterate_mini_batches, seed_of

Cut = tuple[tuple[int, ...], ...]
"""The passes of one rank: of each, the rows of the batch that go through the model together; () for an empty one."""


@dataclass(frozen=True)
class MiniBatch:
    """One optimizer step, as one rank takes it."""

    rows: tuple[int, ...]
    """Rows of the batch that share the step, those of all ranks, in the order of the update."""
    micro: Cut
    """This rank's rows with a token of loss_mask, in micro-batches."""
    denominators: LossDenominators
    """Of the whole mini-batch, over all ranks."""
    seed: int
    """Of the random choices of a loss."""


@dataclass(frozen=True)
class UpdatePlan:
    """The optimizer steps of one update, as one rank takes them. Example: 3 rows of which row 1 is left out, two
    optimizer steps a batch, 2 ranks.

        mini-batches of 2 rows      rank 0                  rank 1
        rows (0, 1)                 micro ((0,),)           micro ((),)
        rows (2,)                   micro ((2,),)           micro ((),)
    """

    mini_batches: tuple[MiniBatch, ...]
    """Those with a token of loss_mask on some rank, epoch after epoch."""
    ranks: int = 1


def plan_update(
    batch: Batch, settings: UpdateSettings, step: int, *, ranks: int = 1, shares_prompts: bool = False
) -> tuple[UpdatePlan, ...]:
    """The plan of each rank for the update of training step `step`. Reads lengths, group_ids and loss_mask.

    The rows of a mini-batch are spread over the ranks so that each has about as much to compute; with
    `shares_prompts` the rows of a group stay together. A mini-batch without a token of loss_mask is in no plan.
    """
    plans: list[list[MiniBatch]] = [[] for _ in range(ranks)]
    for number, rows in enumerate(iterate_mini_batches(len(batch), settings, step)):
        mask = batch.loss_mask[rows]
        if not mask.any():
            continue
        denominators, seed = LossDenominators.of(mask), seed_of(settings.seed, step, number)
        cuts = _cut(batch, rows[mask.any(dim=1)], settings.micro, ranks, shares_prompts)
        for plan, micro in zip(plans, cuts, strict=True):
            plan.append(MiniBatch(tuple(rows.tolist()), micro, denominators, seed))
    return tuple(UpdatePlan(tuple(plan), ranks) for plan in plans)


def plan_passes(
    batch: Batch,
    micro: MicroBatches,
    mask: Tensor,
    *,
    ranks: int = 1,
    every_row: bool = False,
    shares_prompts: bool = False,
) -> tuple[Cut, ...]:
    """The passes of each rank over the whole batch, without an optimizer step. Reads lengths and group_ids.

    mask is (B, T) bool, the targets of the passes. Rows without one are left out unless `every_row`: they have no
    log-prob and no value.
    """
    rows = torch.arange(len(batch)) if every_row else mask.any(dim=1).nonzero()[:, 0]
    return _cut(batch, rows, micro, ranks, shares_prompts)


def plan_sequences(lengths: Sequence[int], micro: MicroBatches, *, ranks: int = 1) -> tuple[Cut, ...]:
    """The passes of each rank over sequences of these lengths, such as the examples of supervised training."""
    shares = spread([1] * len(lengths) if micro.rows is not None else lengths, range(len(lengths)), ranks)
    return _of_equal_number([_picked(share, micro.split([lengths[i] for i in share])) for share in shares])


def of_rows(found: Tensor, cut: Cut | None) -> Tensor:
    """(B, ...) numbers of the rows that `cut` names, 0 in the others; all of them where it is None."""
    if cut is None:
        return found
    rows = [row for part in cut for row in part]
    kept = torch.zeros_like(found)
    kept[rows] = found[rows]
    return kept


def spread(costs: Sequence[int], units: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices 0..n-1 for each rank, ascending: the most expensive unit first, always to the rank with the least so far.

    units[i] names the unit of index i: what has one name stays on one rank.
    """
    if ranks == 1:
        return [list(range(len(costs)))]
    totals: dict[int, int] = {}
    for cost, unit in zip(costs, units, strict=True):
        totals[unit] = totals.get(unit, 0) + cost
    loads, rank_of = [0] * ranks, {}
    for unit in sorted(totals, key=lambda unit: -totals[unit]):
        rank = loads.index(min(loads))
        rank_of[unit] = rank
        loads[rank] += totals[unit]
    return [[i for i, unit in enumerate(units) if rank_of[unit] == rank] for rank in range(ranks)]


def _cut(batch: Batch, rows: Tensor, micro: MicroBatches, ranks: int, shares_prompts: bool) -> tuple[Cut, ...]:
    """The micro-batches of each rank, which together hold `rows`, as many on each rank."""
    lengths, groups = batch.lengths[rows].tolist(), batch.group_ids[rows].tolist()
    costs = [1] * len(lengths) if micro.rows is not None else lengths
    shares = spread(costs, groups if shares_prompts else range(len(lengths)), ranks)
    return _of_equal_number([_cut_rows(batch, rows[share], micro, shares_prompts) for share in shares])


def _cut_rows(batch: Batch, rows: Tensor, micro: MicroBatches, shares_prompts: bool) -> list[tuple[int, ...]]:
    if not shares_prompts:
        return _picked(rows.tolist(), micro.split(batch.lengths[rows].tolist()))
    fields = (batch.prompt_lengths, batch.response_lengths, batch.group_ids)
    return _picked(rows.tolist(), micro.split_groups(*(field[rows].tolist() for field in fields)))


def _picked(rows: Sequence[int], parts: list[list[int]]) -> list[tuple[int, ...]]:
    return [tuple(rows[i] for i in part) for part in parts]


def _of_equal_number(cuts: list[list[tuple[int, ...]]]) -> tuple[Cut, ...]:
    """Filled up with empty micro-batches to the longest."""
    most = max(len(cut) for cut in cuts)
    return tuple((*cut, *[()] * (most - len(cut))) for cut in cuts)
