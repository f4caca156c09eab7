from __future__ import annotations

import hashlib

import torch

from steepest.core.kl import kl_estimate
from steepest.learner.reference import Reference
from tests.support.learner_parts import CPU, make_actor, make_batch, policy, with_log_probs


def copy_of(actor, **options):
    """A reference with the actor's present weights."""
    return Reference(actor.model.copy_as(torch.float32), compute=CPU, forward=actor.forward, **options)


def fingerprint(values):
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def test_the_reference_stays_while_the_actor_moves():
    """Trap 16: KL exactly 0 at step 0, a constant hash after, no storage in common."""
    actor = make_actor(lr=1e-2, mini=4)
    reference = copy_of(actor)
    batch = make_batch()
    first = reference.log_probs(batch)
    for kind in ("k1", "k2", "k3", "abs"):
        assert kl_estimate(actor.log_probs(batch)[0], first, kind).abs().max() == 0.0
    for step in range(4):
        actor.update(with_log_probs(batch, actor), step=step)
        assert fingerprint(reference.log_probs(batch)) == fingerprint(first)
    assert (actor.log_probs(batch)[0] - first).abs().max() > 1e-2

    ours = {p.untyped_storage().data_ptr() for p in reference.model.parameters()}
    theirs = {p.untyped_storage().data_ptr() for p in actor.model.parameters()}
    assert ours and not ours & theirs
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in actor.model.parameters())
    assert reference.optimizer is None


def test_temperature_is_the_actors():
    actor = make_actor(temperature=0.5)
    batch = make_batch()
    same = copy_of(actor, temperature=0.5)
    other = copy_of(actor, temperature=1.0)
    assert torch.equal(same.log_probs(batch), actor.log_probs(batch)[0])
    assert (other.log_probs(batch) - actor.log_probs(batch)[0]).abs().max() > 0.1


def test_a_reference_cannot_be_trained():
    assert not any(parameter.requires_grad for parameter in Reference(policy(), compute=CPU).model.parameters())
