"""A tensor that the product leaves on the CPU, of all that it moves, ends the run at once instead of training wrongly.

The stand-in and a card both raise, so what is deliberately broken here would be seen by every test of this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steepest.core.batch import Batch
from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.critic import Critic
from steepest.learner.trainable import ComputeSettings
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from tests.support.learner_parts import make_actor, make_batch, make_critic, policy, with_log_probs
from tests.support.rollout_requests import loaded, requests_of

pytestmark = pytest.mark.npu

NPU = ComputeSettings(device="npu")
KL = ActorLossSettings(use_kl_loss=True)

ACTOR_READS = ("loss_mask", "advantages", "old_log_probs", "ref_log_probs")
CRITIC_READS = ("loss_mask", "values", "returns")
PACKED_READS = ("input_ids", "position_ids", "predict_index", "targets")


def batch_of(actor: Actor) -> Batch:
    return with_log_probs(make_batch(), actor, shift=0.1)


class Forgetful:
    """A trainable model whose `moved` has one line dropped: this field stays on the CPU."""

    left_behind = ""

    def moved(self, record: Any) -> Any:
        moved = super().moved(record)  # type: ignore[misc]
        names = {item.name for item in dataclasses.fields(record)}
        kept = {self.left_behind: getattr(record, self.left_behind)} if self.left_behind in names else {}
        return dataclasses.replace(moved, **kept)


class ForgetfulActor(Forgetful, Actor): ...


class ForgetfulCritic(Forgetful, Critic): ...


@pytest.mark.parametrize("field", [*ACTOR_READS, *PACKED_READS])
def test_the_actors_update_raises_for_each_field_left_behind(field: str) -> None:
    actor = make_actor(kind=ForgetfulActor, compute=NPU, loss=KL)
    batch = batch_of(actor)
    assert actor.update(batch, step=1)["actor/grad_norm"] > 0  # the control
    actor.left_behind = field
    with pytest.raises(RuntimeError, match="same device|on the same|device type"):
        actor.update(batch, step=2)


@pytest.mark.parametrize("field", [*CRITIC_READS, *PACKED_READS[:3]])
def test_the_critics_update_raises_for_each_field_left_behind(field: str) -> None:
    critic = make_critic(kind=ForgetfulCritic, compute=NPU)
    assert critic.update(make_batch(), step=1)["critic/grad_norm"] > 0
    critic.left_behind = field
    with pytest.raises(RuntimeError, match="same device|on the same|device type"):
        critic.update(make_batch(), step=2)


def test_a_model_left_on_the_cpu_raises() -> None:
    actor = make_actor(compute=NPU)
    actor.model.to("cpu")
    with pytest.raises(RuntimeError, match="same device|on the same"):
        actor.log_probs(make_batch())


def engine(kind: type[BuiltinEngine] = BuiltinEngine) -> BuiltinEngine:
    return loaded(kind, policy().to("npu"), end_token_ids=(), pad_token_id=0, max_model_len=32)


BROKEN_ENGINE: dict[str, Callable[[Any], Any]] = {
    "uniforms": lambda run: setattr(run, "_uniforms", run._uniforms.cpu()),
    "tokens": lambda run: setattr(run, "_tokens", run._tokens.cpu()),
    "log_probs": lambda run: setattr(run, "_log_probs", run._log_probs.cpu()),
    "goes_on": lambda run: setattr(run, "_goes_on", run._goes_on.cpu()),
    "slots": lambda run: setattr(run, "_slots", run._slots.cpu()),
    "limit": lambda run: setattr(run, "_limit", run._limit.cpu()),
}


@pytest.mark.parametrize("part", BROKEN_ENGINE)
def test_generation_raises_for_each_part_left_behind(part: str) -> None:
    sampling = SamplingParams(max_tokens=4)
    assert len(engine().generate(requests_of([[1, 2], [3, 4, 5]], sampling))) == 2  # the control

    class Broken(BuiltinEngine):
        def _start(self, network: Any, group: Any) -> Any:
            run = super()._start(network, group)
            BROKEN_ENGINE[part](run)
            return run

    with pytest.raises(RuntimeError, match="same device|on the same|device type"):
        engine(Broken).generate(requests_of([[1, 2], [3, 4, 5]], sampling))


def test_a_generator_of_the_cpu_draws_nothing_on_the_device() -> None:
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="npu", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device="npu").bernoulli_(0.5, generator=torch.Generator())
