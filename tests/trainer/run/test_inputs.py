"""A start that goes on says which of its inputs are not those of the start before, and keeps the date of the first."""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from steepest.config.load import load_config
from steepest.data.chat import render
from steepest.models.load import load_tokenizer
from steepest.models.tiny import build_tiny_model
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.run.inputs import Inputs, inputs_of
from tests.support.toy_run import make_toy, toy_overrides

DATED = "{{ strftime_now('%Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
SHORT = (
    "trainer.total_training_steps=2",
    "trainer.save_freq=1",
    "trainer.val_before_train=False",
    "data.train_batch_size=8",
    "data.train_max_samples=16",
    "data.val_max_samples=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
)


def test_the_date_of_a_template_is_that_of_the_first_start(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_tiny_model(tmp_path, ["say"]), custom_chat_template=DATED)
    for year in (2024, 2025):
        kwargs = Inputs(datetime(year, 12, 31)).template_kwargs({}, tokenizer)
        messages = [{"role": "user", "content": "say"}]
        text = render(messages, tokenizer, where="a:0", add_generation_prompt=True, template_kwargs=kwargs)
        assert text == f"{year} say"


def test_a_template_without_a_date_and_the_users_own_are_left_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(build_tiny_model(tmp_path, ["say"]))
    assert Inputs().template_kwargs({"a": 1}, tokenizer) == {"a": 1}
    assert Inputs().template_kwargs({"chat_template": "{{ date }}"}, tokenizer) == {"chat_template": "{{ date }}"}


def test_a_changed_weight_of_the_same_size_is_seen(tmp_path: Path) -> None:
    found = []
    for value in (b"\0", b"\1"):
        (tmp_path / "model.safetensors").write_bytes(b"\0" * 2_000_000 + value + b"\0" * 1_999_999)
        inputs = Inputs()
        inputs.add_models({"model.path": tmp_path})
        found.append(inputs.found["model.path"])
    assert found[0].startswith("1 files ") and found[0] != found[1]


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b'{"inputs": {}}', b'{"first start": "today", "inputs": {}}'])
def test_a_damaged_record_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes) -> None:
    (tmp_path / "global_step_1").mkdir()
    (tmp_path / "inputs.json").write_bytes(text)
    config = load_config(toy_overrides({"data": tmp_path, "model": tmp_path, "reward": tmp_path}, tmp_path))
    assert inputs_of(config.trainer).earlier == {}
    assert f"warning: {tmp_path}/inputs.json cannot be read (" in capsys.readouterr().out


def test_what_changed_is_named_with_old_and_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy, folder = make_toy(tmp_path / "toy"), tmp_path / "run"
    words = [*toy_overrides(toy, folder, *SHORT), f"actor_rollout_ref.model.custom_chat_template={DATED}"]
    run_ppo(load_config(words))
    kept = json.loads((folder / "inputs.json").read_text())
    shutil.rmtree(folder / "global_step_2")
    run_ppo(load_config(words))
    assert "inputs of this run" not in capsys.readouterr().out
    assert json.loads((folder / "inputs.json").read_text()) == kept

    shutil.rmtree(folder / "global_step_2")
    rows = toy["data"].read_text().splitlines(keepends=True)
    toy["data"].write_text("".join(rows[1:]))
    toy["reward"].write_text(toy["reward"].read_text() + "# changed\n")
    run_ppo(load_config(words))
    [said] = [line for line in capsys.readouterr().out.splitlines() if "inputs of this run" in line]
    now = json.loads((folder / "inputs.json").read_text())
    changed = [str(toy["reward"]), *(f"{of}data.{key}_files" for key in ("train", "val") for of in ("", "tokens of "))]
    assert {name for name, value in now["inputs"].items() if value != kept["inputs"][name]} == set(changed)
    for name in changed:
        assert f"{name}: {kept['inputs'][name]} -> {now['inputs'][name]}" in said
    assert now["first start"] == kept["first start"]
