"""Which objects a run has for which configuration, and what the engine starts with."""

from __future__ import annotations

import pytest
import torch

from steepest.assembly.roles import Models, Roles, build_models, build_roles
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import ModelError
from steepest.learner.actor import Actor
from steepest.learner.checkpoint import FROM_NOTHING, Start
from steepest.learner.critic import Critic
from steepest.learner.reference import BaseReference, ReadingReference, Reference
from steepest.learner.shared_critic import AdapterCritic, HeadCritic
from steepest.models.load import load_tokenizer
from steepest.rollout import GenerationRequest, SamplingParams
from tests.support.toy_run import make_toy, toy_overrides

LORA = "actor_rollout_ref.model.lora_rank=4"
NO_KL = "algorithm.use_kl_in_reward=False"
GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2")
KL_LOSS = "actor_rollout_ref.actor.use_kl_loss=True"
EXACT = (KL_LOSS, "actor_rollout_ref.actor.kl_loss_type=full")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def inputs(toy, *words: str):
    config = load_config(toy_overrides(toy, toy["model"].parent / "run", *words))
    plan = make_plan(config, 256, ADVANTAGE_ESTIMATORS.get(config.algorithm.adv_estimator).spec)
    return config, plan, {"actor": toy["model"], "critic": toy["model"]}


def models_of(toy, *words: str, start: Start = FROM_NOTHING) -> Models:
    config, plan, folders = inputs(toy, *words)
    return build_models(config, plan, start, folders, CPUDevice())


@pytest.mark.parametrize(
    ("words", "critic", "reference"),
    [
        ((), Critic, Reference),
        ((NO_KL,), Critic, type(None)),
        (GRPO, type(None), type(None)),
        ((*GRPO, KL_LOSS), type(None), Reference),
        ((LORA,), Critic, BaseReference),
        ((LORA, "critic.model.lora_rank=2"), Critic, BaseReference),
        ((LORA, "critic.share_base=adapter"), AdapterCritic, BaseReference),
        ((LORA, "critic.share_base=head"), HeadCritic, ReadingReference),
        ((LORA, "critic.share_base=head", NO_KL), HeadCritic, type(None)),
    ],
)  # fmt: skip
def test_which_roles_there_are(toy, words, critic, reference):
    found = models_of(toy, *words)
    assert [type(part) for part in (found.actor, found.critic, found.reference)] == [Actor, critic, reference]
    assert found.actor.reference is None
    if critic is HeadCritic:
        assert found.critic.reader is found.reference or reference is type(None)


def test_the_exact_kl_gives_the_actor_its_reference(toy):
    found = models_of(toy, *GRPO, *EXACT)
    assert found.actor.reference is found.reference is not None


def test_a_reference_is_the_start_model_frozen_and_apart(toy):
    found = models_of(toy)
    assert found.actor.model.computes_as(found.reference.model)
    assert not any(p.requires_grad for p in found.reference.model.parameters())
    with torch.no_grad():
        next(found.actor.model.parameters()).add_(1.0)
    assert not found.actor.model.computes_as(found.reference.model), "a copy: it does not move with the actor"
    half = models_of(toy, "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16")
    assert sum(p.dtype == torch.bfloat16 for p in half.reference.model.parameters()) == 14, "all that it computes in it"
    actor, reference = half.actor.model, half.reference.model
    assert actor.computes_as(reference, in_bf16=True) and not actor.computes_as(reference)
    with torch.no_grad():
        actor.hf.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert not actor.computes_as(reference, in_bf16=True)
    lora = models_of(toy, LORA)
    assert lora.reference.model is lora.actor.model, "the actor's own base"


def test_a_run_that_resumes_reads_the_trained_from_the_checkpoint_and_the_reference_from_the_start(toy, tmp_path):
    first = models_of(toy)
    with torch.no_grad():
        for part in (first.actor, first.critic):
            next(part.model.parameters()).add_(1.0)
    tokenizer, checkpoint = load_tokenizer(toy["model"]), tmp_path / "global_step_3"
    for name, part in (("actor", first.actor), ("critic", first.critic)):
        (checkpoint / name).mkdir(parents=True)
        part.save(checkpoint / name, tokenizer=tokenizer)
    again = models_of(toy, start=Start(3, checkpoint, {"step": 3}))
    for name in ("actor", "critic"):
        before, after = (getattr(found, name).model.parameters() for found in (first, again))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert again.reference.model.computes_as(first.reference.model)
    assert not again.actor.model.computes_as(again.reference.model)


def test_the_engine_starts_with_the_actor_s_weights_of_that_step(toy):
    laps: list[str] = []
    config, plan, folders = inputs(toy)
    tokenizer = load_tokenizer(toy["model"])
    roles = build_roles(config, plan, FROM_NOTHING, folders, tokenizer, CPUDevice(), laps.append)
    assert laps == ["models", "engine"] and isinstance(roles, Roles)
    assert roles.weights.model is roles.actor.model
    ((answer,),) = roles.engine.generate([GenerationRequest([1, 2], SamplingParams(max_tokens=1), "a")])
    assert answer.policy_version == 0
    random = torch.get_rng_state()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    models = build_models(config, plan, FROM_NOTHING, folders, CPUDevice())
    after_models = torch.get_rng_state()
    torch.set_rng_state(state)
    build_roles(config, plan, FROM_NOTHING, folders, tokenizer, CPUDevice())
    assert torch.equal(torch.get_rng_state(), after_models), "the engine's start draws no random number"
    torch.set_rng_state(random)
    assert models.actor.model is not roles.actor.model


def test_a_model_that_is_too_short_or_has_another_vocabulary_is_named_by_its_key(toy, tmp_path):
    config, plan, folders = inputs(
        toy, "data.max_response_length=100000", "actor_rollout_ref.rollout.max_model_len=200000"
    )
    tokenizer = load_tokenizer(toy["model"])
    with pytest.raises(ModelError, match="positions for 512 only"):
        build_roles(config, plan, FROM_NOTHING, folders, tokenizer, CPUDevice())
    other = make_toy(tmp_path / "other")
    tokenizer.add_tokens([f"more {k}" for k in range(4000)])
    with pytest.raises(ModelError, match=r"actor_rollout_ref\.model\.path"):
        build_roles(*inputs(other)[:2], FROM_NOTHING, folders, tokenizer, CPUDevice())
