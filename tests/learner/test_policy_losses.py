"""Every policy loss through the actor: neither the cut into micro-batches nor a pass that is left out changes it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.core.policy_losses import POLICY_LOSSES, LossInputs
from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.metrics import Metrics
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.trainable import ComputeSettings
from tests.support.learner_parts import (
    left_out,
    make_actor,
    make_batch,
    record_gradients,
    same_bits,
    weights,
    with_log_probs,
)
from tests.support.policy_losses import NAMES, OPTIONS, loss_of

CUTS = {
    "1": MicroBatches(rows=1),
    "2": MicroBatches(rows=2),
    "all": MicroBatches(rows=100),
    "tokens": MicroBatches(tokens=15),
}
Gradients = dict[str, Tensor]


def parts_of(name: str) -> dict[str, Any]:
    """The loss with its options, and its choice if it makes one."""
    choose = POLICY_LOSSES.get(name).facts.get("choose")
    if choose is None:
        return {"policy_loss": loss_of(name)}
    taken = {key: value for key, value in OPTIONS[name].items() if key != "ppo_kl_coef"}
    return {"policy_loss": loss_of(name), "choose": partial(choose, **taken)}


def actor_with(name: str, micro: MicroBatches, **more: Any) -> Actor:
    loss = ActorLossSettings(loss_agg_mode=more.pop("mode", "token-mean"))
    update = UpdateSettings(mini_batch_rows=8, micro=micro, seed=more.pop("seed", 42))
    return make_actor(update=update, loss=loss, forward=MicroBatches(rows=8), **parts_of(name), **more)


def update(name: str, micro: MicroBatches, **more: Any) -> tuple[Gradients, Metrics]:
    actor = actor_with(name, micro, **more)
    batch = with_log_probs(make_batch(), actor, shift=0.3)
    gradients = record_gradients(actor)
    metrics = actor.update(batch, step=1)
    return gradients[0], metrics


def distance(found: Gradients, want: Gradients) -> float:
    assert found.keys() == want.keys()
    return max((found[name] - want[name]).abs().max().item() for name in want)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", NAMES)
def test_the_cut_into_micro_batches_changes_nothing(name: str, mode: str) -> None:
    """verl #7829: also where tokens are chosen over the batch."""
    want, want_metrics = update(name, CUTS["all"], mode=mode)
    assert max(g.abs().max().item() for g in want.values()) > 1e-3
    for cut in ("1", "2", "tokens"):
        found, metrics = update(name, CUTS[cut], mode=mode)
        assert distance(found, want) < 1e-6
        assert metrics == pytest.approx(want_metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_computed_once_a_group_change_nothing(name: str) -> None:
    """Rows of a group may go to several micro-batches there, but each of them is whole."""
    batch = replace(make_batch(), group_ids=torch.zeros(8, dtype=torch.long))
    same = replace(
        batch, prompts=batch.prompts[:1].expand(8, -1).contiguous(), prompt_lengths=batch.prompt_lengths[:1].expand(8)
    )
    found = []
    for compute in (ComputeSettings(), ComputeSettings(shares_prompts=True)):
        actor = actor_with(name, MicroBatches(tokens=15), compute=compute)
        filled = with_log_probs(same, make_actor(), shift=0.3)
        gradients = record_gradients(actor)
        actor.update(filled, step=1)
        found.append(gradients[0])
    assert distance(*found) < 1e-6


def choices(name: str, micro: MicroBatches, **more: Any) -> list[Tensor | None]:
    """What the loss was told of the choice, micro-batch by micro-batch."""
    actor, seen = actor_with(name, micro, **more), []
    inner = actor.policy_loss

    def watching(x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(x.chosen)
        return inner(x)

    actor.policy_loss = watching
    actor.update(with_log_probs(make_batch(), actor, shift=0.3), step=more.get("step", 1))
    return seen


@pytest.mark.parametrize(("name", "number"), [("kl_cov", 7), ("clip_cov", 7)])
def test_the_share_is_one_of_the_whole_mini_batch(name: str, number: int) -> None:
    # 35 policy tokens in make_batch: 0.2 of them is 7, not one or more of each of the 7 rows that have any
    tokens = int(make_batch().loss_mask.sum())
    assert int(0.2 * tokens) == number
    seen = choices(name, CUTS["1"])
    assert len(seen) == 7
    total = sum(int(chosen.sum()) for chosen in seen)
    assert total == number if name == "kl_cov" else 0 < total <= number
    assert choices(name, CUTS["all"]) == [None], "one micro-batch chooses for itself, without a pass before"


def test_a_choice_costs_one_pass_where_there_are_several_micro_batches() -> None:
    for name, cut, passes in (("kl_cov", "2", 2), ("kl_cov", "all", 1), ("vanilla", "2", 1)):
        actor = actor_with(name, CUTS[cut])
        batch, calls = with_log_probs(make_batch(), actor), []
        actor.model.hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        actor.update(batch, step=1)
        parts = len(actor.cut(batch, CUTS[cut], batch.loss_mask))
        assert len(calls) == passes * parts, (name, cut)


def test_clip_covs_draw_follows_the_seed_the_step_and_the_mini_batch() -> None:
    def drawn(seed: int, step: int) -> list[int]:
        actor, seeds = actor_with("clip_cov", CUTS["all"], seed=seed), []
        inner = actor.policy_loss

        def watching(x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
            seeds.append(x.seed)
            return inner(x)

        actor.policy_loss = watching
        actor.settings = replace(actor.settings, mini_batch_rows=4)
        actor.update(with_log_probs(make_batch(), actor), step=step)
        return seeds

    first = drawn(42, 1)
    assert drawn(42, 1) == first and len({*first, *drawn(42, 2), *drawn(43, 1)}) == 6


@pytest.mark.parametrize("cut", ["2", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_the_pass_before_a_single_update_is_redundant(name: str, cut: str) -> None:
    """old_log_probs None: the update's own stand in, for the loss and for its choice."""
    passed, skipped = actor_with(name, CUTS[cut]), actor_with(name, CUTS[cut])
    batch = with_log_probs(make_batch(), passed)
    want = passed.update(batch, step=1)
    without = replace(batch, old_log_probs=None)
    found = skipped.update(without, step=1)
    assert (without.old_log_probs - batch.old_log_probs).abs().max() < 1e-5
    assert found == pytest.approx(want, abs=1e-5)
    pairs = zip(passed.model.parameters(), skipped.model.parameters(), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) < 1e-6


def test_on_policy_all_losses_take_the_same_step_but_for_what_clip_cov_takes_out() -> None:
    """One advantage a row, ratio 1: one gradient."""

    def gradient(name: str) -> Gradients:
        actor = actor_with(name, CUTS["2"], mode="seq-mean-token-mean")
        batch = with_log_probs(make_batch(), actor)
        advantages = torch.linspace(-1, 1, 8)[:, None] * batch.loss_mask
        gradients = record_gradients(actor)
        actor.update(replace(batch, advantages=advantages), step=1)
        return gradients[0]

    want = gradient("gpg")
    assert max(g.abs().max().item() for g in want.values()) > 1e-3
    for name in NAMES:
        difference = distance(gradient(name), want)
        assert difference > 1e-4 if name == "clip_cov" else difference < 1e-6, name


def test_metrics_of_a_choice_are_shares_of_the_mini_batch() -> None:
    _, metrics = update("kl_cov", CUTS["2"])
    assert metrics["actor/cov_klfrac"] == pytest.approx(7 / int(make_batch().loss_mask.sum()))
    assert "actor/pg_clipfrac" not in metrics and "actor/ratio" not in metrics
    _, metrics = update("clip_cov", CUTS["2"])
    assert 0 < metrics["actor/cov_clipfrac"] <= 0.2 + 1e-6 and metrics["actor/pg_clipfrac"] > 0


def test_a_masked_mini_batch_is_passed_over_by_a_loss_that_chooses() -> None:
    actor = actor_with("kl_cov", CUTS["2"])
    batch = with_log_probs(make_batch(), actor)
    before = weights(actor)
    actor.update(left_out(batch), step=1)
    assert same_bits(weights(actor), before)
