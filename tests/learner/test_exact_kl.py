"""kl_loss_type=full: the exact KL to the reference in the actor's loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steepest.core.batch import Batch
from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import BaseReference, Reference
from steepest.learner.trainable import ComputeSettings
from steepest.models.causal_lm import CausalLM
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from tests.support.learner_parts import CPU, VANILLA, make_actor, make_batch, policy, record_gradients, with_log_probs

TEMPERATURE = 0.7
FULL = ActorLossSettings(use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type="full")


def actor_to(reference: CausalLM | None, *, loss: ActorLossSettings = FULL, **more: Any) -> Actor:
    actor = make_actor(loss=loss, temperature=TEMPERATURE, **more)
    if reference is not None:
        actor.reference = Reference(reference, compute=more.get("compute", CPU), temperature=TEMPERATURE)
    return actor


def only_kl(actor: Actor) -> Batch:
    batch = with_log_probs(make_batch(), actor)
    return replace(batch, advantages=torch.zeros_like(batch.advantages), ref_log_probs=None)


def plain_kl(model: CausalLM, reference: CausalLM, batch: Batch) -> torch.Tensor:
    """The mean over policy tokens, by transformers' own forward, row by row."""
    total = torch.zeros(())
    for hf in (model.hf, reference.hf):
        hf.set_attn_implementation("eager")
    for i in range(len(batch)):
        p, t = int(batch.prompt_lengths[i]), int(batch.response_lengths[i])
        ids = torch.cat([batch.prompts[i, batch.prompts.shape[1] - p :], batch.responses[i, :t]])[None]
        places = slice(p - 1, p + t - 1)
        log_p = (model.hf(input_ids=ids).logits[0, places] / TEMPERATURE).log_softmax(-1)
        log_q = (reference.hf(input_ids=ids).logits[0, places].detach() / TEMPERATURE).log_softmax(-1)
        total = total + ((log_p.exp() * (log_p - log_q)).sum(-1) * batch.loss_mask[i, :t]).sum()
    return total / batch.loss_mask.sum()


@pytest.mark.parametrize("micro", [MicroBatches(rows=1), MicroBatches(rows=8), MicroBatches(tokens=15)])
def test_value_and_gradient_are_those_of_the_formula_written_out(micro: MicroBatches) -> None:
    actor = actor_to(policy(seed=5), micro=micro)
    batch, gradients = only_kl(actor), record_gradients(actor)
    metrics = actor.update(batch, step=1)
    plain = policy()
    want = plain_kl(plain, policy(seed=5), batch)
    (0.5 * want).backward()
    assert metrics["actor/kl_loss"] == pytest.approx(want.item(), abs=1e-6) and want > 0.01
    exact = {name: p.grad for name, p in plain.named_parameters()}
    assert max(g.abs().max().item() for g in exact.values()) > 1e-3
    assert max((g - exact[name]).abs().max().item() for name, g in gradients[0].items()) < 1e-6


def test_at_the_reference_it_is_exactly_zero_and_moves_nothing() -> None:
    actor = actor_to(policy())
    gradients = record_gradients(actor)
    metrics = actor.update(only_kl(actor), step=1)
    assert metrics["actor/kl_loss"] == 0.0 and not any(g.any() for g in gradients[0].values())


def test_it_stands_beside_the_other_terms() -> None:
    """Policy loss and entropy bonus are those of a run with an estimator of weight 0."""
    found = []
    for kind in ("full", "k1"):
        loss = ActorLossSettings(entropy_coeff=0.3, use_kl_loss=True, kl_loss_coef=0.0, kl_loss_type=kind)
        actor = actor_to(policy(seed=5), loss=loss, micro=MicroBatches(rows=2))
        batch, gradients = with_log_probs(make_batch(), actor, shift=0.2), record_gradients(actor)
        metrics = actor.update(batch, step=1)
        found.append((gradients[0], {k: v for k, v in metrics.items() if k != "actor/kl_loss"}))
    assert max((g - found[1][0][name]).abs().max().item() for name, g in found[0][0].items()) < 1e-7
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


@pytest.mark.parametrize(
    "compute", [CPU, ComputeSettings(gradient_checkpointing=True), ComputeSettings(dtype="bfloat16")]
)
def test_it_pulls_toward_the_reference(compute: ComputeSettings) -> None:
    actor = actor_to(policy(seed=5), loss=replace(FULL, kl_loss_coef=1.0), lr=3e-3, compute=compute)
    distances = [actor.update(only_kl(actor), step=step)["actor/kl_loss"] for step in range(12)]
    assert distances[-1] < 0.5 * distances[0]
    assert all(p.grad is None for p in actor.reference.model.parameters()), "the reference is only read"


def test_with_lora_the_reference_is_the_base_and_the_adapter_is_on_again() -> None:
    settings = LoraSettings(rank=4, alpha=8, target_modules=("q_proj", "v_proj"))
    model = LoraCausalLM(policy().hf, settings)
    update = UpdateSettings(mini_batch_rows=8, micro=MicroBatches(rows=2))
    actor = Actor(
        model, VANILLA, compute=CPU, optim=OptimSettings(lr=3e-2), update=update, loss=FULL, temperature=TEMPERATURE
    )
    actor.reference = BaseReference(model, compute=CPU, temperature=TEMPERATURE)
    assert actor.update(only_kl(actor), step=1)["actor/kl_loss"] == 0.0
    actor.update(with_log_probs(make_batch(), actor), step=2)
    batch = only_kl(actor)
    metrics = actor.update(batch, step=3)
    assert metrics["actor/kl_loss"] > 1e-4 and metrics["actor/ratio_max_dev_first"] < 1e-5


def test_without_a_reference_it_says_so_and_with_one_it_needs_no_log_probs_of_it() -> None:
    actor = actor_to(None)
    with pytest.raises(ValueError, match=r"Actor\.reference is None, but the exact KL"):
        actor.update(only_kl(actor), step=1)
