"""LoRA in training: the base as reference, critics on the actor's base, one forward for log-probs and values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steepest.core.batch import RowStatus
from steepest.core.value_losses import clipped_value_loss
from steepest.learner.actor import Actor
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import BaseReference, ReadingReference, Reference
from steepest.learner.shared_critic import AdapterCritic, HeadCritic
from steepest.learner.trainable import ComputeSettings
from steepest.models.lora import LoraSettings, adapter_parameters
from steepest.models.lora_models import CRITIC, FrozenValueModel, LoraCausalLM
from tests.support.learner_parts import (
    CPU,
    VANILLA,
    make_actor,
    make_batch,
    policy,
    record_gradients,
    same_bits,
    value_model,
    weights,
    with_log_probs,
)

SETTINGS = LoraSettings(rank=4, alpha=8)
OPTIM = OptimSettings(lr=1e-2)
SMALL = MicroBatches(tokens=15)


def update(mini=4, micro=None, epochs=1):
    return UpdateSettings(mini_batch_rows=mini, micro=micro or MicroBatches(), epochs=epochs)


def lora_actor(*, compute=CPU, **options):
    torch.manual_seed(3)  # of the adapter's A
    model = LoraCausalLM(policy().hf, SETTINGS)
    return Actor(model, VANILLA, compute=compute, optim=OPTIM, update=update(**options), forward=MicroBatches())


def adapter_critic(actor, **options):
    torch.manual_seed(4)
    return AdapterCritic(FrozenValueModel(actor.model.hf, SETTINGS), compute=CPU, optim=OPTIM, update=update(**options))


def head_critic(actor, reader=None, **options):
    reader = reader or ReadingReference(actor.model, compute=CPU)
    model = FrozenValueModel(actor.model.hf, None)
    return HeadCritic(model, reader, compute=CPU, optim=OPTIM, update=update(**options))


def train(actor, critic=None, steps=2):
    """Updates of actor and critic, in the order of a step."""
    found = []
    for step in range(1, steps + 1):
        batch = with_log_probs(make_batch(step), actor)
        if critic is not None:
            batch.values, batch.final_values = critic.values(batch)
            found.append(critic.update(batch, step=step))
        found.append(actor.update(batch, step=step))
    return found


class Forwards:
    """Counts the passes through a backbone."""

    def __init__(self, hf):
        self.count = 0
        hf.base_model.register_forward_hook(self._add)

    def _add(self, *_):
        self.count += 1


def test_the_policy_starts_as_the_base_and_only_the_adapter_moves():
    actor, plain = lora_actor(), make_actor()
    batch = make_batch()
    assert torch.equal(actor.log_probs(batch)[0], plain.log_probs(batch)[0])
    before = weights(actor)
    train(actor)
    moved = {name for name, tensor in weights(actor).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".lora_" in name} and len(moved) == 28
    assert len(actor.optimizer.tensors()) == 3 * 28  # two moments and the count of steps
    assert (actor.log_probs(batch)[0] - plain.log_probs(batch)[0]).abs().max() > 1e-2


def test_the_reference_is_the_base_bit_for_bit_however_the_actor_moves():
    actor, frozen = lora_actor(), Reference(policy(), compute=CPU)
    reference = BaseReference(actor.model, compute=CPU)
    batch = make_batch()
    for _ in range(2):
        assert torch.equal(reference.log_probs(batch), frozen.log_probs(batch))
        train(actor)
        kept = actor.log_probs(batch)[0]
        reference.log_probs(batch)
        assert torch.equal(actor.log_probs(batch)[0], kept)  # the adapter is on again
    assert (reference.log_probs(batch) - kept).abs().max() > 1e-2
    assert reference.optimizer is None and all(p.requires_grad for _, p in actor.model.saved_parameters())


@pytest.mark.parametrize("kind", [None, "adapter", "head"])
def test_micro_batches_change_no_gradient(kind):
    def gradients(micro):
        actor = lora_actor(mini=8, micro=micro)
        critic = {"adapter": adapter_critic, "head": head_critic}[kind](actor, mini=8, micro=micro) if kind else None
        train(actor, critic, steps=1)  # so that no matrix is zero
        found = [record_gradients(actor)] + ([record_gradients(critic)] if critic else [])
        train(actor, critic, steps=1)
        return [{n: g for n, g in steps[0].items()} for steps in found]

    for one, many in zip(gradients(MicroBatches(tokens=1000)), gradients(SMALL), strict=True):
        assert one.keys() == many.keys() and one
        for name in one:
            torch.testing.assert_close(one[name], many[name], atol=2e-5, rtol=1e-4)


def test_the_two_adapters_learn_apart():
    """An actor beside a critic on its base moves as it does alone, and the critic as with an actor that stays."""
    alone, shared = lora_actor(), lora_actor()
    critic = adapter_critic(shared)
    with_critic, without = train(shared, critic), train(alone)
    assert [m for m in with_critic if "actor/pg_loss" in m] == without
    assert same_bits(dict(alone.model.saved_parameters()), dict(shared.model.saved_parameters()))
    assert all(p.abs().max() > 0 for n, p in adapter_parameters(shared.model.hf, CRITIC) if "lora_B" in n)
    assert len(critic.optimizer.tensors()) == 3 * (28 + 2)
    batch = make_batch()
    assert critic.values(batch)[0].abs().max() > 1e-2


def test_a_critic_with_a_base_of_its_own_learns_as_one_on_the_actor_s():
    actor = lora_actor()
    shared = adapter_critic(actor)
    hf = policy().hf
    torch.manual_seed(4)
    own = Critic(FrozenValueModel(hf, SETTINGS), compute=CPU, optim=OPTIM, update=update())
    batch = make_batch()
    for step in range(2):
        assert shared.update(batch, step=step) == own.update(batch, step=step)
    assert all(torch.equal(a, b) for a, b in zip(shared.values(batch), own.values(batch), strict=True))


def test_a_critic_of_a_classification_model_trains_adapter_and_head():
    critic = Critic(FrozenValueModel(value_model().hf, SETTINGS), compute=CPU, optim=OPTIM, update=update())
    before, batch = weights(critic), make_batch()
    for step in range(2):
        critic.update(batch, step=step)
    moved = {name for name, tensor in weights(critic).items() if not torch.equal(tensor, before[name])}
    assert moved == {n for n in before if ".lora_" in n or n.startswith("hf.score")}


def test_log_probs_and_values_come_from_one_forward_and_the_update_needs_none():
    actor = lora_actor()
    train(actor)
    frozen = Reference(policy(), compute=CPU)
    reader = ReadingReference(actor.model, compute=CPU, forward=SMALL)
    critic = head_critic(actor, reader, epochs=2, micro=SMALL)
    batch = replace(make_batch(), values=None)
    num_parts = len(SMALL.split(batch.lengths.tolist()))
    passes = Forwards(actor.model.hf)
    batch.ref_log_probs = reader.log_probs(batch)
    assert passes.count == num_parts > 2
    batch.values, batch.final_values = critic.values(batch)
    metrics = critic.update(batch, step=1)
    assert passes.count == num_parts
    torch.testing.assert_close(batch.ref_log_probs, frozen.log_probs(batch), atol=1e-5, rtol=0)
    assert metrics["critic/grad_norm"] > 0 and critic.values(batch)[0].abs().max() > 0
    assert passes.count == num_parts

    critic.values(make_batch(1))  # another batch has a pass of its own
    assert passes.count > num_parts


def test_without_a_reference_the_values_have_one_forward():
    actor = lora_actor()
    critic = head_critic(actor)
    batch, passes = make_batch(), Forwards(actor.model.hf)
    batch.values, batch.final_values = critic.values(batch)
    critic.update(batch, step=1)
    assert passes.count == 1


def test_the_values_of_a_head_are_those_of_a_pass_of_its_own():
    actor = lora_actor()
    train(actor)
    critic = head_critic(actor)
    for parameter in critic.model.head.parameters():
        torch.nn.init.normal_(parameter)
    plain = Critic(FrozenValueModel(policy().hf, None), compute=CPU, optim=OPTIM, update=update())
    plain.model.head.load_state_dict(critic.model.head.state_dict())
    batch = make_batch()
    for mine, theirs in zip(critic.values(batch), plain.values(batch), strict=True):
        assert mine.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert (critic.values(batch)[0][2] == 0).all() and critic.values(batch)[1][2] != 0  # row 2 has no policy token


def test_the_update_of_a_head_is_that_of_the_loss_written_out():
    actor = lora_actor()
    critic = head_critic(actor, mini=8, micro=SMALL)
    batch = make_batch()
    batch.values, _ = critic.values(batch)
    states = critic.reader.states(batch)
    assert torch.equal(batch.values, torch.zeros_like(batch.values))  # zero at the start
    head = critic.model.head
    inner, inner_bias, weight, bias = own = [p.detach().clone().requires_grad_() for p in head.parameters()]
    values = torch.zeros(batch.responses.shape)
    hidden = states.tokens @ inner.T + inner_bias
    values[batch.loss_mask] = ((hidden * hidden.sigmoid()) @ weight.T + bias)[:, 0]
    per_token, _ = clipped_value_loss(
        values, batch.values, batch.returns, cliprange_value=0.5, response_mask=batch.loss_mask
    )
    loss = per_token.sum() / batch.loss_mask.sum()
    loss.backward()
    gradients = record_gradients(critic)
    metrics = critic.update(batch, step=1)
    assert metrics["critic/vf_loss"] == pytest.approx(loss.item(), rel=1e-5)
    names = [f"deep_head.{name}" for name, _ in head.named_parameters()]
    assert list(gradients[0]) == names
    for name, want in zip(names, own, strict=True):
        torch.testing.assert_close(gradients[0][name], want.grad, atol=1e-6, rtol=1e-4)
    assert gradients[0]["deep_head.out.weight"].abs().max() > 1e-3


def test_mini_batches_of_a_head_read_their_own_rows():
    """Against a critic of the same weights that runs the base for every update."""
    actor = lora_actor()
    critic = head_critic(actor, mini=3, epochs=2, micro=SMALL)
    plain = FrozenValueModel(policy().hf, None)
    plain.deep_head.load_state_dict(critic.model.deep_head.state_dict())
    other = Critic(plain, compute=CPU, optim=OPTIM, update=update(mini=3, epochs=2, micro=SMALL))
    for step in range(3):
        batch = make_batch(step)
        batch.values, _ = critic.values(batch)
        torch.testing.assert_close(batch.values, other.values(batch)[0], atol=1e-4, rtol=1e-4)
        mine, theirs = critic.update(batch, step=step), other.update(batch, step=step)
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_gradient_checkpointing_changes_no_number():
    checkpointed = ComputeSettings(gradient_checkpointing=True)
    plain, saving = lora_actor(), lora_actor(compute=checkpointed)
    critics = []
    for actor, compute in ((plain, CPU), (saving, checkpointed)):
        torch.manual_seed(4)
        model = FrozenValueModel(actor.model.hf, SETTINGS)
        critics.append(AdapterCritic(model, compute=compute, optim=OPTIM, update=update()))
    assert train(plain, critics[0]) == train(saving, critics[1])
    assert same_bits(weights(plain), weights(saving))


def test_a_broken_switch_would_be_seen():
    """The tests above do depend on it: with the adapter left on, as it is in the actor, the reference is not the
    base."""
    actor = lora_actor()
    train(actor)
    reference, batch = BaseReference(actor.model, compute=CPU), make_batch()
    assert (actor.log_probs(batch)[0] - reference.log_probs(batch)).abs().max() > 1e-2


def test_a_head_reads_values_of_rows_that_are_left_out_after_the_reference_s_pass():
    """Rollout correction rejects rows between the reference's pass, which keeps the states, and the values."""
    actor = lora_actor()
    train(actor)
    reader = ReadingReference(actor.model, compute=CPU, forward=SMALL)
    critic = head_critic(actor, reader, mini=8, micro=SMALL)
    for parameter in critic.model.head.parameters():
        torch.nn.init.normal_(parameter)
    whole, batch = make_batch(), make_batch()
    wanted, wanted_final = critic.values(whole)
    batch.ref_log_probs = reader.log_probs(batch)
    batch.leave_out(torch.arange(8) == 5, RowStatus.REJECTED)
    batch.values, final = critic.values(batch)
    others = [0, 1, 2, 3, 4, 6, 7]
    torch.testing.assert_close(batch.values[others], wanted[others], atol=1e-6, rtol=0)
    torch.testing.assert_close(final, wanted_final, atol=1e-6, rtol=0)
    assert not batch.values[5].any() and wanted[5].any()
    assert critic.update(batch, step=1)["critic/grad_norm"] > 0
