"""bench.decode_step: what a decoding step executes."""

from __future__ import annotations

import pytest
import torch

from bench.decode_step import measure, started, table
from steepest.models.working_weights import use_copies
from tests.support.tiny_models import tiny_lm

LAYERS, ROWS, HIDDEN = 2, 3, 32


@pytest.mark.parametrize("attention", ["products", "sdpa"])
def test_a_step_in_bf16_casts_nothing_but_the_outputs_of_norms_and_the_logits(attention):
    model = tiny_lm("llama")
    use_copies(model.hf)
    start = started(model, torch.bfloat16, rows=ROWS, prompt=9, products=attention == "products")
    _, step, seconds = measure(start, timed=False)
    norms = 2 * LAYERS + 1
    assert step.casts == norms + 1
    # A norm turns 4 bytes into 2, the logits of 61 words 2 into 4.
    assert step.cast_bytes == 6 * ROWS * (norms * HIDDEN + 61)
    assert seconds == 0.0


def test_a_step_in_float32_casts_nothing_and_the_table_has_both_passes():
    start = started(tiny_lm("llama"), torch.float32, rows=ROWS, prompt=9, products=False)
    prefill, step, _ = found = measure(start, timed=False)
    assert prefill.casts == step.casts == step.cast_bytes == 0
    assert step.by_name["aten.baddbmm"] == LAYERS and step.by_name["mkldnn._linear_pointwise"] == 4 * LAYERS + 1
    lines = table({"float32": found}).splitlines()
    assert lines[3] == f"| float32, decoding step | {step.operations} | {step.bytes / 1e6:.1f} | 0 | 0.00 | - |"
