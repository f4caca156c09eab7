"""The count of operations: against torch's own counter on a real model, and against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import Group, Shape, adapters, body, rollout_flops, step_flops, vocabulary
from tests.support.tiny_models import tiny_folder, tiny_hf

SHAPE = Shape(hidden=2, layers=1, heads=1, kv_heads=1, head_size=2, intermediate=3, vocab=5)


def test_linear_layers_and_vocabulary_are_what_torch_counts():
    hf = tiny_hf("qwen2", num_hidden_layers=3)
    config = hf.config
    shape = Shape(config.hidden_size, 3, 4, 2, config.hidden_size // 4, config.intermediate_size, config.vocab_size)
    hf.set_attn_implementation("eager")
    length = 7
    with FlopCounterMode(display=False) as counter:
        hf(torch.arange(3, 3 + length)[None])
    group = [Group(0, (length,))]
    # eager attention computes the whole square, the formula its causal half: T (T + 1) instead of 2 T T
    attention = 2 * 3 * config.hidden_size * length * (length - 1)
    assert body(shape, group, share_prompts=False) + attention + vocabulary(shape, group) == counter.get_total_flops()


def test_numbers_worked_out_by_hand():
    group = [Group(prompt=2, responses=(1, 1))]
    # a token: 2 (H (Q + 2K) + Q H + 3 H I) = 2 (12 + 4 + 18) = 68; two sequences of 3 tokens attend 2 Q T (T + 1) = 48
    assert body(SHAPE, group, share_prompts=False) == 6 * 68 + 2 * 48
    # the second one's prompt: 2 tokens and its own triangle of 2 x 2 x 2 x 3 = 24 less
    assert body(SHAPE, group, share_prompts=True) == 4 * 68 + 2 * 48 - 24
    assert vocabulary(SHAPE, group) == 2 * 2 * 2 * 5
    assert rollout_flops(SHAPE, group) == 4 * 68 + 72 + 40
    # rank 1: inputs + outputs of the seven matrices are 4 x (2 + 2) + 2 x (2 + 3) + (3 + 2) = 31
    assert adapters(SHAPE, group, 1) == 4 * 2 * 31


def test_passes_of_a_step():
    group = [Group(2, (1,))]
    trunk, scored = 3 * 68 + 48, 3 * 68 + 48 + 20
    full = step_flops(SHAPE, group, critic="full", reference=True, old_log_probs=True)
    assert full == {
        "gen": scored, "old_log_prob": scored, "ref": scored, "values": trunk, "update_critic": 3 * trunk,
        "update_actor": 3 * scored,
    }  # fmt: skip
    joined = step_flops(SHAPE, group, critic="full", reference=True, old_log_probs=False, values=False)
    assert joined == {**full, "old_log_prob": 0, "values": 0}
    grpo = step_flops(SHAPE, group, critic="none", reference=False, old_log_probs=False)
    assert grpo == {**dict.fromkeys(full, 0), "gen": scored, "update_actor": 3 * scored}
    extra = 3 * 2 * 31
    lora = step_flops(SHAPE, group, critic="adapter", reference=True, old_log_probs=False, lora_rank=1)
    assert (lora["update_actor"], lora["update_critic"]) == (2 * scored + 3 * extra, 2 * trunk + 3 * extra)
    head = step_flops(SHAPE, group, critic="head", reference=True, old_log_probs=False, lora_rank=1)
    assert (head["values"], head["update_critic"], head["ref"]) == (0, 0, scored)


def test_a_shape_is_read_from_a_model_folder(tmp_path: Path):
    shape = Shape.of(tiny_folder(tmp_path, num_heads=4, num_kv_heads=2, intermediate_size=48))
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.head_size) == (32, 2, 4, 2, 8)
    assert shape.matrices == {"qkv": (32, 64), "o": (32, 32), "gate_up": (32, 96), "down": (48, 32)}


def test_the_step_of_the_issue_is_about_nine_teraflop():
    smollm2 = Shape(hidden=576, layers=30, heads=9, kv_heads=3, head_size=64, intermediate=1536, vocab=49152)
    groups = [Group(108, (128,))] * 16
    total = sum(step_flops(smollm2, groups, critic="full", reference=True, old_log_probs=True).values())
    assert total == pytest.approx(8.9e12, rel=0.05)
