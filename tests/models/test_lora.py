"""Adapters on tiny models of several families: start, switching, merging, storage in bf16, files, wrong names."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from steepest.errors import CheckpointError, ModelError
from steepest.models import lora
from steepest.models.attention import attention_implementation
from steepest.models.bf16_storage import hold_in_bf16
from steepest.models.causal_lm import CausalLM
from steepest.models.lora import BaseModel, LoraSettings
from steepest.models.lora_models import ACTOR, CRITIC, FrozenValueModel, LoraCausalLM
from steepest.models.packing import pack_sequences
from steepest.models.working_weights import use_copies
from tests.support.tiny_models import FAMILIES, random_ids, randomise, tiny_critic, tiny_hf, tiny_lm

RANK8 = LoraSettings(rank=8, alpha=4)


def packed():
    ids = random_ids([9, 4, 13])
    return pack_sequences(ids, [[False, *[True] * (len(row) - 1)] for row in ids])


def log_probs(model):
    with torch.no_grad():
        return model.log_probs(packed())[0]


@torch.no_grad()
def disturb(model, seed=1):
    """Adapters as after some training: no matrix zero."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.saved_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapted(family="qwen2", settings=RANK8, seed=0):
    return LoraCausalLM(tiny_hf(family, seed), settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_is_merged_right(family):
    plain, model = CausalLM(tiny_hf(family)), adapted(family)
    assert torch.equal(log_probs(model), log_probs(plain))
    disturb(model)
    assert (log_probs(model) - log_probs(plain)).abs().max() > 0.05
    with model.base_alone():
        assert torch.equal(log_probs(model), log_probs(plain))
    merged = model.copy_as(torch.float32)
    torch.testing.assert_close(log_probs(merged), log_probs(model), atol=1e-5, rtol=0)
    assert {name for name, _ in merged.hf.named_parameters()} == {name for name, _ in plain.hf.named_parameters()}
    assert not any(p.requires_grad for p in merged.parameters())

    by_name = dict(model.named_weights())
    assert by_name.keys() == dict(plain.named_weights()).keys()
    plain.write_weights(model.named_weights())
    assert torch.equal(log_probs(plain), log_probs(merged))
    with model.base_alone():  # merging touched nothing
        assert torch.equal(log_probs(model), log_probs(CausalLM(tiny_hf(family))))


def test_only_the_adapter_is_trained_and_it_is_float32():
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(trained) == 2 * 2 * len(names)
    assert all(".lora_" in name for name in trained)
    saved = dict(model.saved_parameters())
    assert len(saved) == len(trained) and all(p.dtype == torch.float32 and p.requires_grad for p in saved.values())
    assert "model.layers.1.mlp.down_proj.lora_A.weight" in saved
    assert saved["model.layers.1.mlp.down_proj.lora_A.weight"].shape == (8, 48)


def test_switching_leaves_what_is_trained_as_it_is():
    model = adapted()
    critic = FrozenValueModel(model.hf, RANK8)
    both = {name for name, p in model.hf.named_parameters() if p.requires_grad}
    assert len(both) == 2 * 2 * 2 * 7
    with model.base_alone(), critic.switched():
        assert {name for name, p in model.hf.named_parameters() if p.requires_grad} == both
    model.log_probs(packed())[0].sum().backward()
    assert all(p.grad is not None for _, p in model.saved_parameters())
    assert all(p.grad is None for _, p in lora.adapter_parameters(model.hf, CRITIC))


def test_two_adapters_do_not_see_each_other():
    model = adapted()
    disturb(model)
    before = log_probs(model)
    critic = FrozenValueModel(model.hf, RANK8)
    assert torch.equal(log_probs(model), before)  # the actor's stays on
    disturb(critic, seed=2)
    assert torch.equal(log_probs(model), before)
    with critic.switched():
        seen = log_probs(model)
    other = LoraCausalLM(tiny_hf(), RANK8)
    disturb_like = {key: p for key, p in lora.adapter_parameters(model.hf, CRITIC)}
    with torch.no_grad():
        for key, p in other.saved_parameters():
            p.copy_(disturb_like[key])
    assert torch.equal(seen, log_probs(other)) and not torch.equal(seen, before)


def test_values_of_a_shared_base_are_those_of_a_critic_with_the_same_weights():
    model = adapted()
    disturb(model)
    shared = FrozenValueModel(model.hf, RANK8)
    own = FrozenValueModel(tiny_critic(zero_head=True).hf, RANK8)
    base = {key: t for key, t in tiny_hf().base_model.state_dict().items()}
    layers = own.hf.base_model.state_dict()
    with torch.no_grad():
        for key, tensor in layers.items():
            plain = key.replace(".base_layer", "")
            if plain in base:
                tensor.copy_(base[plain])
    disturb(shared, seed=3)
    disturb(own, seed=3)
    with shared.switched(), torch.no_grad():
        values, final = shared.values(packed(), with_final=True)
    with own.switched(), torch.no_grad():
        want, want_final = own.values(packed(), with_final=True)
    assert values.abs().max() > 0.05
    assert torch.equal(values, want) and torch.equal(final, want_final)


def test_frozen_matrices_in_bf16_change_no_more_than_rounding_under_autocast():
    """Held matrices lie side by side and are multiplied as one, which rounds fewer times."""
    plain, halved = adapted(), adapted()
    disturb(plain)
    disturb(halved)
    hold_in_bf16(halved.hf, rounding=True)
    for model in (plain, halved):
        use_copies(model.hf)
    kinds = {name: p.dtype for name, p in halved.hf.named_parameters()}
    assert kinds["model.layers.0.self_attn.q_proj.base_layer.weight"] == torch.bfloat16
    assert kinds["model.embed_tokens.weight"] == kinds["model.layers.0.input_layernorm.weight"] == torch.float32
    assert all(p.dtype == torch.float32 for _, p in halved.saved_parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(log_probs(plain), log_probs(halved), atol=0.02, rtol=0)
        model_grads = []
        for model in (plain, halved):
            model.log_probs(packed())[0].sum().backward()
            model_grads.append([p.grad for _, p in model.saved_parameters()])
    for a, b in zip(*model_grads, strict=True):
        assert float((a - b).norm()) < 0.05 * float(a.norm())
    weights = dict(halved.named_weights())
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32  # merged before it is rounded
    assert {t.dtype for t in halved.copy_as(torch.bfloat16).hf.parameters()} == {torch.bfloat16}


def test_an_untied_head_is_held_in_bf16_too():
    model = adapted("llama")
    hold_in_bf16(model.hf, rounding=True)
    assert model.hf.lm_head.weight.dtype == torch.bfloat16
    assert model.hf.model.embed_tokens.weight.dtype == torch.float32


def test_layers_are_chosen_by_name():
    settings = LoraSettings(
        rank=2, target_modules=("q_proj", "mlp.down_proj"), exclude_modules=("layers.1.mlp.down_proj",)
    )
    names = [key for key, _ in adapted(settings=settings).saved_parameters() if key.endswith("lora_A.weight")]
    assert names == [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.down_proj.lora_A.weight",
        "model.layers.1.self_attn.q_proj.lora_A.weight",
    ]


HAS = "There are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"target_modules": ("q_prj",)},
            "target_modules=q_prj: Qwen2ForCausalLM has no linear layer of that name in its "
            f"backbone. Did you mean q_proj? {HAS}",
        ),
        (
            {"target_modules": ("lm_head",)},
            f"target_modules=lm_head: Qwen2ForCausalLM has no linear layer of that name in its backbone. {HAS}",
        ),
        (
            {"exclude_modules": ("embed_tokens",)},
            f"exclude_modules=embed_tokens: Qwen2ForCausalLM has no linear layer of that name in its backbone. {HAS}",
        ),
        (
            {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)},
            "exclude_modules=q_proj leaves no layer of target_modules=q_proj: nothing would be trained.",
        ),
    ],
)
def test_a_wrong_name_is_told_with_those_that_there_are(changes, text):
    with pytest.raises(ModelError) as caught:
        adapted(settings=LoraSettings(rank=2, **changes))
    assert str(caught.value) == text


def test_layers_of_gpt2_whose_matrices_lie_the_other_way():
    hf = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=64))
    randomise(hf, 0)
    model = LoraCausalLM(hf.eval(), LoraSettings(rank=2))
    disturb(model)
    merged = model.copy_as(torch.float32)
    torch.testing.assert_close(log_probs(merged), log_probs(model), atol=1e-5, rtol=0)


def test_the_folder_is_peft_s_and_reads_back(tmp_path):
    base = tmp_path / "base"
    CausalLM(tiny_hf()).save(base, None)
    settings = LoraSettings(rank=8, alpha=4, base=BaseModel(str(base), override_config={"rope_theta": 5.0}))
    model = LoraCausalLM(tiny_hf(), settings)
    disturb(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    model.save(folder, None)
    assert {p.name for p in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 4, str(base))
    assert lora.is_adapter(folder) and not lora.is_adapter(base)
    assert lora.base_of(folder) == settings.base

    ids = torch.tensor([random_ids([12])[0]])
    with torch.no_grad(), attention_implementation(model.hf, "sdpa"):
        want = model.hf(ids).logits
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        itself = AutoModelForCausalLM.from_pretrained(folder)  # finds the base
        for other in (theirs, itself):
            torch.testing.assert_close(other(ids).logits, want, atol=1e-5, rtol=0)
    again = LoraCausalLM(tiny_hf(), settings, adapter=folder)
    assert torch.equal(log_probs(again), log_probs(model))
    model.copy_as(torch.float32).save(tmp_path / "merged", None)
    whole = CausalLM(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(log_probs(whole), log_probs(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 4}, "lora_rank=4: the adapter in .* has 8. Go on with that, or begin a new"),
        ({"alpha": 8}, "lora_alpha=8: the adapter in .* has 4. Go on"),
        (
            {"target_modules": ("q_proj",)},
            "target_modules and exclude_modules choose other layers than the adapter in .* has, for example "
            r"model.layers.0.mlp.down_proj. Give those",
        ),
    ],
)
def test_another_adapter_is_not_read(tmp_path, changes, text):
    adapted().save(tmp_path, None)
    other = LoraSettings(**{"rank": 8, "alpha": 4, **changes})
    with pytest.raises(CheckpointError, match=text):
        LoraCausalLM(tiny_hf(), other, adapter=tmp_path)


def test_a_folder_of_a_whole_model_is_no_adapter(tmp_path):
    CausalLM(tiny_hf()).save(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"holds no LoRA adapter: it was written with .*lora_rank=0"):
        LoraCausalLM(tiny_hf(), RANK8, adapter=tmp_path)


def test_a_fresh_adapter_is_the_reference_and_a_trained_one_is_not():
    model = LoraCausalLM(tiny_hf("llama"), LoraSettings(rank=2))
    assert model.computes_as(model)
    weights = [p for name, p in lora.adapter_parameters(model.hf, ACTOR) if ".lora_B." in name]
    with torch.no_grad():
        weights[-1][-1, -1] = 1e-30
    assert not model.computes_as(model)
    plain, other = tiny_lm("llama"), tiny_lm("llama")
    assert plain.computes_as(other)
    with torch.no_grad():
        next(other.hf.parameters())[0, 0] += 1e-6
    assert not plain.computes_as(other)
