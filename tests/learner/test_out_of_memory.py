"""A pass that runs out of memory names model, micro-batch and the setting to lower. The allocations really fail."""

from __future__ import annotations

import pytest
import torch

from steepest.data.sft import SFTExample
from steepest.errors import DeviceMemoryError
from steepest.learner.critic import Critic
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import Reference
from steepest.learner.supervised import Supervised
from steepest.learner.trainable import ComputeSettings
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.engines.hf import HFEngine
from tests.support.full_memory import FullMemory, use_it_up
from tests.support.learner_parts import make_actor, make_batch, make_critic, policy, value_model, with_log_probs
from tests.support.rollout_requests import loaded, requests_of

ROWS = MicroBatches(rows=3, purpose="some.pass")
TOKENS = MicroBatches(tokens=500, purpose="other.pass")
CUT = {Supervised: {"micro": ROWS}, Critic: {"update": UpdateSettings(mini_batch_rows=8, micro=ROWS)}}


FORWARD = "embedding"
"""The operation that every forward pass of a transformers model begins with."""


def assert_told(call, *words, at=FORWARD):
    """`call` runs out of memory at this operation of torch, and says so in these words."""
    with FullMemory(at), pytest.raises(DeviceMemoryError) as caught:
        call()
    text = str(caught.value)
    assert "out of memory on cpu, 37252.90 GiB more were asked for" in text and " free; this process held" in text
    for word in words:
        assert word in text, text
    return text


def test_actor():
    actor = make_actor(mini=8, micro=TOKENS, forward=ROWS)
    batch = with_log_probs(make_batch(), actor)
    before = [p.clone() for p in actor.model.parameters()]
    text = assert_told(
        lambda: actor.update(batch, step=1),
        "actor update: a micro-batch of 7 sequence(s), 61 tokens: out of memory",
        ". Lower micro_batch_tokens below 61 (now 500), or set enable_gradient_checkpointing=true, or",
    )
    assert text.endswith("The same command resumes from the last checkpoint, if one was written.")
    assert all(torch.equal(p, q) for p, q in zip(before, actor.model.parameters(), strict=True))
    text = assert_told(
        lambda: actor.log_probs(batch),
        "actor log-probs: a micro-batch of 3 sequence(s), 30 tokens: out of memory",
        ". Lower micro_batch_rows below 3 (now 3), or take a smaller model.",
    )


def test_checkpointing_that_is_on_is_not_recommended():
    actor = make_actor(compute=ComputeSettings(gradient_checkpointing=True))
    batch = with_log_probs(make_batch(), actor)
    assert "checkpointing" not in assert_told(lambda: actor.update(batch, step=1), "Lower micro_batch_tokens below 61")


def test_a_single_sequence_cannot_be_cut_into_micro_batches():
    actor = make_actor(forward=MicroBatches(rows=1))
    text = assert_told(
        lambda: actor.log_probs(make_batch()), "of 1 sequence(s)", "too much: lower max_length, or take a"
    )
    assert "micro_batch" not in text


def test_reference_and_critic():
    reference = Reference(policy(), compute=ComputeSettings(), forward=ROWS)
    critic = make_critic(micro=TOKENS, forward=ROWS)
    assert_told(
        lambda: reference.log_probs(make_batch()), "reference log-probs: a micro-batch of 3", "micro_batch_rows"
    )
    assert_told(lambda: critic.values(make_batch()), "critic values: a micro-batch of 3", "micro_batch_rows")
    assert_told(
        lambda: critic.update(make_batch(), step=1), "critic update: a micro-batch of 7", "micro_batch_tokens below 61"
    )


def test_supervised():
    model = Supervised(policy(), compute=ComputeSettings(), optim=OptimSettings(lr=1e-3), micro=TOKENS)
    examples = [SFTExample("rows:0", [1, 2, 3], [False, True, True])] * 2
    assert_told(
        lambda: model.update(examples), "model update: a micro-batch of 2 sequence(s), 6 tokens", "micro_batch_tokens"
    )
    assert_told(lambda: model.evaluate(examples), "model validation: a micro-batch of 2 sequence(s), 6 tokens")


def test_what_stays_on_the_device():
    actor = make_actor()
    batch = with_log_probs(make_batch(), actor)
    assert_told(
        lambda: actor.update(batch, step=1),
        "actor optimizer step, with two moments of each weight: out of memory",
        at="_fused_adamw",
    )
    for kind, model in ((Supervised, policy()), (Critic, value_model())):
        model.to = use_it_up
        assert_told(
            lambda kind=kind, model=model: kind(
                model, compute=ComputeSettings(), optim=OptimSettings(lr=1e-3), **CUT[kind]
            ),
            "weights, on their way to the device: out of memory",
            "Take a smaller model, or a device with more",
            at="nothing",
        )


def engine(kind, model=None, **more):
    return loaded(kind, model or policy(), end_token_ids=[1], pad_token_id=0, max_num_seqs=6, max_model_len=16, **more)


def test_rollout():
    builtin = engine(BuiltinEngine)
    prompts, sampling = [[3, 4, 5]] * 4, SamplingParams(max_tokens=9)
    builtin.generate(requests_of(prompts, sampling))
    assert_told(
        lambda: builtin.generate(requests_of(prompts, sampling)),
        "rollout: 4 sequence(s) at once, each of at most 12 tokens, KV cache 6.00 KiB: out of memory",
        "Lower max_num_seqs below 4 (now 6), gpu_memory_utilization or max_response_length.",
        at="index_select",
    )


def test_rollout_by_transformers():
    found = engine(HFEngine)
    assert_told(
        lambda: found.generate(requests_of([[3, 4, 5]], SamplingParams(max_tokens=9))),
        "rollout: 6 sequence(s) at once",
        "Lower max_num_seqs (now 6) or max_response_length.",
    )


def test_the_rollout_engines_copy():
    model = policy()
    assert_told(
        lambda: engine(BuiltinEngine, model, dtype=torch.bfloat16),
        "rollout: a copy of the weights in torch.bfloat16: out of memory",
        "Set free_cache_engine=true, which gives it back while the models train",
        at="copy_",
    )
