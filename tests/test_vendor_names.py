"""The check for vendors' names: it finds what is planted, lets the rest through, and the tree passes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from steepest.config.schema import Config, SFTConfig
from steepest.config.tree import leaves
from steepest.devices import DEVICES
from steepest.rollout import ROLLOUT_ENGINES

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor_names", ROOT / "scripts" / "vendor_names.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECK = load()


def test_the_tree_has_none() -> None:
    assert CHECK.problems(ROOT / "steepest") == []


PLANTED = [
    ("torch.cuda.empty_cache()", "cuda"),
    ("x = y.cuda()", "cuda"),
    ("if t.is_cuda: pass", "is_cuda"),
    ("model.to('cuda:0')", "cuda:0"),
    ("model.to(f'npu:{i}')", "npu:"),
    ("device = 'NPU'", "NPU"),
    ("backend = 'cpu:gloo,cuda:nccl'", "cpu:gloo,cuda:nccl"),
    ("dist.Backend.NCCL", "NCCL"),
    ("dist.init_process_group(backend='hccl')", "hccl"),
    ("import torch_npu", "torch_npu"),
    ("from torch import cuda", "cuda"),
    ("from torch_npu.contrib import transfer_to_npu", "torch_npu"),
    ("importlib.import_module('torch_npu')", "torch_npu"),
    ("importlib.import_module('torch.cuda')", "torch.cuda"),
    ("os.environ['CUDA_VISIBLE_DEVICES']", "CUDA_VISIBLE_DEVICES"),
    ("os.environ['ASCEND_RT_VISIBLE_DEVICES']", "ASCEND_RT_VISIBLE_DEVICES"),
    ("def to_npu(x): pass", "to_npu"),
    ("f(use_cuda=True)", "use_cuda"),
    ("def f(npu_index): pass", "npu_index"),
    ("import vllm_ascend", "vllm_ascend"),
]


@pytest.mark.parametrize(("code", "name"), PLANTED)
def test_a_planted_name_is_found(tmp_path: Path, code: str, name: str) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "new.py").write_text(f"x = 1\n{code}\n")
    found = CHECK.problems(tmp_path)
    assert any(text.startswith(f"{tmp_path.name}/trainer/new.py:2: {name!r} is") for text in found), found


ALLOWED = [
    '"""Runs on cuda and npu."""',
    "# cuda",
    "n_gpus_per_node = 1; ppo_micro_batch_size_per_gpu = 2",
    "cascade = oracle = chip = ship = input = canned = 1",
    "x = 'no card; use an Ascend NPU, or CUDA'",
    "key = 'actor_rollout_ref.nccl_timeout'",
]


@pytest.mark.parametrize("code", ALLOWED)
def test_what_only_looks_like_one_is_let_through(code: str) -> None:
    assert list(CHECK.vendor_names(code)) == []


def test_a_vendors_own_files_are_let_through_and_what_all_devices_share_is_not(tmp_path: Path) -> None:
    for file in ("devices/backends/cuda.py", "devices/ascend.py", "devices/hide_torch_npu.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("device = 'cuda'\n")
    assert CHECK.problems(tmp_path) == []
    for file in ("devices/api.py", "config/schema.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("device = 'cuda'\n")
    assert len(CHECK.problems(tmp_path)) == 2


@pytest.mark.parametrize("schema", [Config, SFTConfig])
def test_the_schemas_take_the_devices_there_are(schema: type) -> None:
    device = leaves(schema)["trainer.device"]
    assert device.choices == tuple(DEVICES.names()) == ("cpu", "cuda", "npu") and device.optional


def test_the_schema_takes_the_rollout_engines_there_are() -> None:
    names = leaves(Config)["actor_rollout_ref.rollout.name"].choices
    assert names == tuple(ROLLOUT_ENGINES.names()) == ("builtin", "hf", "vllm")
