"""Families of transformers run, or are refused in a sentence, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from steepest.errors import ModelError
from steepest.models.architectures import text_config
from steepest.models.flops import attention_heads, key_value_numbers
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from tests.models.sweep import rows_of_page
from tests.support.architectures import MODEL_TYPES, Verdict, tiny_config, verdict
from tests.support.tiny_models import randomise, tiny_hf

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
USUAL = {  # family -> (how it runs, whether the engine's own decoder runs it)
    "mistral": ("packed", True),  # a window shorter than the prompts
    "qwen2": ("packed", True),  # a window in one of two layers
    "phi3": ("packed", False),
    "gemma2": ("packed", False),  # windows and soft caps
    "gemma3_text": ("packed", False),
    "gpt_oss": ("packed", False),  # sinks, windows, experts
    "granitemoe": ("packed", False),
    "stablelm": ("rows", False),
    "nemotron": ("rows", False),
    "falcon": ("rows", False),
    "bloom": ("rows", False),  # ALiBi
    "mpt": ("rows", False),
    "gpt_neo": ("rows", False),  # its own kind of window
    "mamba": ("rows", False),
    "diffllama": ("rows", False),  # attends twice in a layer
}
WITH_CRITIC_AND_LORA = {"gemma2", "bloom", "mamba"}


def assert_runs(found: Verdict) -> None:
    assert found.way in ("packed", "rows"), found.reason
    wrong = {name: number for name, number in found.numbers.items() if not number < TOLERANCE}
    assert not wrong, f"{found.model_type}: {wrong}"


@pytest.mark.parametrize("model_type", USUAL)
def test_a_usual_family_runs_with_the_numbers_of_transformers(model_type, tmp_path):
    found = verdict(model_type, tmp_path, thorough=model_type in WITH_CRITIC_AND_LORA)
    assert_runs(found)
    assert (found.way, found.decoder) == USUAL[model_type] and not found.without
    assert model_type in rows_of_page(ROOT / "docs" / "models.md")[found.row]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - set(USUAL)))
def test_every_family_runs_or_is_refused_in_a_sentence(model_type, tmp_path):
    found = verdict(model_type, tmp_path)
    if found.way == "not built":
        pytest.skip(found.reason)
    assert model_type in rows_of_page(ROOT / "docs" / "models.md")[found.row]
    if found.way == "refused":
        assert "cannot be trained" in found.reason and "\n" not in found.reason
    else:
        assert_runs(found)


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("bart", "a bart model cannot be trained here: it is an encoder-decoder model"),
        ("t5", "a t5 model cannot be trained here: it is an encoder-decoder model"),
        ("gemma3", r"it reads or writes more than text \(vision_config\)"),
        ("musicgen", "it is an encoder-decoder model"),
        ("moshi", r"it reads or writes more than text \(audio_encoder_config\)"),
        ("vit", "transformers has no causal language model of this type"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_configuration(model_type, text):
    with pytest.raises(ModelError, match=text) as caught:
        text_config("here", AutoConfig.for_model(model_type))
    assert str(caught.value).startswith("here: ") and "docs/models.md" in str(caught.value)


def test_a_text_model_inside_of_another_configuration_is_taken():
    whole = AutoConfig.for_model("qwen3_5")
    assert text_config("here", whole).model_type == "qwen3_5_text"
    own_code = PretrainedConfig()
    own_code.auto_map = {"AutoModelForCausalLM": "mine.Model"}
    assert text_config("here", own_code) is own_code


def test_families_without_heads_have_no_attention_to_count():
    assert attention_heads(tiny_config("mamba")) == (0, 0)
    assert key_value_numbers(tiny_config("mamba")) == 0
    assert key_value_numbers(tiny_config("llama")) == 2 * 2 * 2 * 8


def test_layers_that_cannot_have_an_adapter_are_named():
    hf = tiny_hf("mamba", num_heads=4)
    randomise(hf, 0)
    with pytest.raises(
        ModelError, match="target_modules=dt_proj: in MambaForCausalLM this layer cannot have an adapter"
    ):
        LoraCausalLM(hf, LoraSettings(rank=2, target_modules=("dt_proj",)))
    adapted = LoraCausalLM(hf, LoraSettings(rank=2))
    names = {name.split(".")[-3] for name, _ in adapted.saved_parameters()}
    assert names == {"in_proj", "x_proj"}
    assert all(parameter.dtype == torch.float32 for _, parameter in adapted.saved_parameters())
