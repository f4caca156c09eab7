"""The recipes of CONTRIBUTING.md run as they stand, touch the files they name, and are as short as they promise."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.core.policy_losses import POLICY_LOSSES
from steepest.data.files import WrittenFile, write_parquet
from steepest.data.prepare.gsm8k import math_row, row_schema
from steepest.data.prompts import load_prompts
from steepest.devices import DEVICES
from steepest.loggers import LOGGERS
from steepest.rewards.api import REWARDS
from steepest.rollout import ROLLOUT_ENGINES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = dict(re.findall(r"^## Add an? ([a-z ]+)\n(.*?)(?=^## |\Z)", TEXT, flags=re.M | re.S))
BLOCKS = {name: re.findall(r"```python\n(.*?)```", section, flags=re.S) for name, section in SECTIONS.items()}
NEW_FILES = {
    "reward": "steepest/rewards/graders/my_dataset.py",
    "rollout engine": "steepest/rollout/engines/uniform.py",
    "device": "steepest/devices/backends/xpu.py",
    "logger": "steepest/loggers/outputs/csv.py",
}
"""Kinds of parts that are one file: the recipe makes this one and touches no other."""
TABLES = (ADVANTAGE_ESTIMATORS, POLICY_LOSSES, REWARDS, ROLLOUT_ENGINES, DEVICES, LOGGERS)


@pytest.fixture(autouse=True)
def tables_as_before() -> Iterator[None]:
    with ExitStack() as stack:
        for table in TABLES:
            stack.enter_context(table.temporarily())
        yield


def run(name: str, **known: Any) -> dict[str, Any]:
    """The names that a recipe defines, given the names it may use."""
    scope = {"Any": Any, "Path": Path, "Mapping": Mapping, "Tensor": Tensor, "torch": torch, **known}
    exec(BLOCKS[name][0], scope)
    return scope


def test_every_kind_of_part_has_a_recipe_of_at_most_ten_lines_a_block() -> None:
    parts = {"advantage estimator", "policy loss", "key", "reward", "rollout engine", "device", "logger", "data set"}
    assert set(SECTIONS) == parts and all(BLOCKS.values())
    assert [block for blocks in BLOCKS.values() for block in blocks if block.count("\n") > 10] == []


def test_every_path_that_a_recipe_names_is_there() -> None:
    paths = re.findall(r"[`\s(]((?:[\w.]+/)+(?:[\w.]+\.\w+)?)[`\s),]", TEXT)
    users = {"path/to/mine.py", "../shared", *NEW_FILES.values()}
    missing = [
        path
        for path in paths
        if path not in users and not (ROOT / path).exists() and not (ROOT / "steepest" / path).exists()
    ]
    assert missing == [] and len(paths) > 20


def test_every_name_that_a_recipe_says_is_in_a_file_is_there() -> None:
    pairs = re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", TEXT)
    for name, path in pairs:
        text = (ROOT / "steepest" / path).read_text(encoding="utf-8")
        assert name.rpartition(".")[2] in text, f"{path} has no {name}"
    assert len(pairs) > 3


def edits(block: str) -> list[tuple[str, str | None, str]]:
    """(file, the name that it goes into or None for the end of the file, code) of each part of a block."""
    parts = re.split(r"^# (steepest/[\w/]+\.py)(?:, in (\w+))?\n", block, flags=re.M)
    return [(parts[i], parts[i + 1], parts[i + 2]) for i in range(1, len(parts), 3)]


def insert(text: str, name: str | None, code: str) -> str:
    """`text` with `code` at the end of what defines `name`: a call, a mapping, a class, or a function before its last
    statement, which returns."""
    if name is None:
        return f"{text}\n\n{code}"
    lines = text.splitlines(keepends=True)
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            last = node.body[-1].lineno - 1
            return "".join([*lines[:last], code, *lines[last:]])
    (start,) = (i for i, line in enumerate(lines) if re.match(rf"(class )?{name}\b.*[(:{{]$", line))
    end = next((i for i in range(start + 1, len(lines)) if lines[i][:1].strip()), len(lines))
    return "".join([*lines[:end], code, *lines[end:]])


def perform(blocks: list[str], tree: Path) -> set[str]:
    """Apply blocks to a copy of the package. Returns the files that were touched or made."""
    touched = set()
    for file, name, code in (edit for block in blocks for edit in edits(block)):
        path = tree / file
        text = insert(path.read_text(encoding="utf-8"), name, code) if path.exists() else code
        path.write_text(text, encoding="utf-8")
        touched.add(file)
    return touched


RUN = """
import torch
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.batch import Batch
from steepest.core.policy_losses import LossInputs
from steepest.trainer.build_step import build_advantages
from steepest.assembly.policy_loss import build_policy_loss
from steepest.trainer.experience.extras import FILLS

REQUIRED = ["data.train_files=a", "data.val_files=b", "actor_rollout_ref.model.path=m"]

def batch(config):
    made = Batch.from_sequences([[1], [1]], [[2, 3], [4]], group_ids=[0, 1], truncated=[False, False])
    made.token_level_rewards = torch.tensor([[0.0, 8.0], [2.0, 0.0]])
    for name in make_plan(config, 2048).estimator_needs:
        FILLS[name](config)(made, [])
    build_advantages(config)(made)
    return made.advantages.tolist()

discounted = load_config([*REQUIRED, "algorithm.adv_estimator=discounted", "algorithm.gamma=0.5"])
assert discounted.provenance.warnings == () and discounted.critic.enable is False
assert batch(discounted) == [[8.0, 4.0], [2.0, 0.0]], batch(discounted)
by_length = load_config([*REQUIRED, "algorithm.adv_estimator=by_length"])
assert batch(by_length) == [[4.0, 4.0], [2.0, 0.0]], batch(by_length)

key = "actor_rollout_ref.actor.policy_loss"
bounded = load_config([*REQUIRED, f"{key}.loss_mode=bounded", f"{key}.bonus=0.25"])
assert bounded.actor_rollout_ref.actor.clip_ratio_high == 0.3
loss, choose = build_policy_loss(bounded)
assert choose is None and loss.keywords == {"clip_ratio_high": 0.3, "bonus": 0.25}
mask = torch.tensor([[True, False]])
found, stats = loss(LossInputs(torch.tensor([[-2.0, -1.0]]), torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]), mask))
torch.testing.assert_close(found, torch.tensor([[1.1, 0.0]]))  # 0.3 + 0.25 = 0.55, times 2
assert stats == {}
(warning,) = load_config([*REQUIRED, f"{key}.bonus=0.25"]).provenance.warnings
assert warning == f"{key}.bonus has no effect: only {key}.loss_mode=bounded takes it."
"""


def in_copy(tree: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What `code` does with the package in `tree`."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_estimators_and_losses_as_the_recipes_say(tmp_path: Path) -> None:
    """On a copy of the package, in a process of its own."""
    shutil.copytree(ROOT / "steepest", tmp_path / "steepest", ignore=shutil.ignore_patterns("__pycache__"))
    statement, function, other_statements, other_function, _ = BLOCKS["advantage estimator"]
    assert len(perform([statement, function], tmp_path)) == 2
    assert len(perform([other_statements, other_function], tmp_path)) == 3
    assert len(perform(BLOCKS["policy loss"], tmp_path)) == 2
    ran = in_copy(tmp_path, RUN)
    assert ran.returncode == 0, ran.stderr


RUN_KEY = """
from steepest.assembly.description import Description, Size
from steepest.config import describe
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import ConfigError
from steepest.trainer.run.summary import start_summary

REQUIRED = ["data.train_files=a", "data.val_files=b", "actor_rollout_ref.model.path=m"]

def summary(*words):
    config = load_config([*REQUIRED, *words])
    roles = Description({"actor": Size()}, "float32", "plain", False, 0, 0, 0, (), 0)
    return start_summary(config, make_plan(config, 2048), (), CPUDevice(), roles, "folder")

assert summary("trainer.description=first try").endswith("  run         first try")
assert "first try" not in summary() and summary().endswith("  run folder  folder")
try:
    load_config([*REQUIRED, "trainer.description='a\\nb'"])
except ConfigError as error:
    assert error.problems == ["trainer.description: several lines. Give one."], error.problems
else:
    raise AssertionError("two lines are accepted")
page = describe.fill_tables("".join(f"<!-- begin {n} keys: generated --><!-- end {n} keys -->" for n in ("PPO", "SFT")))
assert "| `description` | text | null | What the run is for, printed at its start; null: nothing. |" in page
"""


@pytest.mark.slow
def test_a_key_as_the_recipe_says(tmp_path: Path) -> None:
    """On a copy of the package, in a process of its own."""
    shutil.copytree(ROOT / "steepest", tmp_path / "steepest", ignore=shutil.ignore_patterns("__pycache__"))
    assert len(perform(BLOCKS["key"], tmp_path)) == 2
    ran = in_copy(tmp_path, RUN_KEY)
    assert ran.returncode == 0, ran.stderr


def test_an_estimator_in_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(BLOCKS["advantage estimator"][-1])
    entry = ADVANTAGE_ESTIMATORS.get(f"{file}:function")
    assert entry.spec.needs == ("values",) and entry.spec.options == {"gamma": "gamma"} and entry.spec.whitened
    mask = torch.tensor([[True, True, False]])
    x = AdvantageInputs(torch.tensor([[0.0, 2.0, 0.0]]), mask, values=torch.tensor([[0.5, 1.5, 0.0]]))
    advantages, returns = entry.value(x, gamma=0.5)
    assert advantages.tolist() == [[0.5, -0.5, 0.0]] and returns.tolist() == [[1.0, 1.0, 0.0]]


NAMES = """
import sys
from steepest.config.load import load_config, load_sft_config
from steepest.errors import ConfigError

REQUIRED = ["data.train_files=a", "data.val_files=b", "actor_rollout_ref.model.path=m"]
NEW = ["trainer.device=xpu", "actor_rollout_ref.rollout.name=uniform", "trainer.logger=[console,csv]"]
config = load_config([*REQUIRED, *NEW])
assert config.trainer.logger == ("console", "csv")
assert (config.trainer.device, config.actor_rollout_ref.rollout.name) == ("xpu", "uniform")
assert load_sft_config(["data.train_files=a", "model.path=m", "trainer.device=xpu"]).trainer.device == "xpu"
try:
    load_config([*REQUIRED, "trainer.device=xpo", "actor_rollout_ref.rollout.name=unifrom"])
    raise AssertionError("wrong names were taken")
except ConfigError as error:
    assert "one of cpu, cuda, npu, xpu or null. Did you mean xpu?" in str(error), error
    assert "one of builtin, hf, uniform, vllm. Did you mean uniform?" in str(error), error

from steepest.rewards.api import data_source_names, entry_for, read_outcome
assert "my/dataset" in data_source_names()
outcome = entry_for("my/dataset").value(data_source="my/dataset", solution_str=" 7 ", ground_truth="7", extra_info={})
assert read_outcome(outcome) == (1.0, {"length": 3.0})
from steepest.rollout import ROLLOUT_ENGINES
assert ROLLOUT_ENGINES.names() == ["builtin", "hf", "uniform", "vllm"]
from steepest.loggers import make_loggers
with make_loggers(["csv"], "run", "p", "e", {}) as loggers:
    loggers.log(3, {"a": 0.5})
assert open("run/metrics.csv").read() == "3,a,0.5\\n"
assert not {"torch", "transformers"} & set(sys.modules)
"""

USES = """
import math
from types import SimpleNamespace

import torch
from steepest.devices import device_of, select_device
from steepest.devices.api import by_preference
from steepest.doctor.engines import engines
from steepest.doctor.probe_client import Answers
from steepest.errors import DeviceError
from steepest.rollout import ROLLOUT_ENGINES, GenerationRequest, SamplingParams

assert device_of("xpu:1").torch_device(1) == torch.device("xpu:1")
assert [device.name for device in by_preference()] == ["cuda", "npu", "xpu", "cpu"]
assert [check.name for check in engines(Answers())] == ["builtin", "hf", "uniform", "vllm"]
if not torch.xpu.is_available():
    try:
        select_device("xpu")
        raise AssertionError("a device that is not here was given")
    except DeviceError as error:
        assert str(error) == "device=xpu: PyTorch finds no XPU; use device=cpu."

engine = ROLLOUT_ENGINES.get("uniform").value(SimpleNamespace(vocab_size=8), max_model_len=6, dtype=torch.float32)
engine.load_weights(None, version=3)
(answers,) = engine.generate([GenerationRequest([1, 2], SamplingParams(max_tokens=9, n=2), "a")])
assert [answer.log_probs for answer in answers] == [[-math.log(8)] * 4] * 2
assert {(answer.finish_reason, answer.policy_version, answer.request_id) for answer in answers} == {("length", 3, "a")}
"""


def test_a_reward_an_engine_a_device_and_a_logger_are_one_new_file_each(tmp_path: Path) -> None:
    """On a copy of the package, in processes of their own."""
    shutil.copytree(ROOT / "steepest", tmp_path / "steepest", ignore=shutil.ignore_patterns("__pycache__"))
    for kind, file in NEW_FILES.items():
        assert not (tmp_path / file).exists()
        assert perform(BLOCKS[kind], tmp_path) == {file}
    for code in (NAMES, USES):
        ran = in_copy(tmp_path, code)
        assert ran.returncode == 0, ran.stderr


def test_data_set(tmp_path: Path) -> None:
    tools = {"WrittenFile": WrittenFile, "write_parquet": write_parquet, "math_row": math_row, "row_schema": row_schema}
    written = run("data set", **tools)["prepare_sums"](tmp_path)
    assert {split: file.num_rows for split, file in written.items()} == {"train": 2, "test": 1}
    (prompt,) = load_prompts([str(written["test"].path)])
    assert (prompt.messages[0]["content"], prompt.ground_truth, prompt.data_source) == ("5 + 6 = ?", "11", "my/dataset")
