"""The recipes of CONTRIBUTING.md run as they stand, and are as short as they promise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.core.policy_losses import POLICY_LOSSES, LossInputs
from steepest.data.files import WrittenFile, write_parquet
from steepest.data.prepare.gsm8k import math_row, row_schema
from steepest.data.prompts import load_prompts
from steepest.devices import DEVICES
from steepest.devices.api import Accelerator
from steepest.loggers import LOGGERS, LoggerContext, make_loggers
from steepest.rewards.api import REWARDS, read_outcome
from steepest.rollout import ROLLOUT_ENGINES, RolloutEngine
from steepest.rollout.weights import ModelDescription

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES: dict[str, str] = dict(re.findall(r"^## Add an? ([a-z ]+)\n.*?```python\n(.*?)```", TEXT, flags=re.M | re.S))
TABLES = (ADVANTAGE_ESTIMATORS, POLICY_LOSSES, REWARDS, ROLLOUT_ENGINES, DEVICES, LOGGERS)


@pytest.fixture(autouse=True)
def tables_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in TABLES:
        monkeypatch.setattr(table, "_entries", dict(table._entries))


def run(name: str, **known: Any) -> dict[str, Any]:
    """The names that a recipe defines, given the names it may use."""
    scope = {"Any": Any, "Path": Path, "Mapping": Mapping, "Tensor": Tensor, "torch": torch, **known}
    exec(RECIPES[name], scope)
    return scope


def test_every_kind_of_part_has_a_recipe_of_at_most_ten_lines() -> None:
    parts = {"advantage estimator", "policy loss", "reward", "rollout engine", "device", "logger", "data set"}
    assert set(RECIPES) == parts
    assert {name: recipe.count("\n") for name, recipe in RECIPES.items() if recipe.count("\n") > 10} == {}


def test_advantage_estimator() -> None:
    run("advantage estimator", ADVANTAGE_ESTIMATORS=ADVANTAGE_ESTIMATORS, AdvantageInputs=AdvantageInputs)
    mask = torch.tensor([[True, True, False]])
    function = ADVANTAGE_ESTIMATORS.get("reinforce").value
    advantages, returns = function(AdvantageInputs(torch.tensor([[0.0, 2.0, 0.0]]), mask))
    assert advantages.tolist() == returns.tolist() == [[2.0, 2.0, 0.0]]


def test_policy_loss() -> None:
    run("policy loss", POLICY_LOSSES=POLICY_LOSSES, LossInputs=LossInputs)
    mask = torch.tensor([[True, False]])
    inputs = LossInputs(torch.tensor([[-0.5, -1.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]), mask)
    loss, stats = POLICY_LOSSES.get("reinforce").value(inputs)
    assert loss.tolist() == [[1.5, 0.0]] and stats == {}


def test_reward() -> None:
    run("reward", REWARDS=REWARDS)
    function = REWARDS.get("my/dataset").value
    outcome = function(data_source="my/dataset", solution_str=" 7 ", ground_truth="7", extra_info={})
    assert read_outcome(outcome) == (1.0, {"length": 3.0})


def test_rollout_engine_is_registered_and_loads_its_file_when_asked_for() -> None:
    run(
        "rollout engine",
        ROLLOUT_ENGINES=ROLLOUT_ENGINES,
        ModelDescription=ModelDescription,
        RolloutEngine=RolloutEngine,
    )
    with pytest.raises(ModuleNotFoundError, match=r"steepest\.rollout\.mine"):
        ROLLOUT_ENGINES.get("mine").value(None)


def test_device() -> None:
    run("device", DEVICES=DEVICES, Accelerator=Accelerator)
    device = DEVICES.get("xpu").value()
    assert device.torch_device(1) == torch.device("xpu:1")
    if not torch.xpu.is_available():
        assert device.availability().startswith("PyTorch finds no XPU;")


def test_logger(tmp_path: Path) -> None:
    run("logger", LOGGERS=LOGGERS, LoggerContext=LoggerContext)
    with make_loggers(["csv"], tmp_path, "p", "e", {}) as loggers:
        loggers.log(3, {"a": 0.5})
    assert (tmp_path / "metrics.csv").read_text() == "3,a,0.5\n"


def test_data_set(tmp_path: Path) -> None:
    tools = {"WrittenFile": WrittenFile, "write_parquet": write_parquet, "math_row": math_row, "row_schema": row_schema}
    written = run("data set", **tools)["prepare_sums"](tmp_path)
    assert {split: file.num_rows for split, file in written.items()} == {"train": 2, "test": 1}
    (prompt,) = load_prompts([str(written["test"].path)])
    assert (prompt.messages[0]["content"], prompt.ground_truth, prompt.data_source) == ("5 + 6 = ?", "11", "my/dataset")
