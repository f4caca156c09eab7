"""Frozen matrices held in bf16 without rounding: the numbers of float32 weights, bit for bit, in half of the memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from steepest.models.bf16_storage import hold_in_bf16, is_held
from steepest.models.causal_lm import CausalLM
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import FrozenValueModel, LoraCausalLM
from steepest.models.packing import Packed, pack_sequences
from tests.support.tiny_models import FAMILIES, random_ids, tiny_hf, tiny_lm

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def packed() -> Packed:
    ids = random_ids([9, 4, 13])
    return pack_sequences(ids, [[False, *[True] * (len(row) - 1)] for row in ids])


@torch.no_grad()
def from_a_bf16_file(hf: nn.Module) -> nn.Module:
    for parameter in hf.parameters():
        parameter.copy_(parameter.bfloat16())
    return hf


def disturbed(family: str, *, held: bool) -> LoraCausalLM:
    """A policy with a trained adapter and, on the same base, a critic's."""
    model = LoraCausalLM(from_a_bf16_file(tiny_hf(family)), LoraSettings(rank=4))
    if held:
        hold_in_bf16(model.hf, rounding=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.saved_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def outcome(model: LoraCausalLM) -> dict[str, Tensor]:
    log_probs, entropies = model.log_probs(packed(), with_entropy=True)
    (log_probs + 0.3 * entropies).mul(torch.linspace(-1, 1, len(log_probs))).sum().backward()
    with torch.no_grad(), model.base_alone():
        base = model.log_probs(packed())[0]
    grads = {name: parameter.grad.clone() for name, parameter in model.saved_parameters()}
    return {"log_probs": log_probs.detach(), "entropies": entropies.detach(), "base": base, **grads}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_changes(family):
    want, found = outcome(disturbed(family, held=False)), outcome(model := disturbed(family, held=True))
    assert found.keys() == want.keys() and len(want) > 20
    assert not torch.equal(want["log_probs"], want["base"])
    assert [name for name in want if not torch.equal(want[name], found[name])] == []
    kinds = {name: p.dtype for name, p in model.hf.named_parameters()}
    half = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert half == {f"{n}.weight" for n, m in model.hf.named_modules() if n.endswith(".base_layer")} and len(half) == 14
    assert all(p.dtype == torch.float32 for _, p in model.saved_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_plain_frozen_model(family):
    want = CausalLM(from_a_bf16_file(tiny_hf(family))).log_probs(packed(), with_entropy=True)
    model = CausalLM(from_a_bf16_file(tiny_hf(family))).requires_grad_(False)
    hold_in_bf16(model.hf, rounding=False)
    layers = {name: m for name, m in model.hf.named_modules() if isinstance(m, nn.Linear)}
    assert {name.rpartition(".")[2] for name, m in layers.items() if is_held(m)} == set(PROJECTIONS)
    assert model.hf.lm_head.weight.dtype == torch.float32 == model.hf.model.embed_tokens.weight.dtype
    assert all(torch.equal(a, b) for a, b in zip(want, model.log_probs(packed(), with_entropy=True), strict=True))


def test_a_copy_of_it_in_float32_is_the_model_and_computes_as_it():
    model = tiny_lm()
    from_a_bf16_file(model.hf)
    frozen = model.copy_as(torch.float32)
    hold_in_bf16(frozen.hf, rounding=False)
    assert model.computes_as(frozen)
    again = frozen.copy_as(torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.log_probs(packed())[0], model.log_probs(packed())[0])
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[3, 2] += 2**-12
    assert not model.computes_as(frozen)


def test_a_matrix_that_would_be_rounded_stays_as_it_is_and_so_does_what_is_trained():
    model = CausalLM(from_a_bf16_file(tiny_hf())).requires_grad_(False)
    first, second = model.hf.model.layers[0].mlp, model.hf.model.layers[1].mlp
    first.up_proj.weight[1, 1] += 2**-12
    second.up_proj.requires_grad_(True)
    hold_in_bf16(model.hf, rounding=False)
    assert not is_held(first.up_proj) and first.up_proj.weight.dtype == torch.float32
    assert not is_held(second.up_proj) and second.up_proj.weight.dtype == torch.float32
    assert is_held(first.down_proj) and is_held(second.gate_proj)


def test_no_pass_keeps_a_matrix_in_float32_for_the_backward_one():
    model = disturbed("llama", held=True)
    shapes = {m.weight.shape for n, m in model.hf.named_modules() if n.endswith(".base_layer")}
    kept: list[torch.dtype] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape in shapes:
            kept.append(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.log_probs(packed())[0].sum()
    assert set(kept) == {torch.bfloat16} and len(kept) == 14


def test_a_critic_on_the_held_base():
    values = []
    for held in (False, True):
        model = disturbed("qwen2", held=held)
        critic = FrozenValueModel(model.hf, LoraSettings(rank=4))
        torch.manual_seed(0)
        with torch.no_grad():
            for _, parameter in critic.saved_parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
        with critic.switched():
            values.append(critic.values(packed(), with_final=True))
    assert values[0][0].abs().max() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))


def test_layers_that_are_no_linear_ones_stay_as_they_are():
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = CausalLM(from_a_bf16_file(GPT2LMHeadModel(config))).requires_grad_(False)
    hold_in_bf16(model.hf, rounding=False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("layer", ["o_proj", "up_proj"])
def test_layers_with_hooks_compute_the_same(layer):
    want, seen = outcome(disturbed("llama", held=True)), []
    model = disturbed("llama", held=True)
    for name, module in model.hf.named_modules():
        if name.endswith(f"{layer}.base_layer"):
            module.register_forward_hook(lambda module, inputs, out: seen.append(out))
    found = outcome(model)
    assert len(seen) == 4  # two layers, with the adapter and without
    assert all(torch.allclose(found[name], want[name], atol=1e-5, rtol=1e-4) for name in want)
