"""Weights from a stream give what the shared model gives, bit for bit; streams that break off; stale weights."""

from __future__ import annotations

import io
import multiprocessing
import pickle

import pytest
import torch
from safetensors.torch import load, save

from steepest.errors import RolloutError
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.builtin.network import FusedNetwork, ModelNetwork
from steepest.rollout.engines.hf import HFEngine
from steepest.rollout.weights import LocalWeights, ModelDescription, fingerprint
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, OTHER_END, random_ids, tiny_hf, tiny_lm

OPTIONS = {"end_token_ids": (END, OTHER_END), "pad_token_id": END, "max_model_len": 64}
FEW = random_ids([3, 9, 1, 6, 4])
MANY = random_ids([2 + i % 5 for i in range(34)])  # with n=2 more rows than packed weights serve
SAMPLED = SamplingParams(8, temperature=0.8, n=2, seed=3)
ENGINES = {"builtin": BuiltinEngine, "hf": HFEngine}


class Stream:
    """Tensors as another process would send them: copies under names, nothing of the model behind them."""

    def __init__(self, model, *, stop=None, change=None):
        self.sent = {name: tensor.detach().clone() for name, tensor in model.named_weights()}
        self.stop, self.change = stop, change
        self.iterations = 0

    def named_weights(self):
        self.iterations += 1
        for place, (name, tensor) in enumerate(self.sent.items()):
            if place == self.stop:
                raise ConnectionError("the sender went away")
            yield (name, tensor) if self.change is None else self.change(name, tensor)


def update(model, size=0.05):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.ones_like(parameter)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma", "granite"])
@pytest.mark.parametrize("kind", ["builtin", "builtin bf16", "hf"])
def test_a_stream_gives_the_tokens_and_log_probs_of_the_shared_model_bit_for_bit(kind, case):
    model = tiny_lm(case, **({"residual_multiplier": 0.3} if case == "granite" else {}))
    make = ENGINES[kind.split()[0]]
    options = {**OPTIONS, **({"dtype": torch.bfloat16} if "bf16" in kind else {})}
    shared, streamed = loaded(make, model, **options), make(ModelDescription.of(model), **options)
    state = torch.random.get_rng_state()
    for version in range(2):
        source = Stream(model)
        shared.load_weights(LocalWeights(model), version)
        streamed.load_weights(source, version)
        assert source.iterations == 1
        for tensor in source.sent.values():
            tensor.zero_()  # what was sent is not what is computed with
        for prompts in (FEW, MANY):
            asked = requests_of(prompts, SAMPLED)
            found = streamed.generate(asked)
            assert found == shared.generate(asked)
            assert {c.policy_version for group in found for c in group} == {version}
        shared.sleep()
        streamed.sleep()
        assert streamed.generate(asked) == found
        update(model)
    assert torch.equal(torch.random.get_rng_state(), state), "building a model of its own draws no random number"
    assert streamed.notes == shared.notes
    if make is BuiltinEngine:
        assert isinstance(streamed._network, ModelNetwork if case == "granite" else FusedNetwork)


def test_a_model_of_the_engines_own_counts_as_a_copy_and_shares_nothing():
    model = tiny_lm("llama")
    size = sum(p.numel() * 4 for p in model.parameters())
    for make in ENGINES.values():
        shared, streamed = loaded(make, model, **OPTIONS), make(ModelDescription.of(model), **OPTIONS)
        assert streamed.copied_bytes == 0, "nothing is built before the first load"
        streamed.load_weights(Stream(model), 0)
        assert streamed.copied_bytes == shared.copied_bytes + size
    assert not streamed._held.shared and streamed._model is not model


def test_weights_that_change_after_the_load_are_found_wherever_they_can_be_watched():
    """An engine with a model of its own watches the trainer's too, if that is where its last load came from."""
    model = tiny_lm()
    copying, owning = loaded(BuiltinEngine, model, **OPTIONS), BuiltinEngine(ModelDescription.of(model), **OPTIONS)
    streamed = BuiltinEngine(ModelDescription.of(model), **OPTIONS)
    for engine in (owning, streamed):
        engine.load_weights(Stream(model), 3)
    owning.load_weights(LocalWeights(model), 3)
    copying.load_weights(LocalWeights(model), 3)
    asked = requests_of(FEW, SAMPLED)
    want = streamed.generate(asked)
    assert copying.generate(asked) == owning.generate(asked) == want
    update(model, 0.0)  # also an update that changes no value
    for engine in (copying, owning):
        with pytest.raises(RolloutError, match=r"changed after version 3 .* load_weights\(\)"):
            engine.generate(asked)
    assert fingerprint(Stream(model)) == [] != fingerprint(LocalWeights(model))
    assert streamed.generate(asked) == want, "a stream shows nothing of later updates"


@pytest.mark.parametrize("name", ENGINES)
def test_without_a_whole_load_nothing_is_generated(name):
    model = tiny_lm()
    engine = ENGINES[name](ModelDescription.of(model), **OPTIONS)
    asked = requests_of(FEW, SAMPLED)
    for source in (Stream(model, stop=0), Stream(model, stop=5)):
        with pytest.raises(RolloutError, match=r"has no weights: load_weights\(\) was not called, or it failed"):
            engine.generate(asked)
        with pytest.raises(ConnectionError, match="went away"):
            engine.load_weights(source, 0)
    engine.load_weights(Stream(model), 1)
    want = engine.generate(asked)
    with pytest.raises(ConnectionError):
        engine.load_weights(Stream(model, stop=5), 2)  # some of the weights are new now
    with pytest.raises(RolloutError, match="has no weights"):
        engine.generate(asked)
    engine.load_weights(Stream(model), 1)
    assert engine.generate(asked) == want


def renamed(name, tensor):
    return ("model.layers.0.other", tensor) if "q_proj.weight" in name else (name, tensor)


def cut(name, tensor):
    return (name, tensor[:-1]) if name == "model.norm.weight" else (name, tensor)


@pytest.mark.parametrize(("change", "words"), [
    (renamed, r"sent model.layers.0.other of shape \(32, 32\), which does not exist in Qwen2ForCausalLM"),
    (cut, r"sent model.norm.weight of shape \(31,\), which has the shape \(32,\) in Qwen2ForCausalLM"),
    (lambda name, tensor: ("model.norm.weight", torch.ones(32)), "ended without 25 of the model's weights: model.em"),
])  # fmt: skip
def test_a_stream_that_does_not_fit_the_model_is_named(change, words):
    model = tiny_lm()
    engine = BuiltinEngine(ModelDescription.of(model), **OPTIONS)
    with pytest.raises(RolloutError, match=words):
        engine.load_weights(Stream(model, change=change), 0)


def test_an_engine_on_the_trainers_modules_refuses_to_write_into_them():
    model, other = tiny_lm(), tiny_lm(seed=1)
    before = [p.clone() for p in model.parameters()]
    for make in ENGINES.values():
        engine = loaded(make, model, **OPTIONS)
        for source in (Stream(other), LocalWeights(other)):
            with pytest.raises(RolloutError, match="takes weights from LocalWeights of that model only"):
                engine.load_weights(source, 1)
        engine.load_weights(LocalWeights(model), 1)
        engine.generate(requests_of(FEW, SAMPLED))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_of_a_policy_with_an_adapter_the_merged_weights_are_sent(name):
    model = LoraCausalLM(tiny_hf("qwen2"), LoraSettings(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.saved_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    description = ModelDescription.of(model)
    assert (description.embedding, description.head) == ("model.embed_tokens.weight", None)
    streamed = ENGINES[name](description, **OPTIONS)
    streamed.load_weights(Stream(model), 0)
    merged = loaded(ENGINES[name], model.copy_as(torch.float32).requires_grad_(True), **OPTIONS)
    asked = requests_of(MANY, SAMPLED)
    assert streamed.generate(asked) == merged.generate(asked)


def in_another_process(pipe):
    """An engine that has nothing but what comes through the pipe."""
    torch.set_num_threads(1)
    description, options, requests = pickle.loads(pipe.recv_bytes())
    engine = BuiltinEngine(description, **options)

    class Received:
        def named_weights(self):
            while data := pipe.recv_bytes():
                yield from load(data).items()

    for version in range(2):
        engine.load_weights(Received(), version)
        pipe.send_bytes(pickle.dumps(engine.generate(requests)))


def test_an_engine_in_another_process_generates_the_same_bits():
    model, asked = tiny_lm("llama"), requests_of(FEW, SAMPLED)
    shared = loaded(BuiltinEngine, model, **OPTIONS)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=in_another_process, args=(there,))
    child.start()
    there.close()
    try:
        here.send_bytes(pickle.dumps((ModelDescription.of(model), OPTIONS, asked)))
        for version in range(2):
            shared.load_weights(LocalWeights(model), version)
            for name, tensor in model.named_weights():  # one at a time, as they would be gathered
                here.send_bytes(save({name: tensor.detach().contiguous()}))
            here.send_bytes(b"")
            assert pickle.load(io.BytesIO(here.recv_bytes())) == shared.generate(asked)
            update(model)
    finally:
        here.close()
        child.join(300)
    assert child.exitcode == 0
