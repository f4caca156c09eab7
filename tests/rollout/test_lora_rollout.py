"""A policy with an adapter generates as it trains: engines' log-probs against the trainer's, after updates too."""

from __future__ import annotations

import pytest
import torch

from steepest.models.bf16_storage import hold_in_bf16
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import pack_sequences
from steepest.rollout import ROLLOUT_ENGINES, SamplingParams
from steepest.rollout.weight_check import PolicyDigest
from steepest.rollout.weights import LocalWeights, ModelDescription
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, random_ids, tiny_hf


@torch.no_grad()
def disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.saved_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def engine_of(name, model, dtype=torch.float32):
    factory = ROLLOUT_ENGINES.get(name).value
    return loaded(factory, model, end_token_ids=[END], pad_token_id=0, dtype=dtype, max_num_seqs=4, max_model_len=64)


def largest_gap(engine, model):
    """Between the engine's log-probs of what it generates and the policy's."""
    prompts = random_ids([3, 9, 5, 6])
    gaps = []
    for prompt, [answer] in zip(
        prompts, engine.generate(requests_of(prompts, SamplingParams(max_tokens=12, seed=1))), strict=True
    ):
        mask = [[False] * len(prompt) + [True] * len(answer.token_ids)]
        with torch.no_grad():
            mine, _ = model.log_probs(pack_sequences([[*prompt, *answer.token_ids]], mask))
        gaps.append((mine - torch.tensor(answer.log_probs)).abs().max())
    return float(max(gaps))


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
@pytest.mark.parametrize("name", ["builtin", "hf"])
def test_log_probs_are_the_trainer_s_after_every_update(name, family):
    model = LoraCausalLM(tiny_hf(family), LoraSettings(rank=4))
    engine = engine_of(name, model)
    base = model.copy_as(torch.float32)
    for version in range(3):
        if version:
            disturb(model, version)
            assert largest_gap(engine_of(name, base), model) > 0.1  # the adapter does something
        engine.load_weights(LocalWeights(model), version)
        assert largest_gap(engine, model) < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
@pytest.mark.parametrize("name", ["builtin", "hf"])
def test_on_a_base_that_is_held_in_bf16_no_token_and_no_log_prob_changes(name, family):
    made = []
    for held in (False, True):
        hf = tiny_hf(family)
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.copy_(parameter.bfloat16())
        model = LoraCausalLM(hf, LoraSettings(rank=4))
        if held:
            hold_in_bf16(model.hf, rounding=False)
            assert sum(p.dtype == torch.bfloat16 for p in hf.parameters()) == 14
        disturb(model, 1)
        engine = engine_of(name, model)
        engine.load_weights(LocalWeights(model), 1)
        prompts = random_ids([3, 9, 5, 6] + [8] * 70)  # more rows than packed weights are used for
        made.append(engine.generate(requests_of(prompts, SamplingParams(max_tokens=12, seed=1))))
    assert made[0] == made[1]


def test_a_copy_in_bf16_has_the_merged_weights():
    model = LoraCausalLM(tiny_hf(), LoraSettings(rank=4))
    disturb(model, 1)
    engine = engine_of("builtin", model, torch.bfloat16)
    engine.load_weights(LocalWeights(model), 1)
    copied = model.copy_as(torch.float32)
    merged = engine_of("builtin", copied, torch.bfloat16)
    merged.load_weights(LocalWeights(copied), 1)
    prompts, sampling = random_ids([3, 9, 5, 6]), SamplingParams(max_tokens=12, seed=1)
    assert engine.generate(requests_of(prompts, sampling)) == merged.generate(requests_of(prompts, sampling))
    base = engine_of("builtin", tiny_base(), torch.bfloat16)
    assert engine.generate(requests_of(prompts, sampling)) != base.generate(requests_of(prompts, sampling))


def tiny_base(family="qwen2"):
    return LoraCausalLM(tiny_hf(family), LoraSettings(rank=4))


def policy_digest(model, dtype, version):
    digest = PolicyDigest(ModelDescription.of(model), dtype, version)
    assert [name for name, _ in digest.passing(model.named_weights())] == [name for name, _ in model.named_weights()]
    return digest.found


def test_the_digest_that_vllm_is_compared_with_is_that_of_the_merged_model():
    model = LoraCausalLM(tiny_hf("llama"), LoraSettings(rank=4))
    plain = policy_digest(model, torch.float32, 3)
    disturb(model, 1)
    found = policy_digest(model, torch.bfloat16, 3)
    assert found == policy_digest(model.copy_as(torch.float32), torch.bfloat16, 3)
    assert {key for key in found if found[key] != policy_digest(tiny_base("llama"), torch.bfloat16, 3)[key]} == {
        "layers.0",
        "layers.1",
    }
    assert plain.keys() == found.keys()
