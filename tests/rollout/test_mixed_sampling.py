"""Requests of one call with samplings of their own, in all three engines; what every engine refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from steepest.errors import RolloutError
from steepest.models.packing import pack_sequences
from steepest.rollout.api import GenerationRequest, SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.engines.hf import HFEngine, group_seed
from steepest.rollout.engines.vllm import VLLMEngine
from steepest.rollout.weights import LocalWeights, ModelDescription
from tests.rollout.fake_vllm import FakeLLM, FakeParams
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, OTHER_END, random_ids, tiny_lm

PROMPTS = random_ids([3, 9, 3, 5, 12, 6])
NAMES = ("builtin", "hf", "vllm")
WARM = SamplingParams(9, temperature=0.6, n=2, seed=4)
MIXED = [
    WARM,
    SamplingParams(14, n=2, seed=4),
    SamplingParams(9, temperature=0.0, n=2),
    WARM,
    SamplingParams(5, temperature=1.7, top_k=6, n=2, seed=9, ignore_eos=True),
    SamplingParams(14, n=2, seed=4),
]


@pytest.fixture(autouse=True)
def fake_module(monkeypatch):
    module = ModuleType("vllm")
    module.SamplingParams = FakeParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def engine_for(name, model, **options):
    base = {"end_token_ids": (END, OTHER_END), "pad_token_id": END, "max_model_len": 64, **options}
    if name == "vllm":
        shared = {key: base[key] for key in ("end_token_ids", "max_model_len")}
        return loaded(lambda d: VLLMEngine(FakeLLM(model, torch.float32), d, dtype=torch.float32, **shared), model)
    return loaded({"builtin": BuiltinEngine, "hf": HFEngine}[name], model, **base)


def mixed(samplings=MIXED, prompts=PROMPTS):
    return [
        GenerationRequest(prompt, sampling, f"r{place}")
        for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]


@pytest.mark.parametrize("name", ["builtin", "vllm"])
def test_a_request_gets_what_it_gets_when_all_have_its_sampling(name):
    """Samples are numbered over the call, so the random numbers of a request depend on no other request's sampling."""
    engine = engine_for(name, tiny_lm())
    found = engine.generate(mixed())
    for place, sampling in enumerate(MIXED):
        want = engine.generate(requests_of(PROMPTS, sampling))[place]
        assert [(c.token_ids, c.finish_reason) for c in found[place]] == [(c.token_ids, c.finish_reason) for c in want]
        for mine, theirs in zip(found[place], want, strict=True):
            assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)
            assert mine.request_id == f"r{place}"


@pytest.mark.parametrize("name", NAMES)
def test_each_request_keeps_its_own_temperature_and_limits(name):
    model, samplings = tiny_lm(), [replace(s, top_k=-1) for s in MIXED]
    requests = mixed(samplings)
    for request, group in zip(requests, engine_for(name, model).generate(requests), strict=True):
        sampling = request.sampling
        assert len(group) == sampling.n
        for made in group:
            assert made.request_id == request.request_id
            ended = made.token_ids[-1] in (END, OTHER_END) and not sampling.ignore_eos
            assert made.finish_reason == ("stop" if ended else "length")
            assert len(made.token_ids) == sampling.max_tokens or ended
            ids = [*request.token_ids, *made.token_ids]
            packed = pack_sequences([ids], [[i >= len(request.token_ids) for i in range(len(ids))]])
            with torch.no_grad():
                own, _ = model.log_probs(packed, temperature=sampling.temperature or 1.0)
            assert made.log_probs == pytest.approx(own.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_requests_that_differ_in_their_limit_alone_do_not_draw_the_same_numbers(name):
    samplings = [SamplingParams(limit, seed=3, ignore_eos=True) for limit in (20, 21, 22)]
    engine = engine_for(name, tiny_lm())
    made = engine.generate(mixed(samplings, [PROMPTS[0]] * 3))
    assert len({tuple(group[0].token_ids[:20]) for group in made}) == 3
    assert engine.generate(mixed(samplings, [PROMPTS[0]] * 3)) == made


def test_the_hf_engine_draws_the_first_group_with_the_seed_itself():
    engine = engine_for("hf", tiny_lm())
    found = engine.generate(mixed())
    first = [place for place, sampling in enumerate(MIXED) if sampling == WARM]
    alone = engine.generate([mixed()[place] for place in first])
    assert [found[place] for place in first] == alone
    assert group_seed(11, 0) == 11 and len({group_seed(seed, n) for seed in range(50) for n in range(50)}) == 50 * 50
    assert 0 <= group_seed(2**63 - 2, 10**6) < 2**63


def test_the_builtin_engine_prefills_each_group_once_and_counts_all_of_them():
    engine = engine_for("builtin", tiny_lm())
    prompts = [PROMPTS[1], PROMPTS[1], PROMPTS[3], PROMPTS[1]]
    warm, cold = SamplingParams(4, n=5), SamplingParams(4, n=2, temperature=0.0)
    made = engine.generate(mixed([warm, warm, cold, cold], prompts))
    assert engine.stats.prefill_tokens == 9 + 5 + 9  # once for the two warm requests
    assert engine.stats.generated_tokens == sum(len(c.token_ids) for group in made for c in group)


@pytest.mark.parametrize("name", NAMES)
def test_every_engine_refuses_equal_ids_and_media(name):
    engine, sampling = engine_for(name, tiny_lm()), SamplingParams(4)
    with pytest.raises(RolloutError, match="request x was given twice"):
        engine.generate([GenerationRequest([3], sampling, "x"), GenerationRequest([4], sampling, "x")])
    with pytest.raises(RolloutError, match=rf"request y has media \(images\), and the {name} engine reads token ids"):
        engine.generate([GenerationRequest([3], sampling, "y", media={"images": ["a picture"]})])
    with pytest.raises(RolloutError, match="request z has a prompt of 64 tokens and max_model_len is 64"):
        engine.generate([GenerationRequest([3] * 64, sampling, "z")])


@pytest.mark.parametrize("name", NAMES)
def test_completions_carry_the_version_of_the_weights_they_were_sampled_with(name):
    model = tiny_lm()
    engine = engine_for(name, model)
    for version in (0, 7):
        engine.load_weights(LocalWeights(model), version)
        made = engine.generate(requests_of(PROMPTS, WARM))
        assert {c.policy_version for group in made for c in group} == {version}


class Sent:
    """What a model sends, as a stream."""

    def __init__(self, model):
        self.model = model

    def named_weights(self):
        for name, tensor in self.model.named_weights():
            yield name, tensor.detach().clone()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_vllm_takes_a_stream_once_and_compares_its_bits_but_scores_nothing(family, tied):
    model = tiny_lm(family, tie_word_embeddings=tied)
    fake = FakeLLM(model, torch.float32)
    description = ModelDescription.of(model)
    assert description.head == (None if tied else "lm_head.weight")
    engine = VLLMEngine(fake, description, end_token_ids=[END], dtype=torch.float32, max_model_len=32)
    engine.load_weights(Sent(model), 5)
    assert fake.calls == ["load", "reset"]
    made = engine.generate(requests_of(PROMPTS, WARM))
    assert made[0][0].policy_version == 5
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight += 1e-6
    assert engine.generate(requests_of(PROMPTS, WARM)) == made, "a stream shows nothing of later updates"
    fake.drop = "layers.1.mlp.up_proj"
    with pytest.raises(RolloutError, match=r"vLLM's weights differ from the policy's in: layers\.1\. It would sample"):
        engine.load_weights(Sent(model), 6)
    with pytest.raises(RolloutError, match="old weights"):
        engine.generate(requests_of(PROMPTS, WARM))


def test_what_a_source_raises_is_not_blamed_on_vllm():
    class Broken:
        def named_weights(self):
            raise RolloutError("rank 3 did not send its weights within 60 s")
            yield

    model = tiny_lm()
    engine = engine_for("vllm", model)
    with pytest.raises(RolloutError, match=r"^rank 3 did not send"):
        engine.load_weights(Broken(), 1)


def test_a_request_that_vllm_gives_up_comes_back_as_aborted():
    model = tiny_lm()
    engine = engine_for("vllm", model)
    real = engine._llm.generate

    def gives_up(*args, **options):
        outputs = real(*args, **options)
        answer = outputs[2].outputs[0]
        answer.finish_reason, answer.token_ids, answer.logprobs = "abort", [], None
        return outputs

    engine._llm.generate = gives_up
    made = engine.generate(requests_of(PROMPTS, WARM))
    assert [c.finish_reason == "abort" for group in made for c in group] == [i == 2 for i in range(12)]
    assert (made[1][0].token_ids, made[1][0].log_probs, made[1][0].request_id) == ([], [], "1")
