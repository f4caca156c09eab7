"""Trap 32 for this room: 4 updates are 2 updates, a trip through a checkpoint, and 2 more, bit for bit."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import CheckpointError
from steepest.learner.actor import Actor
from steepest.learner.checkpoint import CheckpointStore
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.rng import rng_state, set_rng_state
from steepest.learner.trainable import ComputeSettings
from steepest.models.load import load_causal_lm, load_value_model
from tests.support.learner_parts import (
    CPU,
    VANILLA,
    make_batch,
    policy,
    same_bits,
    value_model,
    weights,
    with_log_probs,
)

OPTIM = OptimSettings(lr=1e-2, schedule="cosine", warmup_steps=1, total_steps=5)
UPDATE = UpdateSettings(mini_batch_rows=3, micro=MicroBatches(tokens=15), epochs=2, shuffle=True)


HALF = ComputeSettings(dtype="bfloat16")


def actor_of(model, compute=CPU):
    return Actor(model, VANILLA, compute=compute, optim=OPTIM, update=UPDATE)


def critic_of(model, compute=CPU):
    return Critic(model, compute=compute, optim=OPTIM, update=UPDATE)


def steps(actor, critic, first, last):
    metrics = []
    for step in range(first, last + 1):
        batch = with_log_probs(make_batch(step), actor)
        batch.values, batch.final_values = critic.values(batch)
        metrics.append(critic.update(batch, step=step) | actor.update(batch, step=step))
    return metrics


@pytest.mark.parametrize("compute", [CPU, HALF], ids=["float32", "bfloat16"])
def test_resume_is_bit_for_bit(tmp_path, compute):
    actor, critic = actor_of(policy(), compute), critic_of(value_model(), compute)
    steps(actor, critic, 1, 2)
    store = CheckpointStore(tmp_path)
    parts = {"actor": lambda p: actor.save(p, None), "critic": lambda p: critic.save(p, None)}
    expected = actor.checkpoint_bytes() + critic.checkpoint_bytes()
    path = store.save(2, parts, {"step": 2}, expected_bytes=expected)
    written = sum(p.stat().st_size for p in path.rglob("*.safetensors"))
    assert expected <= written < expected + 30_000  # headers of many small tensors
    want = steps(actor, critic, 3, 4)

    assert store.latest() == path
    again = actor_of(load_causal_lm(path / "actor"), compute)
    critic_again = critic_of(load_value_model(path / "critic"), compute)
    again.load_optimizer(path / "actor")
    critic_again.load_optimizer(path / "critic")
    assert steps(again, critic_again, 3, 4) == want
    assert same_bits(weights(again), weights(actor))
    assert same_bits(weights(critic_again), weights(critic))
    assert same_bits(again.optimizer.tensors(), actor.optimizer.tensors())
    assert again.optimizer.numbers() == actor.optimizer.numbers() == {"iterations": 4, "num_skipped": 0}

    forgotten = actor_of(load_causal_lm(path / "actor"), compute)
    fresh_critic = critic_of(load_value_model(path / "critic"), compute)
    steps(forgotten, fresh_critic, 3, 4)
    assert not same_bits(weights(forgotten), weights(actor))  # the state did matter


def test_the_actor_folder_loads_as_it_lies(tmp_path):
    actor = actor_of(policy())
    steps(actor, critic_of(value_model()), 1, 1)
    actor.save(tmp_path, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    want = {name.removeprefix("hf."): value for name, value in weights(actor).items()}
    assert same_bits({name: p.detach() for name, p in loaded.named_parameters()}, want)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".txt", ".jinja"}


def test_weights_alone_are_not_resumed_from(tmp_path):
    actor = actor_of(policy())
    actor.model.save(tmp_path, None)
    with pytest.raises(CheckpointError, match="has no optimizer.safetensors"):
        actor.load_optimizer(tmp_path)


def test_every_random_state_survives_json():
    def draw():
        return random.random(), float(np.random.standard_normal()), torch.rand(3).tolist(), random.gauss(0, 1)

    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    draw()
    device = CPUDevice()
    text = json.dumps(rng_state(device), allow_nan=False)
    want = draw()
    draw()
    set_rng_state(json.loads(text), device)
    assert draw() == want
    with pytest.raises(CheckpointError, match="random states of the checkpoint cannot be read"):
        set_rng_state({"python": []}, device)
