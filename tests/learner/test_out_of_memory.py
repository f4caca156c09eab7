"""A pass that runs out of memory names model, micro-batch and the setting to lower. The allocations really fail."""

from __future__ import annotations

import pytest
import torch

from steepest.data.sft import SFTExample
from steepest.errors import DeviceMemoryError
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.optim import Optimizer, OptimSettings
from steepest.learner.reference import Reference
from steepest.learner.supervised import Supervised
from steepest.learner.trainable import ComputeSettings
from steepest.models.causal_lm import CausalLM
from steepest.models.value_head import ValueModel
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.builtin.network import FusedNetwork
from steepest.rollout.engines.hf import HFEngine
from tests.learner.helpers import make_actor, make_batch, make_critic, policy, with_log_probs
from tests.rollout.asking import loaded, requests_of

ROWS = MicroBatches(rows=3, purpose="some.pass")
TOKENS = MicroBatches(tokens=500, purpose="other.pass")


@pytest.fixture
def full(monkeypatch):
    """From now on every forward pass asks for more than any machine has."""

    def use_it_up(*args, **kwargs):
        torch.empty(10**13)

    def start():
        monkeypatch.setattr(CausalLM, "hidden_states", use_it_up)
        monkeypatch.setattr("steepest.models.value_head.run_backbone", use_it_up)
        monkeypatch.setattr(FusedNetwork, "hidden_states", use_it_up)

    return start


def assert_told(call, *words):
    with pytest.raises(DeviceMemoryError) as caught:
        call()
    text = str(caught.value)
    assert "out of memory on cpu, 37252.90 GiB more were asked for" in text and " free; this process held" in text
    for word in words:
        assert word in text, text
    return text


def test_actor(full):
    actor = make_actor(mini=8, micro=TOKENS, forward=ROWS)
    batch = with_log_probs(make_batch(), actor)
    before = [p.clone() for p in actor.model.parameters()]
    full()
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


def test_checkpointing_that_is_on_is_not_recommended(full):
    actor = make_actor(compute=ComputeSettings(gradient_checkpointing=True))
    batch = with_log_probs(make_batch(), actor)
    full()
    assert "checkpointing" not in assert_told(lambda: actor.update(batch, step=1), "Lower micro_batch_tokens below 61")


def test_a_single_sequence_cannot_be_cut_into_micro_batches(full):
    actor = make_actor(forward=MicroBatches(rows=1))
    full()
    text = assert_told(
        lambda: actor.log_probs(make_batch()), "of 1 sequence(s)", "too much: lower max_length, or take a"
    )
    assert "micro_batch" not in text


def test_reference_and_critic(full):
    reference = Reference(policy(), compute=ComputeSettings(), forward=ROWS)
    critic = make_critic(micro=TOKENS, forward=ROWS)
    full()
    assert_told(
        lambda: reference.log_probs(make_batch()), "reference log-probs: a micro-batch of 3", "micro_batch_rows"
    )
    assert_told(lambda: critic.values(make_batch()), "critic values: a micro-batch of 3", "micro_batch_rows")
    assert_told(
        lambda: critic.update(make_batch(), step=1), "critic update: a micro-batch of 7", "micro_batch_tokens below 61"
    )


def test_supervised(full):
    model = Supervised(policy(), compute=ComputeSettings(), optim=OptimSettings(lr=1e-3), micro=TOKENS)
    examples = [SFTExample("rows:0", [1, 2, 3], [False, True, True])] * 2
    full()
    assert_told(
        lambda: model.update(examples), "model update: a micro-batch of 2 sequence(s), 6 tokens", "micro_batch_tokens"
    )
    assert_told(lambda: model.evaluate(examples), "model validation: a micro-batch of 2 sequence(s), 6 tokens")


def test_what_stays_on_the_device(monkeypatch):
    def use_it_up(*args, **kwargs):
        torch.empty(10**13)

    actor = make_actor()
    batch = with_log_probs(make_batch(), actor)
    monkeypatch.setattr(Optimizer, "step", use_it_up)
    assert_told(
        lambda: actor.update(batch, step=1), "actor optimizer step, with two moments of each weight: out of memory"
    )
    for kind, make in ((CausalLM, make_actor), (ValueModel, make_critic)):
        monkeypatch.setattr(kind, "to", use_it_up)
        assert_told(
            make, "weights, on their way to the device: out of memory", "Take a smaller model, or a device with more"
        )


def engine(kind, **more):
    return loaded(kind, policy(), end_token_ids=[1], pad_token_id=0, max_num_seqs=6, max_model_len=16, **more)


def test_rollout(full):
    builtin = engine(BuiltinEngine)
    prompts, sampling = [[3, 4, 5]] * 4, SamplingParams(max_tokens=9)
    builtin.generate(requests_of(prompts, sampling))
    full()
    assert_told(
        lambda: builtin.generate(requests_of(prompts, sampling)),
        "rollout: 4 sequence(s) at once, each of at most 12 tokens, KV cache 6.00 KiB: out of memory",
        "Lower max_num_seqs below 4 (now 6), gpu_memory_utilization or max_response_length.",
    )


def test_rollout_by_transformers(monkeypatch):
    found = engine(HFEngine)
    monkeypatch.setattr(type(found._model.hf), "generate", lambda *args, **kwargs: torch.empty(10**13))
    assert_told(
        lambda: found.generate(requests_of([[3, 4, 5]], SamplingParams(max_tokens=9))),
        "rollout: 6 sequence(s) at once",
        "Lower max_num_seqs (now 6) or max_response_length.",
    )


def test_the_rollout_engines_copy(monkeypatch):
    monkeypatch.setattr(FusedNetwork, "refresh", lambda *args: torch.empty(10**13))
    assert_told(
        lambda: engine(BuiltinEngine, dtype=torch.bfloat16),
        "rollout: a copy of the weights in torch.bfloat16: out of memory",
        "Set free_cache_engine=true, which gives it back while the models train",
    )
