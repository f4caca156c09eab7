"""`steepest export`: the dtype of what it writes, and errors that speak of its options."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from steepest.errors import CheckpointError, ModelError
from steepest.models.causal_lm import CausalLM
from steepest.models.load import load_causal_lm
from steepest.models.lora import BaseModel, LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.trainer.jobs.export import export
from tests.support.tiny_models import tiny_folder, tiny_hf


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


def dtypes(folder):
    return {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [None, "bfloat16", "float16", "float32"])
def test_weights_are_written_in_the_dtype_of_the_start_model_or_the_one_asked_for(tmp_path, held, asked):
    hf = tiny_hf("llama").to(held)
    hf.save_pretrained(tmp_path / "start")
    load_causal_lm(tmp_path / "start").save(tmp_path / "trained", None)
    assert dtypes(tmp_path / "trained") == {"torch.float32"}
    to = export(tmp_path / "trained", tmp_path / "to", dtype=asked)
    want = str(held) if asked is None else f"torch.{asked}"
    config = json.loads((to / "config.json").read_text())
    assert dtypes(to) == {want} and f"torch.{config['dtype']}" == want
    name = "model.norm.weight"
    assert torch.equal(load_file(to / "model.safetensors")[name], hf.get_parameter(name).to(getattr(torch, want[6:])))


def test_a_merged_adapter_has_the_dtype_of_its_base(tmp_path):
    tiny_hf("llama").bfloat16().save_pretrained(tmp_path / "base")
    settings = LoraSettings(rank=2, base=BaseModel(str(tmp_path / "base")))
    LoraCausalLM(load_causal_lm(tmp_path / "base").hf, settings).save(tmp_path / "adapter", None)
    tiny_folder(tmp_path / "tokens")
    for file in (tmp_path / "tokens").glob("tokenizer*"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    assert dtypes(export(tmp_path / "adapter", tmp_path / "to")) == {"torch.bfloat16"}
    assert dtypes(export(tmp_path / "adapter", tmp_path / "full", dtype="float32")) == {"torch.float32"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = torch.ones(2, 32)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"1 weights of the adapter do not fit .*layers\.7\.mlp"):
        export(tmp_path / "adapter", tmp_path / "strange")


def test_errors_name_the_options_of_the_command(tmp_path):
    CausalLM(tiny_hf()).save(tmp_path / "run" / "global_step_3" / "actor", None)
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path / "run" / "global_step_3", tmp_path / "to")
    assert "is damaged: " in str(caught.value) and "trainer." not in str(caught.value)
    actor = tmp_path / "run" / "global_step_3" / "actor"
    with pytest.raises(CheckpointError, match="--to .*model.gguf: .*convert_hf_to_gguf.py of llama.cpp"):
        export(actor, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="there is no adapter. Leave --adapter out"):
        export(actor, tmp_path / "to", as_adapter=True)
    with pytest.raises(CheckpointError, match="--dtype float16: an adapter stays as it was trained"):
        export(actor, tmp_path / "to", as_adapter=True, dtype="float16")
