"""The engine's own decoder against transformers, family by family; what it does not know falls back, and says so."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from steepest.models.attention import attention_implementation
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin import linear
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.builtin.layout import UnknownLayout, read_layout
from steepest.rollout.builtin.network import FusedNetwork, ModelNetwork
from steepest.rollout.weights import LocalWeights
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, random_ids, randomise, tiny_lm

PROMPTS = random_ids([3, 9, 1, 6, 70])
GREEDY = SamplingParams(12, temperature=0.0, ignore_eos=True)
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KNOWN = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 16}),
    "llama without groups": ("llama", {"num_key_value_heads": 4}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 wide heads": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "gemma": ("gemma", {}),
    "gemma untied": ("gemma", {"tie_word_embeddings": False}),
}
UNKNOWN = {
    "granite multipliers": ("granite", {"residual_multiplier": 0.3}, "log-probs differ from the decoder's by"),
    "gemma2": ("gemma2", {"sliding_window": 128, "attn_logit_softcapping": None}, "a layer has a "),
    "phi3": ("phi3", {"pad_token_id": 1}, "a layer has a resid_attn_dropout"),
    "olmo2": ("olmo2", {}, "a layer has no input_layernorm"),
    "cohere": ("cohere", {"pad_token_id": 1}, "a layer has no post_attention_layernorm"),
}


def engine_for(model, **options):
    base = {"end_token_ids": (END,), "pad_token_id": END, "max_model_len": 96}
    return loaded(BuiltinEngine, model, **{**base, **options})


@torch.no_grad()
def own_log_probs(model, prompt, completion):
    """transformers alone, one row at a time: (greedy tokens, log-probs of the completion's tokens)."""
    sequence = torch.tensor([[*prompt, *completion.token_ids]])
    with attention_implementation(model.hf, "eager"):
        logits = model.hf(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    log_probs = F.log_softmax(logits, -1)
    return logits.argmax(-1).tolist(), log_probs.gather(1, sequence[0, len(prompt) :, None])[:, 0].tolist()


def assert_agrees(engine, model, sampling=GREEDY):
    for prompt, group in zip(PROMPTS, engine.generate(requests_of(PROMPTS, sampling)), strict=True):
        for completion in group:
            tokens, log_probs = own_log_probs(model, prompt, completion)
            if sampling.temperature == 0:
                assert completion.token_ids == tokens
            assert completion.log_probs == pytest.approx(log_probs, abs=1e-4)


@pytest.mark.parametrize("case", KNOWN)
def test_tokens_and_log_probs_are_those_of_transformers_also_after_an_update(case):
    family, changes = KNOWN[case]
    model = tiny_lm(family, **changes)
    engine = engine_for(model, max_num_seqs=3)
    assert isinstance(engine._network, FusedNetwork) and engine.notes == ()
    assert_agrees(engine, model)
    assert_agrees(engine, model, SamplingParams(6, n=2, seed=3))
    randomise(model.hf, seed=7)
    engine.load_weights(LocalWeights(model), 1)
    assert_agrees(engine, model)


@pytest.mark.parametrize("case", ["llama", "llama biases", "qwen3", "gemma"])
def test_policys_own_weights_give_the_same_and_are_never_stale(case):
    family, changes = KNOWN[case]
    model = tiny_lm(family, **changes)
    engine = engine_for(model, packed_share=0.0)
    assert engine.shares_weights and "more than 0% of this machine's memory" in engine.notes[0]
    assert_agrees(engine, model)
    randomise(model.hf, seed=7)
    assert_agrees(engine, model)


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "gemma"])
def test_bf16_copies_are_close_and_follow_an_update(case):
    family, changes = KNOWN[case]
    model = tiny_lm(family, **changes)
    engine = engine_for(model, dtype=torch.bfloat16)
    assert isinstance(engine._network, FusedNetwork) and not engine.shares_weights
    for seed in (None, 7):
        if seed is not None:
            randomise(model.hf, seed)
            engine.load_weights(LocalWeights(model), 1)
        differences = []
        for prompt, group in zip(PROMPTS, engine.generate(requests_of(PROMPTS, SamplingParams(8))), strict=True):
            _, log_probs = own_log_probs(model, prompt, group[0])
            differences += [abs(a - b) for a, b in zip(group[0].log_probs, log_probs, strict=True)]
        assert sum(differences) / len(differences) < 0.1  # these weights are large; a wrong layer gives above 1


def test_many_rows_and_few_rows_take_different_weights_and_agree():
    """Above `packed_rows` rows the unpacked weights serve; tokens do not change with the number of rows."""
    model = tiny_lm("llama")
    prompts = random_ids([4 + i % 5 for i in range(linear.packed_rows() + 8)])
    sampling = SamplingParams(10, seed=2)
    together = engine_for(model, max_num_seqs=len(prompts)).generate(requests_of(prompts, sampling))
    few = engine_for(model, max_num_seqs=40).generate(requests_of(prompts, sampling))
    assert [g[0].token_ids for g in together] == [g[0].token_ids for g in few]
    large = FusedNetwork(model, read_layout(model, 96), torch.float32, copies=True, packed=True)
    assert large.copied_bytes == 2 * 4 * sum(m.base.weight.numel() for m in read_layout(model, 96).matrices())


def test_equal_tokens_with_and_without_a_shared_prefix():
    model = tiny_lm("qwen3")
    start = random_ids([40])[0]
    prompts = [start + p for p in random_ids([3, 9, 1, 6, 4, 12, 5, 2, 7], seed=1)]
    engine, sampling = engine_for(model, max_num_seqs=4), SamplingParams(10, n=2, seed=4)
    made = engine.generate(requests_of(prompts, sampling))
    assert engine.stats.prefill_tokens == 40 + sum(len(p) - 40 for p in prompts)
    alone = [
        engine.generate(requests_of([p] * (i + 1), sampling))[i] for i, p in enumerate(prompts)
    ]  # keeps the row's number
    assert [[c.token_ids for c in g] for g in made] == [[c.token_ids for c in g] for g in alone]
    for group, prompt in zip(made, prompts, strict=True):
        assert group[0].log_probs == pytest.approx(own_log_probs(model, prompt, group[0])[1], abs=1e-4)


@pytest.mark.parametrize("case", UNKNOWN)
def test_other_layouts_run_on_the_models_own_forward_and_the_note_says_why(case):
    family, changes, reason = UNKNOWN[case]
    model = tiny_lm(family, **changes)
    engine = engine_for(model)
    assert isinstance(engine._network, ModelNetwork) and engine.shares_weights
    (note,) = engine.notes
    assert f"rollout: {type(model.hf).__name__} runs on its own forward pass" in note
    assert reason in note
    assert_agrees(engine, model)


def test_a_copy_of_another_layout_follows_an_update_too():
    model = tiny_lm("granite", residual_multiplier=0.3)
    engine = engine_for(model, dtype=torch.bfloat16)
    assert isinstance(engine._network, ModelNetwork) and engine.copied_bytes == 2 * sum(
        p.numel() for p in model.parameters()
    )
    before = engine.generate(requests_of(PROMPTS, GREEDY))
    randomise(model.hf, seed=7)
    engine.load_weights(LocalWeights(model), 1)
    after = engine.generate(requests_of(PROMPTS, GREEDY))
    assert after != before and after == engine_for(model, dtype=torch.bfloat16, version=1).generate(
        requests_of(PROMPTS, GREEDY)
    )


@pytest.mark.parametrize("what", ["attention", "mlp"])
def test_a_model_that_computes_something_else_is_found_out(what):
    """Neither is to be seen in the modules' names and shapes."""
    model = tiny_lm("llama")
    layer = model.hf.model.layers[1]
    if what == "attention":
        honest = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, **kwargs: (honest(*args, **kwargs)[0] * 1.001, None)
    else:
        honest = layer.mlp.forward
        layer.mlp.forward = lambda x: honest(x) * 1.001
    engine = engine_for(model)
    assert isinstance(engine._network, ModelNetwork) and "log-probs differ from the decoder's" in engine.notes[0]
    assert_agrees(engine, model, SamplingParams(4))


def test_a_rotation_of_parts_of_heads_is_not_taken_for_one_of_whole_heads():
    model = tiny_lm("llama")
    whole = model.hf.model.rotary_emb.forward
    calls = []

    def partly(x, position_ids):
        calls.append(position_ids.shape)
        cos, sin = whole(x, position_ids)
        return (cos, sin) if len(calls) == 1 else (cos[..., :4], sin[..., :4])  # the model's own pass comes first

    model.hf.model.rotary_emb.forward = partly
    with pytest.raises(UnknownLayout, match=r"its rotary table is \(1, 96, 4\) for heads of 8"):
        read_layout(model, 96)
