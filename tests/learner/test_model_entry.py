"""A model is read in its call only, and in the backward pass of its answer: where torch's FSDP2 gathers weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.data.sft import SFTExample
from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import BaseReference, ReadingReference, Reference
from steepest.learner.supervised import Supervised
from steepest.learner.trainable import ComputeSettings, Trainable
from steepest.rollout.weights import LocalWeights
from tests.learner.ranks import Counts
from tests.learner.test_lora import adapter_critic, head_critic, lora_actor
from tests.learner.test_policy_losses import parts_of
from tests.support.learner_parts import CPU, make_actor, make_batch, make_critic, policy, weights, with_log_probs

TWO = UpdateSettings(mini_batch_rows=4, micro=MicroBatches(rows=2))
"""8 rows of which 7 are trained: micro-batches of 2, 1, 2, 2."""
ONE = UpdateSettings(mini_batch_rows=8, micro=MicroBatches(rows=2))
EXAMPLES = [SFTExample(f"rows:{i}", [1, 2, 3 + i], [False, True, True]) for i in range(3)]
FULL = ActorLossSettings(use_kl_loss=True, kl_loss_type="full", kl_loss_coef=0.5)


class Gathered:
    """Weights that are there during a model's call and in backward passes through it; else they are NaN."""

    def __init__(self, *models: nn.Module) -> None:
        found = {id(p): p for model in models for p in model.parameters()}
        self._weights = [(parameter, parameter.data) for parameter in found.values()]
        for model in models:
            model.register_forward_pre_hook(lambda *_: self.show())
            model.register_forward_hook(self._after)
        self.hide()

    def show(self) -> None:
        for parameter, weight in self._weights:
            parameter.data = weight

    def hide(self) -> None:
        for parameter, weight in self._weights:
            parameter.data = torch.full_like(weight, torch.nan)

    def _after(self, module: Any, args: Any, answer: Sequence[Any]) -> None:
        self.hide()
        for tensor in answer:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda gradient: self.show())


def scored() -> Batch:
    return with_log_probs(make_batch(), make_actor(), shift=0.3)


def with_reference(actor: Actor, reference: Any) -> tuple[Actor, Any]:
    actor.reference = reference
    return actor, reference


def base_of_lora() -> tuple[Actor, Any]:
    actor = lora_actor(micro=MicroBatches(rows=2))
    actor.loss = FULL
    return with_reference(actor, BaseReference(actor.model, compute=CPU))


def moved(critic: Critic) -> Critic:
    torch.manual_seed(1)
    for name, parameter in critic.model.saved_parameters():
        if "lora_B" in name or "head" in name or "score" in name:
            nn.init.normal_(parameter, std=0.3)
    return critic


def values_then_step(critic: Critic) -> Any:
    batch = replace(make_batch(), token_level_rewards=make_batch().advantages)
    found = critic.values_and_gradient(batch, EstimatorCall("gae", {"gamma": 0.9, "lam": 0.8}))
    return found.values, critic.step_on_gradient(replace(batch, values=found.values), found)


Case = tuple[Callable[[], tuple[Any, ...]], Callable[..., Any], tuple[int, ...]]
CASES: dict[str, Case] = {
    "log-probs": (lambda: (make_actor(update=TWO),), lambda actor: actor.log_probs(make_batch()), (4,)),
    "squares": (lambda: (make_actor(update=TWO),), lambda actor: actor.log_probs_and_squares(make_batch()), (4,)),
    "reference": (
        lambda: (Reference(policy(), compute=CPU, forward=MicroBatches(rows=2)),),
        lambda reference: reference.log_probs(make_batch()),
        (4,),
    ),
    "base reference": (
        lambda: (BaseReference(lora_actor().model, compute=CPU, forward=MicroBatches(rows=2)),),
        lambda reference: reference.log_probs(make_batch()),
        (4,),
    ),
    "actor's update": (lambda: (make_actor(update=TWO),), lambda actor: actor.update(scored(), step=1), (4,)),
    "LoRA's update": (
        lambda: (lora_actor(micro=MicroBatches(rows=2)),),
        lambda actor: actor.update(scored(), step=1),
        (4,),
    ),
    "checkpointing": (
        lambda: (make_actor(update=TWO, compute=ComputeSettings(gradient_checkpointing=True)),),
        lambda actor: actor.update(scored(), step=1),
        (4,),
    ),
    "a choice": (
        lambda: (make_actor(update=TWO, **parts_of("kl_cov")),),
        lambda actor: actor.update(scored(), step=1),
        (8,),
    ),
    "exact KL": (
        lambda: with_reference(make_actor(update=TWO, loss=FULL), Reference(policy(seed=5), compute=CPU)),
        lambda actor, reference: actor.update(scored(), step=1),
        (4, 4),
    ),
    "values": (
        lambda: (make_critic(zero_head=False, forward=MicroBatches(rows=2)),),
        lambda critic: critic.values(make_batch()),
        (4,),
    ),
    "critic's update": (
        lambda: (make_critic(zero_head=False, mini=4, micro=MicroBatches(rows=2)),),
        lambda critic: critic.update(make_batch(), step=1),
        (4,),
    ),
    "values and gradient": (
        lambda: (make_critic(zero_head=False, micro=MicroBatches(rows=2)),),
        values_then_step,
        (4,),
    ),
    "adapter": (
        lambda: (moved(adapter_critic(lora_actor(), micro=MicroBatches(rows=2), mini=8)),),
        values_then_step,
        (4,),
    ),
    "head": (
        lambda: (moved(head_critic(lora_actor(), micro=MicroBatches(rows=2))),),
        lambda critic: critic.update(make_batch(), step=1),
        (4,),
    ),
    "supervised": (
        lambda: (Supervised(policy(), compute=CPU, optim=OptimSettings(lr=1e-3), micro=MicroBatches(rows=1)),),
        lambda model: (model.evaluate(EXAMPLES), model.update(EXAMPLES)),
        (6,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hook_on_the_model_sees_every_pass(name):
    make, job, passes = CASES[name]
    made = make()
    counts = [Counts(trainable.model) for trainable in made]
    job(*made)
    assert tuple(count.forward for count in counts) == passes


@pytest.mark.parametrize("name", [*CASES, "exact KL of LoRA"])
def test_no_weight_is_read_outside_of_the_call_and_its_backward_pass(name):
    make, job = CASES[name][:2] if name in CASES else (base_of_lora, CASES["exact KL"][1])
    wanted_of, found_of = make(), make()
    wanted = job(*wanted_of)
    models = {id(trainable.model): trainable.model for trainable in found_of}
    if isinstance(getattr(found_of[0], "reader", None), ReadingReference):
        models[0] = found_of[0].reader.model
    gathered = Gathered(*models.values())
    found = job(*found_of)
    gathered.show()
    equal(found, wanted)
    for mine, want in zip(found_of, wanted_of, strict=True):
        equal(weights(mine), weights(want))


def equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=False)


def test_gathered_weights_are_gone_outside_of_the_call():
    """The check itself: a weight that is read past the call is NaN."""
    actor = make_actor()
    Gathered(actor.model)
    assert actor.model.hf.get_output_embeddings().weight.isnan().all()
    assert actor.log_probs(make_batch())[0].isfinite().all()
    hidden = actor.model.hidden_states(torch.tensor([1, 2]), torch.arange(2), _context(actor))
    assert hidden.isnan().any()


def _context(actor: Actor) -> Any:
    from steepest.models.attention import PackedContext

    return PackedContext([2])


def test_the_engines_comparison_comes_by_the_entry():
    actor = make_actor()
    counts = Counts(actor.model)
    assert LocalWeights(actor.model).log_probs([1, 2], [3, 4], half=False).shape == (2,)
    assert counts.forward == 1


# -- arithmetic --------------------------------------------------------------------------------------------------------


def answered(trainable: Trainable[Any]) -> list[float]:
    """The operations of every answer of a model from now on."""
    found: list[float] = []
    trainable.model.register_forward_hook(lambda module, args, answer: found.append(answer.flops))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_role_counts_the_arithmetic_of_its_passes_and_hands_it_over_once(name):
    make, job, _ = CASES[name]
    made = make()
    role = made[0]
    found = [answered(trainable) for trainable in made]
    if name == "head":
        found.append(answered(role.reader))
    job(*made)
    total = sum(map(sum, found))
    assert total > 0 and role.take_flops() == pytest.approx(total, rel=1e-12)
    assert role.take_flops() == 0.0


def test_roles_of_one_process_count_apart():
    first, second = make_actor(), make_actor()
    first.log_probs(make_batch())
    assert second.take_flops() == 0.0 < first.take_flops()
    first.count(5.0)
    assert first.take_flops() == 5.0
