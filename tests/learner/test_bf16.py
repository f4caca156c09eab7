"""Updates in bf16: the optimizer writes the working weights, and no pass casts one."""

from __future__ import annotations

import pytest
import torch

from bench.casts import Casts
from steepest.learner.actor import Actor
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import BaseReference
from steepest.learner.shared_critic import AdapterCritic
from steepest.learner.trainable import ComputeSettings, Trainable
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import FrozenValueModel, LoraCausalLM
from steepest.models.working_weights import copied_bytes, half
from tests.support.learner_parts import VANILLA, make_batch, policy, value_model, with_log_probs

HALF = ComputeSettings(dtype="bfloat16")
SETTINGS = {
    "compute": HALF,
    "optim": OptimSettings(lr=1e-2),
    "update": UpdateSettings(mini_batch_rows=4, micro=MicroBatches(rows=2)),
}
STEPS = 2
"""Optimizer steps of an update: 8 rows, 4 in a mini-batch."""


def copies(part: Trainable) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """name -> (master, copy) of the weights that have one."""
    named = part.model.named_parameters()
    return {name: (weight, half(weight)) for name, weight in named if copied_bytes([weight])}


@pytest.fixture(scope="module")
def actor() -> Actor:
    return Actor(policy(), VANILLA, **SETTINGS)


@pytest.fixture(scope="module")
def lora() -> tuple[Actor, AdapterCritic, BaseReference]:
    torch.manual_seed(3)
    model = LoraCausalLM(policy().hf, LoraSettings(rank=4, alpha=8))
    actor = Actor(model, VANILLA, **SETTINGS)
    critic = AdapterCritic(FrozenValueModel(model.hf, LoraSettings(rank=4, alpha=8)), **SETTINGS)
    return actor, critic, BaseReference(model, compute=HALF)


def test_an_update_casts_each_weight_once_a_step_and_writes_the_copies(actor):
    with Casts(actor.model.parameters()) as casts:
        batch = with_log_probs(make_batch(), actor)
    assert casts.count["weights"] == 0 < casts.count["others"]
    held = copies(actor)
    layers = 2 * (7 + 3)  # matrices, and biases of q, k and v
    assert len(held) == layers + 1  # the embedding, which is the head
    before = {name: copy.clone() for name, (_, copy) in held.items()}
    with Casts(actor.model.parameters()) as casts:
        metrics = actor.update(batch, step=1)
    assert casts.count["weights"] == STEPS * len(held)
    for name, (weight, copy) in held.items():
        assert torch.equal(copy, weight.detach().bfloat16()) and not torch.equal(copy, before[name]), name
    assert metrics["actor/ratio_max_dev_first"] == 0.0


def test_a_step_that_is_skipped_writes_nothing_and_its_copies_stay_those_of_the_weights(actor):
    held = copies(actor)
    before = {name: copy.clone() for name, (_, copy) in held.items()}
    batch = with_log_probs(make_batch(), actor)
    batch.advantages = torch.full_like(batch.old_log_probs, torch.nan)
    assert actor.update(batch, step=1)["actor/skipped_steps"] == STEPS
    assert all(torch.equal(copy, before[name]) for name, (_, copy) in held.items())


def test_the_critic_of_all_weights():
    critic = Critic(value_model(zero_head=False), **SETTINGS)
    batch = make_batch()
    batch.returns = torch.ones(batch.responses.shape)
    with Casts(critic.model.parameters()) as casts:
        batch.values, batch.final_values = critic.values(batch)
    assert casts.count["weights"] == 0 and not any("score" in name for name in copies(critic))
    with Casts(critic.model.parameters()) as casts:
        critic.update(batch, step=1)
    assert casts.count["weights"] == STEPS * len(copies(critic)) == STEPS * 20


def test_with_lora_the_base_is_never_cast_and_each_adapter_once_a_step(lora):
    actor, critic, reference = lora
    weights = list(actor.model.parameters())
    with Casts(weights) as casts:
        batch = with_log_probs(make_batch(), actor)
        batch.ref_log_probs = reference.log_probs(batch)
        batch.values, batch.final_values = critic.values(batch)
    assert casts.count["weights"] == 0
    assert torch.equal(batch.ref_log_probs, batch.old_log_probs)
    batch.returns = torch.ones(batch.responses.shape)
    for part in (critic, actor):
        with Casts(weights) as casts:
            part.update(batch, step=1)
        assert casts.count["weights"] == STEPS * 2 * 14  # A and B of 14 layers
    with Casts(weights) as casts:
        moved = actor.log_probs(batch)[0]
        assert torch.equal(reference.log_probs(batch), batch.ref_log_probs)
    assert casts.count["weights"] == 0 and not torch.equal(moved, batch.old_log_probs)
