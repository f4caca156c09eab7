"""A run's folder, a checkpoint and an adapter where a model's path is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from steepest.errors import CheckpointError, ModelError
from steepest.learner.checkpoint import CheckpointStore
from steepest.models.causal_lm import CausalLM
from steepest.models.lora import BaseModel, LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.trainer.jobs.export import export
from steepest.trainer.run.model_sources import ModelSources, read_pins
from tests.support.tiny_models import tiny_hf

KEYS = "actor_rollout_ref.model.path", "model.path", "reward.reward_model.model_path", "critic.model.path"


def model(folder: Path) -> None:
    CausalLM(tiny_hf()).save(folder, None)


def adapter(base: Path):
    return lambda folder: LoraCausalLM(tiny_hf(), LoraSettings(rank=2, base=BaseModel(str(base)))).save(folder, None)


def checkpoint(run: Path, step: int, **parts) -> Path:
    return CheckpointStore(run).save(step, parts or {"actor": model}, {})


@pytest.mark.parametrize("key", KEYS)
def test_a_run_is_its_newest_whole_checkpoint(tmp_path, capsys, key):
    first, second = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    sources = ModelSources()
    assert sources.folder(key, str(tmp_path), "huggingface", critic=key.startswith("critic")) == second / "actor"
    assert f"{key}={tmp_path}: taken from {second / 'actor'}" in capsys.readouterr().out
    assert ModelSources().folder(key, str(first), "huggingface") == first / "actor"
    (second / "actor" / "config.json").write_text("{}")
    assert ModelSources().folder(key, str(tmp_path), "huggingface") == first / "actor"
    with pytest.raises(CheckpointError, match="global_step_10 is damaged: "):
        ModelSources().folder(key, str(second), "huggingface")
    (second / "actor" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="global_step_10 is damaged: "):
        ModelSources().folder(key, str(second), "huggingface")
    (first / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="this folder of a run holds no whole checkpoint") as caught:
        ModelSources().folder(key, str(tmp_path), "huggingface")
    assert str(caught.value).startswith(f"{key}={tmp_path}: ")


def test_a_critic_begins_with_the_critic_of_a_checkpoint_if_it_is_a_whole_model(tmp_path):
    whole = checkpoint(tmp_path / "a", 1, actor=model, critic=model)
    part = checkpoint(tmp_path / "b", 1, actor=model, critic=adapter(tmp_path))
    for found, where in ((whole, "critic"), (part, "actor")):
        assert ModelSources().folder(KEYS[3], str(found), "huggingface", critic=True) == found / where
        assert ModelSources().folder(KEYS[0], str(found), "huggingface") == found / "actor"


def test_a_resumed_run_keeps_the_checkpoint_that_it_began_with(tmp_path):
    run, own = tmp_path / "run", tmp_path / "own"
    own.mkdir()
    first = checkpoint(run, 5)
    sources = ModelSources()
    sources.folder(KEYS[0], str(run), "huggingface")
    second = checkpoint(run, 10)
    assert sources.folder(KEYS[3], str(run), "huggingface", critic=True) == first / "actor", "one start, one checkpoint"
    sources.save(own)
    again = ModelSources(read_pins(own))
    assert again.folder(KEYS[0], str(run), "huggingface") == first / "actor"
    assert ModelSources().folder(KEYS[0], str(run), "huggingface") == second / "actor"
    first.rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="this run began with global_step_5 of that run, which is not there"):
        again.folder(KEYS[0], str(run), "huggingface")


@pytest.mark.parametrize("named", ["run", "run/global_step_3"])
def test_an_adapter_is_refused_with_the_command_that_merges_it(tmp_path, named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "base")
    checkpoint(tmp_path / "run", 3, actor=adapter(tmp_path / "base"))
    with pytest.raises(ModelError) as caught:
        ModelSources().folder(KEYS[0], named, "huggingface")
    command = "steepest export run/global_step_3 --to run-global_step_3"
    assert str(caught.value) == (
        f"{KEYS[0]}={named}: run/global_step_3 holds a LoRA adapter, which is no model without its base. Merge it into "
        f"a model ({command}) and give that folder."
    )


def test_export_merges_into_a_base_that_is_a_run(tmp_path):
    base = checkpoint(tmp_path / "run", 3)
    adapter(tmp_path / "run")(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapter" / name).write_text("{}")
    export(tmp_path / "adapter", tmp_path / "to")
    merged, start = (load_file(f / "model.safetensors") for f in (tmp_path / "to", base / "actor"))
    assert all((merged[name] == start[name]).all() for name in start), "a fresh adapter adds nothing"


def test_the_folder_of_a_run_without_a_checkpoint_is_told_as_such(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ModelError, match="not a model folder: it is the folder of a run without a checkpoint"):
        ModelSources().folder(KEYS[0], str(tmp_path), "huggingface")
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path, tmp_path / "to")
    assert str(caught.value) == (
        f"{tmp_path}: no whole checkpoint and no model. Give the folder of a run that has saved one, one of its "
        "global_step_N folders, or a folder with config.json or adapter_config.json."
    )
