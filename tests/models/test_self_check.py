"""The self-check passes sound models and catches a wrong head, a wrong position and a skipped layer."""

from __future__ import annotations

import pytest
import torch

from steepest.errors import ModelError
from steepest.models.rows import rows_reason
from steepest.models.self_check import check_backbone, check_causal_lm
from tests.support.tiny_models import FAMILIES, tiny_critic, tiny_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass(family):
    assert check_causal_lm(tiny_lm(family)) == {0: (2, 8, 8), 1: (2, 8, 8)}
    check_backbone(tiny_critic(family).hf)


def test_a_forgotten_logit_scale_is_caught():
    """The family's own head divides its logits by a number that the configuration does not name."""
    model = tiny_lm("granite")
    model.hf.lm_head.register_forward_hook(lambda head, inputs, logits: logits / 4.0)
    with pytest.raises(
        ModelError, match="GraniteForCausalLM model cannot be trained here: its logits are not its output"
    ):
        check_causal_lm(model)


def test_what_flows_across_sequences_is_caught():
    """A layer in which each token gets a part of the one before it, whichever sequence that belongs to."""

    def leak(layer, inputs, output):
        return output + output.roll(1, dims=1)

    model, critic = tiny_lm(), tiny_critic()
    model.hf.model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(ModelError, match="its tokens see the tokens after them"):
        check_causal_lm(model)
    critic.hf.base_model.layers[0].mlp.register_forward_hook(leak)
    with pytest.raises(ModelError, match="its tokens see the tokens after them"):
        check_backbone(critic.hf)


def test_nan_weights_do_not_pass():
    model = tiny_lm()
    with torch.no_grad():
        model.hf.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="differ"):
        check_causal_lm(model)


def test_a_layer_without_attention_lets_the_model_run_in_rows():
    model = tiny_lm()
    model.config.num_hidden_layers = 3
    assert check_causal_lm(model) == {}
    assert rows_reason(model.hf) == "attention runs in 2 of its 3 layers"


def test_a_window_that_does_not_reach_the_attention_function_lets_the_model_run_in_rows():
    model = tiny_lm("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=0)
    check_causal_lm(model)
    assert rows_reason(model.hf) is None
    for layer in model.hf.model.layers:
        layer.self_attn.sliding_window = None  # as in a family that only makes a mask for it
    check_causal_lm(model)
    assert "passes the window None to its attention, and its config says 16" in (rows_reason(model.hf) or "")
