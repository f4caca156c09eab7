"""A folder of a larger model around a text model loads as that text model, with its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from steepest.errors import ModelError
from steepest.models.architectures import parts_besides_text
from steepest.models.load import end_token_ids, load_causal_lm, load_value_model
from tests.support.architectures import tiny_config, tokens
from tests.support.tiny_models import randomise

VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "depth": 1,
    "num_heads": 4, "out_hidden_size": 32, "image_size": 28, "patch_size": 14, "projector_input_dim": 32,
    "projector_output_dim": 32, "vision_output_dim": 32, "temporal_patch_size": 1, "spatial_merge_size": 1,
}  # fmt: skip
FAMILIES = {"llama4": ["vision_model", "multi_modal_projector"], "qwen3_5": ["visual"]}


def whole_config(family):
    config = AutoConfig.for_model(family)
    known = config.vision_config.to_dict()
    vision = {name: value for name, value in VISION.items() if name in known}
    return type(config)(text_config=tiny_config(f"{family}_text").to_dict(), vision_config=vision)


def whole_model(family, folder):
    torch.manual_seed(0)
    hf = AutoModelForImageTextToText.from_config(whole_config(family), dtype=torch.float32).eval()
    randomise(hf, 0)
    hf.save_pretrained(folder)
    return hf


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_with_a_vision_tower_loads_as_its_text_model(family, tmp_path):
    whole = whole_model(family, tmp_path)
    part = getattr(whole, "language_model", whole)  # Llama4ForConditionalGeneration fails on text alone in 5.24
    ids = torch.tensor([tokens(12, 1)])
    with torch.no_grad():
        want = part(input_ids=ids, use_cache=False).logits[0]
        model = load_causal_lm(tmp_path, override_config={"max_position_embeddings": 64}).eval()
        found = model.hf(input_ids=ids, use_cache=False).logits[0]
    assert model.config.model_type == f"{family}_text" and model.config.max_position_embeddings == 64
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    backbone = load_value_model(tmp_path).hf.base_model
    for (name, mine), theirs in zip(backbone.named_parameters(), model.hf.base_model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_end_tokens_of_the_inner_text_model_are_found(tmp_path):
    config = whole_config("qwen3_5")
    config.text_config.eos_token_id = [5, 7]
    config.save_pretrained(tmp_path)
    assert end_token_ids(tmp_path, SimpleNamespace(eos_token_id=7)) == (5, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_parts_are_those_of_its_class(family):
    assert sorted(parts_besides_text(whole_config(family))) == sorted(FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_another_weight_in_such_a_folder_is_refused(family, tmp_path):
    whole_model(family, tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "tower.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r": 1 weights of the checkpoint have no place in \w+ by .*: tower.weight\."):
        load_causal_lm(tmp_path)
