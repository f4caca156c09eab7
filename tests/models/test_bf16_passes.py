"""Passes in bf16 with working weights: the numbers of torch.autocast, without a cast of a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bench.casts import Casts
from steepest.models.bf16_storage import hold_in_bf16
from steepest.models.causal_lm import CausalLM
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import Packed, pack_sequences
from steepest.models.passes import Distributions, ExactKL
from steepest.models.working_weights import copied_bytes, use_copies
from tests.support.tiny_models import random_ids, randomise, tiny_critic, tiny_hf, tiny_lm


def packed() -> Packed:
    ids = random_ids([9, 4, 13])
    return pack_sequences(ids, [[False, *[True] * (len(row) - 1)] for row in ids])


def gpt2() -> CausalLM:
    """Its layers are Conv1D, with biases."""
    ends = {"bos_token_id": None, "eos_token_id": None}
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, **ends)).eval()
    randomise(hf, 0)
    return CausalLM(hf)


def lora(family: str = "qwen2", *, held: bool = False) -> LoraCausalLM:
    model = LoraCausalLM(tiny_hf(family), LoraSettings(rank=4))
    if held:
        hold_in_bf16(model.hf, rounding=True)
    disturb(model)
    return model


@torch.no_grad()
def disturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.saved_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def log_probs(model: CausalLM) -> dict[str, Tensor]:
    """Two micro-batches, so that gradients are added up."""
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, entropies = model.log_probs(packed(), temperature=0.7, with_entropy=True)
        (found + 0.3 * entropies).mul(torch.linspace(-1, 1, len(found))).sum().backward()
    return {"log_probs": found.detach(), "entropies": entropies.detach(), **gradients(model)}


def values(model: Any) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, final = model.values(packed(), with_final=True)
    found.mul(torch.linspace(-1, 1, len(found))).sum().backward()
    return {"values": found.detach(), "final": final.detach(), **gradients(model)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def exact_kl(model: CausalLM) -> dict[str, Tensor]:
    other = tiny_lm(seed=5)
    if copied_bytes(model.parameters()):
        use_copies(other.hf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            reference = other(Distributions(packed()))
        found = model(ExactKL(packed(), reference))
    found.kl.sum().backward()
    return {"kl": found.kl.detach(), **gradients(model)}


def off(found: Tensor, want: Tensor) -> Tensor:
    return (found - want).norm() / want.norm()


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]] = {
    "tied, with biases": (tiny_lm, log_probs),
    "untied": (lambda: tiny_lm("llama"), log_probs),
    "soft cap, norms of its own": (lambda: tiny_lm("gemma"), log_probs),
    "Conv1D": (gpt2, log_probs),
    "exact KL": (tiny_lm, exact_kl),
    "critic": (lambda: tiny_critic("llama"), values),
    "LoRA": (lora, log_probs),
    "LoRA on a base in bf16": (lambda: lora(held=True), log_probs),
}


SAME_BITS = ("soft cap, norms of its own", "Conv1D")
"""Cases without fused layers. These multiply copies that lie side by side as one matrix, and so round fewer times."""


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_autocast(case):
    build, outcome = CASES[case]
    want = outcome(build())
    model = build()
    use_copies(model.hf)
    with Casts(model.parameters()) as casts:
        found = outcome(model)
    assert found.keys() == want.keys() and len(want) > 15
    if case in SAME_BITS:
        assert [name for name in want if not torch.equal(want[name], found[name])] == []
    assert [name for name in want if off(found[name], want[name]) > 0.05] == []
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert casts.count["weights"] == 0 < casts.count["others"] and copied_bytes(model.parameters()) > 0
