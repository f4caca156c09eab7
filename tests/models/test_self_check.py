"""The self-check passes sound models and catches a wrong head, a wrong position and a skipped layer."""

from __future__ import annotations

import pytest
import torch

from steepest.errors import ModelError
from steepest.models import self_check
from steepest.models.self_check import check_backbone, check_causal_lm
from tests.tiny import FAMILIES, tiny_critic, tiny_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass(family):
    assert check_causal_lm(tiny_lm(family)) == {0: (2, 8, 8), 1: (2, 8, 8)}
    check_backbone(tiny_critic(family).hf)


def test_a_forgotten_logit_scale_is_caught(monkeypatch):
    monkeypatch.setattr(self_check, "logit_transform", lambda config: (1.0, None))
    with pytest.raises(ModelError, match="GraniteForCausalLM: this architecture cannot be packed: log-probs"):
        check_causal_lm(tiny_lm("granite", logits_scaling=4.0))


def test_attention_across_sequences_is_caught(monkeypatch):
    class Leaky(self_check.RecordingContext):
        def __init__(self, lengths, device):
            super().__init__([sum(lengths)], device)

    monkeypatch.setattr(self_check, "RecordingContext", Leaky)
    with pytest.raises(ModelError, match="cannot be packed"):
        check_causal_lm(tiny_lm())
    with pytest.raises(ModelError, match="hidden states"):
        check_backbone(tiny_critic().hf)


def test_nan_weights_do_not_pass():
    model = tiny_lm()
    with torch.no_grad():
        model.hf.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="differ"):
        check_causal_lm(model)


def test_a_layer_without_attention_is_caught():
    model = tiny_lm()
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="3 layers, but attention ran in 2"):
        check_causal_lm(model)
