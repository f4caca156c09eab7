"""The cluster of one process: each method is the role's own, operations are taken once, the engine rests when asked."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from steepest.assembly.description import describe_roles
from steepest.assembly.roles import Roles
from steepest.cluster.local import LocalCluster
from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.devices.backends.cpu import CPUDevice
from steepest.learner.reference import Reference
from steepest.models.flops import generation_flops
from steepest.rollout import GenerationRequest, SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from tests.support.learner_parts import (
    CPU,
    make_actor,
    make_batch,
    make_critic,
    policy,
    same_bits,
    weights,
    with_log_probs,
)
from tests.support.rollout_requests import loaded

GAE = EstimatorCall("gae", {"gamma": 1.0, "lam": 0.9})


class Card(CPUDevice):
    """A CPU that writes down when its memory is given back."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")


class RecordingEngine:
    """An engine that does nothing but remember."""

    notes, copied_bytes = ("a note",), 7

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sources: list[object] = []

    def generate(self, requests):
        self.calls.append(f"generate {len(requests)}")
        return [[] for _ in requests]

    def load_weights(self, source, version: int) -> None:
        self.calls.append(f"load_weights {version}")
        self.sources.append(source)

    def sleep(self) -> None:
        self.calls.append("sleep")


def roles(engine=None, *, critic: bool = True, reference_seed: int = 5) -> Roles:
    reference = Reference(policy(reference_seed), compute=CPU)
    return Roles(make_actor(), make_critic(zero_head=False) if critic else None, reference, engine or RecordingEngine())


def cluster(engine=None, *, frees_engine: bool = False, **more) -> LocalCluster:
    made = roles(engine, **more)
    return LocalCluster(made, Card(made.engine.calls), frees_engine=frees_engine)


@pytest.fixture
def batch() -> Batch:
    """Scored, with the log-probs and rewards that updates and returns read."""
    made = with_log_probs(make_batch(), make_actor(), shift=0.1)
    return replace(made, token_level_rewards=made.returns, token_level_scores=made.returns)


def equal(found, wanted) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_passes_are_those_of_the_roles(batch):
    made, own = cluster(), roles()
    assert equal(made.log_probs(batch), own.actor.log_probs(batch))
    assert equal(made.log_probs_and_squares(batch), own.actor.log_probs_and_squares(batch))
    assert torch.equal(made.ref_log_probs(batch), own.reference.log_probs(batch))
    assert not torch.equal(made.ref_log_probs(batch), made.log_probs(batch)[0])
    assert equal(made.values(batch), own.critic.values(batch))


def test_the_updates_are_those_of_the_roles(batch):
    made, own = cluster(), roles()
    assert made.update_actor(replace(batch), 3) == own.actor.update(replace(batch), step=3)
    assert made.update_critic(replace(batch), 3) == own.critic.update(replace(batch), step=3)
    assert same_bits(weights(made.roles.actor), weights(own.actor))
    assert same_bits(weights(made.roles.critic), weights(own.critic))
    assert not same_bits(weights(own.critic), weights(roles().critic))


def test_a_pass_with_a_gradient_and_the_step_on_it_are_the_critic_s(batch):
    made, own = cluster(), roles()
    found, wanted = made.values_and_gradient(batch, GAE), own.critic.values_and_gradient(batch, GAE)
    assert equal(found[:2], wanted[:2]) and found.metrics == wanted.metrics
    batch.values, batch.returns = found.values, GAE.returns_of(replace(batch, values=found.values))
    assert made.step_critic(batch, found) == own.critic.step_on_gradient(batch, wanted)
    assert same_bits(weights(made.roles.critic), weights(own.critic))
    assert not same_bits(weights(own.critic), weights(roles().critic))


def test_the_policy_is_the_reference_until_it_moves(batch):
    made = cluster(reference_seed=0)
    assert made.policy_is_reference() and not cluster().policy_is_reference()
    made.update_actor(batch, 1)
    assert not made.policy_is_reference()


def test_operations_are_taken_once_and_those_of_the_engine_not_at_all(batch):
    made, own = cluster(), roles()
    assert made.take_flops() == 0.0
    made.log_probs(batch)
    made.update_critic(batch, 1)
    own.actor.log_probs(batch)
    own.critic.update(batch, step=1)
    assert made.take_flops() == own.actor.take_flops() + own.critic.take_flops() > 0 and made.take_flops() == 0.0
    made.generate([GenerationRequest([1], SamplingParams(max_tokens=1), "a")])
    assert made.take_flops() == 0.0, "an engine's work follows from its answers"
    assert made.generation_flops(batch) == generation_flops(made.roles.actor.model, batch) > 0
    assert made.take_flops() == 0.0


def test_requests_go_to_the_engine_and_its_answers_come_back():
    actor = make_actor()
    engine = loaded(BuiltinEngine, actor.model, end_token_ids=(), pad_token_id=0, max_model_len=8)
    made = LocalCluster(Roles(actor, None, None, engine), CPUDevice(), frees_engine=False)
    requests = [GenerationRequest([1, 2], SamplingParams(max_tokens=3, n=2, seed=4), name) for name in "ab"]
    assert made.generate(requests) == engine.generate(requests)
    assert [one.policy_version for group in made.generate(requests) for one in group] == [0] * 4
    made.publish(9)
    assert [one.policy_version for group in made.generate(requests) for one in group] == [9] * 4


@pytest.mark.parametrize(
    ("frees_engine", "wanted"), [(True, ["sleep", "empty_cache", "load_weights 4"]), (False, ["load_weights 4"])]
)
def test_the_engine_is_put_to_sleep_and_woken_only_where_it_frees_its_memory(frees_engine, wanted):
    made = cluster(frees_engine=frees_engine)
    made.release_engine()
    made.publish(4)
    engine = made.roles.engine
    assert engine.calls == wanted
    (source,) = engine.sources
    assert source.model is made.roles.actor.model, "the actor's own weights, as they are now"


def test_a_checkpoint_has_a_writer_for_each_model_that_is_trained(tmp_path):
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.json").write_text("{}"))
    assert list(cluster(critic=False).writers(tokenizer)) == ["actor"]
    writers = cluster().writers(tokenizer)
    assert list(writers) == ["actor", "critic"]
    for name, write in writers.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"model.safetensors", "optimizer.safetensors", "tokenizer.json"} <= files


def test_the_description_is_that_of_its_roles():
    made = cluster()
    found, actor = made.describe(), made.roles.actor
    assert found == describe_roles(made.roles) and found.engine_notes == ("a note",)
    weights = sum(p.numel() for p in actor.model.parameters())
    assert found.sizes["actor"].parameters == found.sizes["actor"].trained == weights
    critic = sum(p.numel() for p in made.roles.critic.model.parameters())
    assert found.checkpoint_bytes == 4 * 3 * (weights + critic), "weights and two moments, float32"
