"""Log-probs against slow loops, gradients against padded training, saving against from_pretrained."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from steepest.core.batch import Batch
from steepest.errors import ModelError
from steepest.models.attention import PackedContext, attention_implementation
from steepest.models.load import load_tokenizer
from steepest.models.packing import pack_batch, pack_sequences, scatter
from tests.support.tiny_models import FAMILIES, random_ids, tiny_folder, tiny_lm


def small_batch() -> Batch:
    prompts, responses = random_ids([3, 6, 1, 4], seed=1), random_ids([5, 1, 7, 4], seed=2)
    return Batch.from_sequences(prompts, responses, group_ids=range(4), truncated=[False] * 4)


@torch.no_grad()
def token_by_token(model, batch, temperature=1.0):
    """Prefix forward by transformers alone, softmax, pick the next token: nothing shifted, nothing packed."""
    out = torch.zeros(batch.responses.shape)
    entropy = torch.zeros(batch.responses.shape)
    with attention_implementation(model.hf, "eager"):
        for i, (p, r) in enumerate(zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True)):
            sequence = batch.prompts[i, batch.prompts.shape[1] - p :].tolist()
            for t in range(r):
                logits = model.hf(input_ids=torch.tensor([sequence])).logits[0, -1] / temperature
                log_p = F.log_softmax(logits, -1)
                out[i, t] = log_p[batch.responses[i, t]]
                entropy[i, t] = -(log_p.exp() * log_p).sum()
                sequence.append(int(batch.responses[i, t]))
    return out, entropy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_token_by_token_loop(family, temperature):
    model, batch = tiny_lm(family), small_batch()
    packed = pack_batch(batch, batch.response_mask)
    log_probs, entropies = model.log_probs(packed, temperature=temperature, with_entropy=True)
    want, want_entropy = token_by_token(model, batch, temperature)
    assert want[batch.response_mask].std() > 0.5  # a distribution in which an off-by-one would show
    torch.testing.assert_close(scatter(log_probs, packed, want.shape), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scatter(entropies, packed, want.shape), want_entropy, atol=1e-5, rtol=1e-5)


def test_train_and_eval_give_equal_log_probs():
    model, packed = tiny_lm(), pack_batch(small_batch(), small_batch().response_mask)
    evaluated, _ = model.eval().log_probs(packed)
    trained, _ = model.train().log_probs(packed)
    assert torch.equal(evaluated, trained)


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_packed_and_padded_training_give_equal_gradients(family):
    model, batch = tiny_lm(family), small_batch()
    weight = torch.randn(batch.responses.shape, generator=torch.Generator().manual_seed(3))
    packed = pack_batch(batch, batch.response_mask)
    (scatter(model.log_probs(packed, temperature=0.8)[0], packed, weight.shape) * weight).sum().backward()
    mine = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    with attention_implementation(model.hf, "sdpa"):
        mask = batch.attention_mask
        logits = model.hf(batch.input_ids, attention_mask=mask.long(), position_ids=batch.position_ids).logits
    logits = logits[:, batch.prompts.shape[1] - 1 : -1] / 0.8
    log_probs = F.log_softmax(logits, -1).gather(2, batch.responses[..., None])[..., 0]
    (log_probs * weight * batch.response_mask).sum().backward()
    for got, parameter in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, atol=2e-5, rtol=1e-4)


def test_a_batch_without_targets_gives_nothing_and_zero_gradients():
    model = tiny_lm()
    log_probs, entropies = model.log_probs(pack_sequences([[3, 4]], [[False, False]]), with_entropy=True)
    assert log_probs.shape == entropies.shape == (0,)
    log_probs.sum().backward()
    assert all(p.grad is None or float(p.grad.abs().max()) == 0.0 for p in model.parameters())


def test_decoding_logits_apply_scale_and_soft_cap_as_the_model_does():
    for model in (
        tiny_lm("granite", logits_scaling=4.0),
        tiny_lm("gemma2", **GEMMA2),
        tiny_lm("cohere", logit_scale=0.3),
    ):
        ids = torch.tensor(random_ids([9])[0])
        with torch.no_grad():
            hidden = model.hidden_states(ids, torch.arange(9), PackedContext([9]))
            with attention_implementation(model.hf, "eager"):
                want = model.hf(input_ids=ids[None]).logits[0]
            torch.testing.assert_close(model.logits(hidden), want, atol=2e-5, rtol=1e-5)


GEMMA2 = {"attn_logit_softcapping": None, "final_logit_softcapping": 3.0, "head_dim": 8, "sliding_window": 64}


def test_copy_in_another_dtype_keeps_ties_and_leaves_the_original():
    model = tiny_lm()
    before = [p.detach().clone() for p in model.parameters()]
    twin = model.copy_as(torch.bfloat16)
    assert twin.hf.lm_head.weight is twin.hf.get_input_embeddings().weight
    assert twin.hf.lm_head.weight.dtype == torch.bfloat16 and not twin.hf.lm_head.weight.requires_grad
    assert twin.hf.model.rotary_emb.inv_freq.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(list(twin.parameters())) == len(before)
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in model.copy_as(torch.float32).parameters()}


@pytest.mark.parametrize(
    ("family", "changes", "length", "text"),
    [
        ("qwen2", {}, 129, "positions for 128 only"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 129, "positions"),
    ],
)
def test_lengths_beyond_the_model_are_refused(family, changes, length, text):
    model = tiny_lm(family, **changes)
    model.check_length(length - 1)
    with pytest.raises(ModelError, match=text):
        model.check_length(length)


def test_a_window_is_no_limit():
    tiny_lm("mistral", sliding_window=16).check_length(100)


def test_saved_folder_loads_as_it_lies(tmp_path):
    tokenizer = load_tokenizer(tiny_folder(tmp_path / "source"))
    model = tiny_lm(eos_token_id=2)
    model.hf.generation_config = GenerationConfig(eos_token_id=[2, 0], top_p=0.8, do_sample=False)
    model.save(tmp_path / "saved", tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.float32
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.hf.state_dict().items())
    assert again.generation_config.eos_token_id == [2, 0]
    assert model.hf.generation_config.top_p == 0.8
    assert "attn_implementation" not in json.dumps(json.loads((tmp_path / "saved/config.json").read_text()))
    text = "What is 7 + 7?"
    chat = [{"role": "user", "content": text}]
    other = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert other.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat, tokenize=False)
