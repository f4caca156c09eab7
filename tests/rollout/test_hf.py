"""transformers' generate as the independent reference of the built-in engine."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from steepest.errors import RolloutError
from steepest.models.causal_lm import CausalLM
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.engines.hf import HFEngine
from steepest.rollout.weights import ModelDescription
from tests.rollout.test_engine import PROMPTS, as_batch, flatten, trainer_log_probs
from tests.support.architectures import tiny_config, tiny_model
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, FAMILIES, OTHER_END, tiny_lm

OPTIONS = {"end_token_ids": (END, OTHER_END), "pad_token_id": END, "max_model_len": 40}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_log_probs_equal_the_builtin_engine(family):
    model, sampling = tiny_lm(family), SamplingParams(30, temperature=0.0)
    theirs = flatten(loaded(HFEngine, model, **OPTIONS).generate(requests_of(PROMPTS, sampling)))
    mine = flatten(loaded(BuiltinEngine, model, max_num_seqs=3, **OPTIONS).generate(requests_of(PROMPTS, sampling)))
    assert [(c.token_ids, c.finish_reason) for c in mine] == [(c.token_ids, c.finish_reason) for c in theirs]
    assert len({len(c.token_ids) for c in mine}) > 1
    for a, b in zip(mine, theirs, strict=True):
        assert a.log_probs == pytest.approx(b.log_probs, abs=2e-5)


def test_sampled_log_probs_are_those_of_the_trainer_at_that_temperature():
    model = tiny_lm()
    made = flatten(
        loaded(HFEngine, model, **OPTIONS).generate(requests_of(PROMPTS, SamplingParams(20, temperature=0.7, n=2)))
    )
    batch = as_batch(PROMPTS, made, 2)
    difference = batch.rollout_log_probs - trainer_log_probs(model, batch, 0.7)
    assert float(difference[batch.response_mask].abs().max()) < 2e-5


def test_filters_are_applied_to_tokens_and_log_probs():
    made = flatten(
        loaded(HFEngine, tiny_lm(), **OPTIONS).generate(requests_of(PROMPTS, SamplingParams(10, top_k=1, n=2)))
    )
    assert all(log_prob == pytest.approx(0.0, abs=1e-6) for c in made for log_prob in c.log_probs)
    greedy = loaded(BuiltinEngine, tiny_lm(), **OPTIONS).generate(
        requests_of(PROMPTS, SamplingParams(10, temperature=0.0, n=2))
    )
    assert [c.token_ids for c in made] == [c.token_ids for c in flatten(greedy)]


def test_the_models_own_generation_settings_do_not_leak_in():
    model = tiny_lm()
    plain = loaded(HFEngine, model, **OPTIONS).generate(requests_of(PROMPTS, SamplingParams(10, temperature=0.0)))
    model.hf.generation_config = GenerationConfig(repetition_penalty=5.0, top_k=1, max_new_tokens=2, eos_token_id=33)
    own = model.hf.generation_config
    assert (
        loaded(HFEngine, model, **OPTIONS).generate(requests_of(PROMPTS, SamplingParams(10, temperature=0.0))) == plain
    )
    assert model.hf.generation_config is own


def test_same_seed_same_tokens_limits_and_mode():
    model = tiny_lm().train()
    engine = loaded(HFEngine, model, **{**OPTIONS, "max_model_len": 20})
    state = torch.random.get_rng_state()
    first = engine.generate(requests_of(PROMPTS, SamplingParams(30, n=2, seed=3, ignore_eos=True)))
    assert engine.generate(requests_of(PROMPTS, SamplingParams(30, n=2, seed=3, ignore_eos=True))) == first
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    assert [len(c.token_ids) for c in flatten(first)] == [20 - len(p) for p in PROMPTS for _ in range(2)]
    assert model.config._attn_implementation == "steepest"


def test_another_dtype_is_refused():
    with pytest.raises(RolloutError, match="^rollout_engine=hf generates in the weights' dtype"):
        loaded(HFEngine, tiny_lm(), dtype=torch.bfloat16, **OPTIONS)


def test_a_model_that_runs_in_rows_is_refused():
    model = CausalLM(tiny_model(tiny_config("bloom")))
    with pytest.raises(RolloutError, match="=hf pads prompts on the left.*BloomForCausalLM: it does not use.*builtin"):
        HFEngine(ModelDescription.of(model), end_token_ids=[1], pad_token_id=0, max_model_len=24)
