"""The builtin engine in bf16 takes the bf16 weights that the trainer keeps, without a cast of its own."""

from __future__ import annotations

import pytest
import torch

from bench.casts import Casts
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.working_weights import refresh, use_copies
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.weights import LocalWeights, ModelDescription
from tests.support.rollout_requests import requests_of
from tests.support.tiny_models import END, random_ids, tiny_hf, tiny_lm


def build(kind: str):
    return tiny_lm("llama") if kind == "all weights" else LoraCausalLM(tiny_hf(), LoraSettings(rank=4))


@pytest.mark.parametrize(("kind", "before", "merged"), [("all weights", 14 + 1, 0), ("LoRA", 14 + 1 + 6, 14)])
def test_it_generates_as_from_casts_and_casts_what_is_merged_only(kind, before, merged):
    """14 matrices and the head; the model with an adapter has 6 biases too."""
    made = []
    for keeps in (False, True):
        model = build(kind)
        engine = BuiltinEngine(
            ModelDescription.of(model), end_token_ids=[END], pad_token_id=0, dtype=torch.bfloat16, max_model_len=64
        )
        engine.load_weights(LocalWeights(model), 0)
        if keeps:
            use_copies(model.hf)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.1)
        refresh(model.parameters())
        with Casts([]) as casts:
            engine.load_weights(LocalWeights(model), 1)
        made.append(engine.generate(requests_of(random_ids([3, 9]), SamplingParams(max_tokens=8, seed=1))))
        assert casts.count["others"] == (merged if keeps else before)
    assert made[0] == made[1]
