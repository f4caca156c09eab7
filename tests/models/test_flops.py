"""Counted arithmetic: by hand, and against torch's own counter over the operations that really ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from steepest.core.batch import Batch
from steepest.models.causal_lm import CausalLM
from steepest.models.flops import attention_flops, causal_pairs, generation_flops, linear_flops
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import Packed, pack_batch
from steepest.models.passes import Distributions, ExactKL, HeadValues, HiddenStates, LogProbs, StatesFound, Values
from tests.support.tiny_models import FAMILIES, VOCABULARY, tiny_critic, tiny_hf, tiny_lm

HIDDEN, LAYERS, HEADS, GROUPS, SIZE, INNER = 32, 2, 4, 2, 8, 48
LAYER = 2 * (HIDDEN * HEADS * SIZE + 2 * HIDDEN * GROUPS * SIZE + HEADS * SIZE * HIDDEN + 3 * HIDDEN * INNER)
"""Operations of a token in one layer's products: q, k and v, o, and the three of the MLP."""
PAIR = 4 * LAYERS * HEADS * SIZE
HEAD = 2 * HIDDEN * VOCABULARY


def batch(prompts: list[int], responses: list[int], groups: list[int] | None = None) -> Batch:
    return Batch.from_sequences(
        [list(range(3, 3 + n)) for n in prompts],
        [list(range(5, 5 + n)) for n in responses],
        group_ids=list(range(len(prompts))) if groups is None else groups,
        truncated=[False] * len(prompts),
    )


def packed_of(batch: Batch) -> Packed:
    return pack_batch(batch, batch.response_mask)


def counted_by_torch(call: Any) -> dict[str, int]:
    """Operations by name: mm and addmm of linear layers and their gradients, bmm of attention."""
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # torch counts addmm alone
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        call()
    counts: dict[str, int] = {}
    for op, number in counter.get_flop_counts()["Global"].items():
        name = str(op).removeprefix("aten.").removesuffix("_")
        counts[name] = counts.get(name, 0) + number
    return counts


def states(model: CausalLM, packed: Packed) -> StatesFound:
    """The backbone alone: nothing goes through the head."""
    return model(HiddenStates(packed))


def test_pairs_of_causal_attention():
    assert causal_pairs([1]) == 1 and causal_pairs([3, 2]) == 6 + 3


def test_a_pass_by_hand():
    model, packed = tiny_lm(), packed_of(batch([3, 2], [4, 1]))
    forward = 10 * LAYERS * LAYER + PAIR * (28 + 6)
    with torch.no_grad():
        assert model(LogProbs(packed)).flops == forward + 5 * HEAD
        assert model(LogProbs(packed, with_squares=True)).flops == forward + 2 * 5 * HEAD
        assert model(HiddenStates(packed, with_log_probs=True)).flops == forward + 5 * HEAD
        distributions = model(Distributions(packed))
        assert distributions.flops == forward
    assert model(LogProbs(packed)).flops == 3 * forward + 3 * 5 * HEAD
    assert model(ExactKL(packed, distributions)).flops == 3 * forward + (3 + 3 + 1) * 5 * HEAD
    critic = tiny_critic()
    assert critic(Values(packed, with_final=True)).flops == 3 * forward + 3 * 2 * HIDDEN * (5 + 2)
    assert critic(HeadValues(torch.zeros(4, HIDDEN))).flops == 2 * 2 * HIDDEN * 4  # the states have no gradient


@pytest.mark.parametrize("family", FAMILIES)
def test_as_torch_counts(family):
    model, packed = tiny_lm(family), packed_of(batch([20], [12]))

    def run() -> float:
        answer = states(model, packed)
        answer.before.sum().backward()
        return answer.flops

    mine, found = run(), counted_by_torch(run)
    linear = 3 * LAYERS * LAYER * 32
    assert found["mm"] + found.get("addmm", 0) == linear
    assert found["bmm"] == 3 * PAIR * 32 * 32  # scores and values of all pairs, those that causality hides too
    assert mine == linear + 3 * PAIR * 32 * 33 // 2


def test_frozen_weights_and_adapters_that_are_off():
    """LoRA, rank 3: frozen matrices have no gradient of their own; the adapter counts where it is on."""
    hf, packed = tiny_hf(), packed_of(batch([20], [12]))
    assert linear_flops(hf.base_model) == LAYERS * LAYER  # as loading does: what is added later counts all the same
    model = LoraCausalLM(hf, LoraSettings(rank=3))
    q, kv = HEADS * SIZE, GROUPS * SIZE
    shapes = [(HIDDEN, q), (HIDDEN, kv), (HIDDEN, kv), (q, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]
    adapter = LAYERS * sum(2 * 3 * (a + b) for a, b in shapes)
    pairs = PAIR * causal_pairs([32])

    def run() -> float:
        answer = states(model, packed)
        answer.before.sum().backward()
        return answer.flops

    mine, found = run(), counted_by_torch(run)
    assert mine == 32 * (2 * LAYERS * LAYER + 3 * adapter) + 3 * pairs
    # of the first layer, torch leaves out the gradient of q's, k's and v's input: nothing below is trained
    first = 32 * 2 * (HIDDEN * (q + 2 * kv) + 3 * 3 * HIDDEN)
    assert found["mm"] + found.get("addmm", 0) == 32 * (2 * LAYERS * LAYER + 3 * adapter) - first
    with torch.no_grad(), model.base_alone():
        assert states(model, packed).flops == 32 * LAYERS * LAYER + pairs


def test_experts_count_as_often_as_a_token_meets_them():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=61, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, **sizes)
    attention = 2 * (HIDDEN * HEADS * SIZE * 2 + 2 * HIDDEN * GROUPS * SIZE)
    mlp = 2 * 3 * HIDDEN * INNER
    assert linear_flops(MixtralForCausalLM(config).base_model) == LAYERS * (attention + 2 * mlp)


def test_a_rollout_reads_a_prompt_once_and_feeds_all_tokens_but_the_last():
    model = tiny_lm()
    made = batch([5, 5, 3], [4, 1, 2], groups=[0, 0, 1])
    tokens = 5 + 3 + (3 + 0 + 1)
    pairs = 15 + 6 + (6 + 7 + 8) + 0 + 4
    scored = 4 + 1 + 2
    assert generation_flops(model, made) == tokens * LAYERS * LAYER + PAIR * pairs + scored * HEAD
    assert attention_flops(model.config, 1) == PAIR
