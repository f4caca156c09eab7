"""Two and three ranks make one process's update: as many passes on each, the same metrics, the same weights.

A rank that made a pass less than the others would leave them waiting for it (trap 35), one without rows too (trap 36);
here the deadline of the barrier fails the test instead.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch, RowStatus
from steepest.data.sft import SFTExample
from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import Optimizer, OptimSettings
from steepest.learner.reference import Reference
from steepest.learner.supervised import Supervised, plan_examples
from steepest.learner.trainable import ComputeSettings
from steepest.learner.update_plan import plan_passes, plan_update
from tests.learner.ranks import RankReducer, on_ranks, sum_gradients
from tests.learner.test_lora import adapter_critic, head_critic, lora_actor
from tests.learner.test_policy_losses import parts_of
from tests.support.learner_parts import (
    CPU,
    VANILLA,
    make_actor,
    make_batch,
    make_critic,
    policy,
    weights,
    with_log_probs,
)
from tests.support.policy_losses import NAMES

ONE_ROW = MicroBatches(rows=1)
OPTIM = OptimSettings(lr=1e-3, eps=1e-3)
"""Adam's first step is the sign of a gradient unless eps is above it: the rounding of one near 0 would be a step."""
SETTINGS = UpdateSettings(mini_batch_rows=3, micro=ONE_ROW, epochs=2)


def uneven() -> Batch:
    """Mini-batches of 3, 3 and 2 rows, of which 2, 3 and 1 are trained: the last has no row for a second rank."""
    batch = make_batch()
    batch.leave_out(torch.arange(8) == 7, RowStatus.TRUNCATED)
    return batch


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=0, msg=name)


def same_metrics(found: list[dict[str, float]], wanted: dict[str, float]) -> None:
    assert all(metrics == found[0] for metrics in found), "every rank has the numbers of all"
    assert list(found[0]) == list(wanted)
    assert found[0] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def build(settings: UpdateSettings = SETTINGS, **more: Any) -> Actor:
    return make_actor(update=settings, optim=OPTIM, **more)


def on_each(ranks: int, make: Any, batch: Batch, settings: UpdateSettings = SETTINGS, step: int = 1) -> list[Any]:
    """(metrics, weights, passes forward and backward, the rank's batch, calls of the reducer) of each rank."""
    plans = plan_update(batch, settings, step, ranks=ranks)
    made = [make() for _ in range(ranks)]  # not in the threads, which share torch's random state

    def job(reducer: RankReducer) -> Any:
        trainable, own = made[reducer.rank], replace(batch)
        counts = sum_gradients(trainable, reducer)
        metrics = trainable.update_by(own, plans[reducer.rank])
        return metrics, weights(trainable), (counts.forward, counts.backward), own, reducer.calls

    return on_ranks(ranks, job)


@pytest.mark.parametrize("micro", [ONE_ROW, MicroBatches(tokens=15), MicroBatches()], ids=["rows", "tokens", "whole"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_an_actors_update_is_that_of_one_process(ranks, micro):
    settings = replace(SETTINGS, micro=micro, shuffle=True)
    loss = ActorLossSettings(entropy_coeff=0.01, use_kl_loss=True, loss_agg_mode="seq-mean-token-mean")
    make = partial(build, settings, loss=loss)
    batch = with_log_probs(uneven(), make(), shift=0.3)
    one = make()
    before = weights(one)
    wanted = one.update(replace(batch), step=1)
    found = on_each(ranks, make, batch, settings)
    same_metrics([metrics for metrics, *_ in found], wanted)
    assert wanted["actor/grad_norm"] > 0.01 and wanted["actor/ratio_max_dev_first"] > 0.1
    for _, tensors, passes, _, calls in found:
        close(tensors, weights(one))
        assert passes == found[0][2] and passes[0] == passes[1] > 0
        assert calls == found[0][4]
    assert max((tensor - before[name]).abs().max() for name, tensor in weights(one).items()) > 1e-4


def test_a_rank_without_rows_makes_the_passes_of_the_others():
    batch = with_log_probs(make_batch().select(slice(0, 1)), build(), shift=0.3)
    one = build()
    wanted = one.update(replace(batch), step=1)
    found = on_each(3, build, batch)
    same_metrics([metrics for metrics, *_ in found], wanted)
    for _, tensors, passes, *_ in found:
        assert passes == (2, 2)  # one of each epoch
        close(tensors, weights(one))


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_loss_is_that_of_one_process(name):
    """An empty micro-batch has a loss of 0 in all of them, and choices are made over all ranks' tokens."""
    make = partial(build, **parts_of(name))
    batch = with_log_probs(uneven(), make(), shift=0.3)
    one = make()
    wanted = one.update(replace(batch), step=1)
    found = on_each(2, make, batch)
    same_metrics([metrics for metrics, *_ in found], wanted)
    for _, tensors, *_ in found:
        close(tensors, weights(one))


def test_the_exact_kl_is_that_of_one_process():
    def make() -> Actor:
        actor = build(loss=ActorLossSettings(use_kl_loss=True, kl_loss_type="full", kl_loss_coef=0.5))
        actor.reference = Reference(policy(seed=5), compute=CPU)
        return actor

    batch, one = with_log_probs(uneven(), make(), shift=0.3), make()
    wanted = one.update(replace(batch), step=1)
    found = on_each(2, make, batch)
    assert wanted["actor/kl_loss"] > 1e-3
    same_metrics([metrics for metrics, *_ in found], wanted)
    for _, tensors, *_ in found:
        close(tensors, weights(one))


def test_each_rank_writes_the_old_log_probs_of_its_rows():
    settings = UpdateSettings(mini_batch_rows=8, micro=ONE_ROW)
    make = partial(build, settings)
    batch = with_log_probs(uneven(), make())
    plain, without = replace(batch, old_log_probs=None), replace(batch, old_log_probs=None)
    make().update(plain, step=1)
    found = on_each(2, make, without, settings)
    parts = [own.old_log_probs for *_, own, _ in found]
    assert not any((part != 0).any(1).all() for part in parts)
    torch.testing.assert_close(parts[0] + parts[1], plain.old_log_probs)


def test_log_probs_of_the_ranks_are_those_of_one_process():
    batch = uneven()
    wanted, entropies, squares = build().log_probs_and_squares(batch)
    cuts = plan_passes(batch, MicroBatches(tokens=15), batch.trained_mask, ranks=4)

    found = [build().log_probs_and_squares(batch, cut) for cut in cuts]
    for mine, want in zip(
        (sum(parts) for parts in zip(*found, strict=True)), (wanted, entropies, squares), strict=True
    ):
        torch.testing.assert_close(mine, want)
    reference = Reference(policy(), compute=CPU)
    parts = [reference.log_probs(batch, cut) for cut in cuts]
    torch.testing.assert_close(sum(parts), reference.log_probs(batch))


# -- critics -------------------------------------------------------------------------------------------------------


def critic(settings: UpdateSettings = SETTINGS) -> Critic:
    made = make_critic(zero_head=False)
    made.optimizer, made.settings = Optimizer(made.model.named_parameters(), OPTIM), settings
    return made


def moved_adapter_critic(settings: UpdateSettings = SETTINGS) -> Critic:
    made = adapter_critic(lora_actor(), micro=ONE_ROW, mini=8)
    torch.manual_seed(1)
    for name, parameter in made.model.saved_parameters():
        if "lora_B" in name or "head" in name or "score" in name:
            nn.init.normal_(parameter, std=0.3)
    made.optimizer, made.settings = Optimizer(made.model.saved_parameters(), OPTIM), settings
    return made


@pytest.mark.parametrize("make", [critic, moved_adapter_critic])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_critics_update_is_that_of_one_process(make, ranks):
    batch, one = uneven(), make()
    wanted = one.update(batch, step=1)
    found = on_each(ranks, make, batch)
    same_metrics([metrics for metrics, *_ in found], wanted)
    for _, tensors, passes, *_ in found:
        assert passes == found[0][2] and passes[0] > 0
        close(tensors, weights(one))


@pytest.mark.parametrize("make", [critic, moved_adapter_critic])
def test_values_with_a_gradient_are_those_of_one_process(make):
    settings = UpdateSettings(mini_batch_rows=8, micro=ONE_ROW)
    rewards = torch.randn(uneven().responses.shape, generator=torch.Generator().manual_seed(5))
    batch = replace(uneven(), token_level_rewards=rewards, values=None, returns=None)
    call = EstimatorCall("gae", {"gamma": 0.9, "lam": 0.8})
    cuts = plan_passes(batch, ONE_ROW, batch.trained_mask, ranks=4)
    assert any(() in cut for cut in cuts)

    def one_pass(made: Critic, cut: Any) -> tuple[Any, Any]:
        found = made.values_and_gradient(batch, call, cut)
        values, final_values = made.reducer.sum(found.values), made.reducer.sum(found.final_values)
        known = replace(batch, values=values, final_values=final_values)
        return found, replace(known, returns=torch.where(batch.loss_mask, call.returns_of(known), 0.0))

    one = make(settings)
    wanted, known = one_pass(one, None)
    metrics = one.step_on_gradient(known, wanted)
    replicas = [make(settings) for _ in range(4)]

    def job(reducer: RankReducer) -> Any:
        made = replicas[reducer.rank]
        counts = sum_gradients(made, reducer)
        found, known = one_pass(made, cuts[reducer.rank])
        return made.step_on_gradient(known, found), weights(made), (counts.forward, counts.backward), known

    ranks = on_ranks(4, job)
    same_metrics([found for found, *_ in ranks], metrics)
    for _, tensors, passes, mine in ranks:
        assert passes == ranks[0][2] and passes[0] == passes[1] > 0
        close(tensors, weights(one))
        torch.testing.assert_close(mine.values, known.values)


def test_values_of_the_ranks_are_those_of_one_process():
    batch = uneven()
    wanted, final = critic().values(batch)
    cuts = plan_passes(batch, MicroBatches(), batch.trained_mask, ranks=3, every_row=True)
    found = [critic().values(batch, cut) for cut in cuts]
    torch.testing.assert_close(sum(values for values, _ in found), wanted)
    torch.testing.assert_close(sum(final_values for _, final_values in found), final)


def test_a_value_head_on_the_base_is_that_of_one_process():
    batch = uneven()

    def make() -> Critic:
        made = head_critic(lora_actor())
        made.optimizer, made.settings = Optimizer(made.model.saved_parameters(), OPTIM), SETTINGS
        return made

    one = make()
    wanted = one.update(batch, step=1)
    found = on_each(2, make, batch)
    same_metrics([metrics for metrics, *_ in found], wanted)
    for _, tensors, *_ in found:
        close(tensors, weights(one))
    cuts = plan_passes(batch, MicroBatches(), batch.trained_mask, ranks=2, every_row=True)
    parts = [make().values(batch, cut)[0] for cut in cuts]
    torch.testing.assert_close(sum(parts), make().values(batch)[0])


# -- supervised, optimizer --------------------------------------------------------------------------------------------


def test_supervised_training_is_that_of_one_process():
    examples = [SFTExample(f"rows:{i}", list(range(1, 3 + i)), [False] * (1 + i) + [True]) for i in range(4)]
    examples.append(SFTExample("rows:none", [1, 2, 3], [True, False, False]))

    def make() -> Supervised:
        return Supervised(policy(), compute=CPU, optim=OPTIM, micro=ONE_ROW)

    one = make()
    wanted, loss = one.update(examples), one.evaluate(examples)
    cuts = plan_examples(examples, ONE_ROW, ranks=3)
    assert [len(cut) for cut in cuts] == [2, 2, 2] and () in cuts[2]

    replicas = [make() for _ in range(3)]

    def job(reducer: RankReducer) -> Any:
        made = replicas[reducer.rank]
        counts = sum_gradients(made, reducer)
        metrics = made.update(examples, cuts[reducer.rank])
        return metrics, weights(made), (counts.forward, counts.backward), made.evaluate(examples, cuts[reducer.rank])

    found = on_ranks(3, job)
    same_metrics([metrics for metrics, *_ in found], wanted)
    same_metrics([after for *_, after in found], loss)
    for _, tensors, passes, _ in found:
        assert passes == (2, 2)
        close(tensors, weights(one))


def test_all_ranks_skip_the_step_that_one_cannot_take():
    """Trap 42. Each rank sees its own gradient only, and a maximum that lets no NaN through."""

    def job(reducer: RankReducer) -> Any:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = Optimizer([("p", parameter)], OptimSettings(lr=0.1))
        taken = []
        for bad in (None, 1, 0, None):
            parameter.grad = torch.full((3,), math.nan if reducer.rank == bad else 1.0 + reducer.rank)
            taken.append(optimizer.step(reducer)[1])
        return taken, optimizer.num_skipped, parameter.detach().clone()

    first, second = on_ranks(2, job)
    assert first[0] == second[0] == [True, False, False, True] and first[1] == second[1] == 2
    assert torch.equal(first[2], second[2]), "clipped by one norm"


def test_a_rank_that_makes_a_call_more_fails_instead_of_waiting(monkeypatch):
    """The harness itself: what would hang is seen."""
    monkeypatch.setattr("tests.learner.ranks.DEADLINE_SECONDS", 0.5)

    def job(reducer: RankReducer) -> None:
        for _ in range(1 + reducer.rank):
            reducer.sum(torch.ones(1))
            reducer.max(torch.ones(1))

    with pytest.raises(threading.BrokenBarrierError):
        on_ranks(2, job)


def test_in_one_process_no_micro_batch_is_empty():
    batch = uneven()
    for micro in (ONE_ROW, MicroBatches(tokens=15), MicroBatches()):
        (plan,) = plan_update(batch, replace(SETTINGS, micro=micro), 1)
        assert all(part for mini in plan.mini_batches for part in mini.micro)
        assert all(plan_passes(batch, micro, batch.trained_mask)[0])


def test_gradient_checkpointing_runs_empty_micro_batches_too():
    make = partial(build, compute=ComputeSettings(gradient_checkpointing=True), policy_loss=VANILLA)
    batch, one = with_log_probs(uneven(), make(), shift=0.3), make()
    one.update(replace(batch), step=1)
    for _, tensors, *_ in on_each(2, make, batch):
        close(tensors, weights(one))
