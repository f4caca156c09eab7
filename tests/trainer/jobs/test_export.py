"""Errors of `steepest export` speak of its options."""

from __future__ import annotations

import json

import pytest

from steepest.errors import ModelError
from steepest.models.causal_lm import CausalLM
from steepest.models.lora import BaseModel, LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.trainer.jobs.export import export
from tests.support.tiny_models import tiny_hf


def test_a_base_with_code_of_its_own_names_the_option_of_the_command(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    CausalLM(tiny_hf()).save(base, None)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "configuration_mine.py").write_text("raise SystemError\n")
    folder.mkdir()
    LoraCausalLM(tiny_hf(), LoraSettings(rank=2, base=BaseModel(str(base)))).save(folder, None)
    with pytest.raises(ModelError) as caught:
        export(folder, tmp_path / "to")
    assert str(caught.value).endswith("Read it, then allow it with --trust-remote-code.")
