"""Who may import whom. Reads the import statements, also those inside functions, and names file and line.

The picture is in docs/architecture.md; when a rule here changes, that page changes with it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import pytest

PACKAGE = Path(__file__).parents[1] / "steepest"

LAYERS = {
    "__init__": 0.0,
    "errors": 0.1,
    "registry": 0.2,
    "console": 0.2,
    "progress": 0.2,
    "versions": 0.2,
    "checks": 0.2,
    "process": 0.25,
    "config": 0.3,
    "hub": 0.5,
    "core": 1.0,
    "rewards": 1.0,
    "data": 1.0,
    "devices": 1.0,
    "loggers": 1.0,
    "models": 2.0,
    "rollout": 3.0,
    "learner": 3.0,
    "assembly": 4.0,
    "cluster": 4.5,
    "trainer": 5.0,
    "report": 1.5,
    "doctor": 5.0,
    "python": 5.5,
    "__main__": 6.0,
}
"""A module imports from lower layers or from its own folder; folders of one layer do not import each other."""

TRAINER_FLOORS = {
    "loop": 0,
    "experience": 1,
    "algorithm": 2,
    "run": 2,
    "ppo": 3,
    "build_step": 4,
    "build_rewards": 4,
    "jobs": 5,
    "main_ppo": 6,
    "main_preflight": 6,
    "main_evaluate": 6,
    "main_sft": 6,
}
"""The same inside trainer/: the step knows nothing of the run around it, and nothing but jobs puts all together."""

OPEN_TO_ALL = ("steepest.core.batch",)
"""Types that every folder from layer 1 up may use."""

HOMES = {
    "ray": ("cluster/ray.py",),
    "vllm": ("rollout/engines/vllm.py",),
    "vllm_ascend": ("rollout/engines/vllm.py",),
    "torch.distributed": ("learner/", "cluster/"),
    "torch.cuda": ("devices/backends/",),
    "torch.npu": ("devices/backends/",),
    "torch_npu": ("devices/backends/",),
    "huggingface_hub": ("hub/",),
    "modelscope": ("hub/",),
    "modelscope_hub": ("hub/",),
    "peft": ("models/lora.py", "trainer/jobs/export.py"),
}
"""Module or attribute -> the only files (or folders, with a slash) that may name it."""

WITHOUT_TORCH = ("config", "hub", "rewards", "data", "report")
"""Folders that never import torch."""

WITHOUT_TORCH_AT_IMPORT = (
    "loggers",
    "doctor",
    "versions",
    "checks",
    "__init__",
    "__main__",
    "errors",
    "registry",
    "console",
    "progress",
)
"""Places that may import torch inside a function only."""


@dataclass(frozen=True)
class Import:
    """One imported module, or one use of a guarded attribute such as torch.cuda."""

    module: str
    line: int
    in_function: bool


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every module that the code of `module` imports, relative and dynamic imports resolved."""
    aliases = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {item.asname for item in node.names if item.name == "torch" and item.asname}
    for node, inside in _walk(tree, False):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield Import(item.name, node.lineno, inside)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module, is_package)
            for item in node.names:
                yield Import(f"{base}.{item.name}", node.lineno, inside)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, inside)
        elif _is_guarded_attribute(node, aliases):
            yield Import(f"torch.{node.attr}", node.lineno, inside)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "npu"):
            yield Import(f"torch.{node.func.attr}", node.lineno, inside)  # tensor.cuda()


def _walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, inside
        yield from _walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def _is_guarded_attribute(node: ast.AST, torch_names: set[str]) -> TypeGuard[ast.Attribute]:
    """torch.cuda, torch.npu or torch.distributed, by whatever name torch goes."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr in ("cuda", "npu", "distributed")
        and isinstance(node.value, ast.Name)
        and node.value.id in torch_names
    )


def _base(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*parts, node.module] if node.module else parts)


def violations(file: Path, package: Path) -> list[str]:
    """What is wrong with the imports of one file, each as `file:line: reason`."""
    relative = file.relative_to(package)
    is_package = file.name == "__init__.py"
    parts = ["steepest", *relative.with_suffix("").parts]
    module = ".".join(parts[:-1] if is_package else parts)
    room = relative.parts[0].removesuffix(".py")
    if room not in LAYERS:
        return [f"{relative}:1: the folder or module {room!r} has no layer; give it one in {Path(__file__).name}"]
    found = {
        f"{relative}:{item.line}: {reason}"
        for item in imports(ast.parse(file.read_text(encoding="utf-8")), module, is_package)
        for reason in [*_inside(item, room), *_inside_trainer(item, relative), *_outside(item, room, relative)]
    }
    return sorted(found, key=lambda text: int(text.split(":")[1]))


def _inside(item: Import, room: str) -> Iterator[str]:
    """The layer rule, for imports of the package's own modules."""
    if item.module != "steepest" and not item.module.startswith("steepest."):
        return
    target = [*item.module.split("."), ""][1]
    if target not in LAYERS or target == room:  # a name of steepest/__init__.py, such as __version__
        return
    if room == "__init__" and target == "python":  # for type checkers: these names are loaded when they are used
        return
    if item.module.startswith(OPEN_TO_ALL) and LAYERS[room] >= 1:
        return
    if LAYERS[target] >= LAYERS[room]:
        yield f"{room} (layer {LAYERS[room]:g}) imports {item.module} (layer {LAYERS[target]:g})"


def _inside_trainer(item: Import, relative: Path) -> Iterator[str]:
    """The same rule for the folders and modules of trainer/."""
    target = [*item.module.split("."), "", ""]
    if relative.parts[0] != "trainer" or target[:2] != ["steepest", "trainer"] or relative.name == "__init__.py":
        return
    mine = relative.parts[1].removesuffix(".py")
    if mine not in TRAINER_FLOORS:
        yield f"the folder or module {mine!r} of trainer has no floor; give it one in {Path(__file__).name}"
    elif target[2] in TRAINER_FLOORS and target[2] != mine and TRAINER_FLOORS[target[2]] >= TRAINER_FLOORS[mine]:
        yield f"trainer/{mine} (floor {TRAINER_FLOORS[mine]}) imports {item.module} (floor {TRAINER_FLOORS[target[2]]})"


def _outside(item: Import, room: str, relative: Path) -> Iterator[str]:
    """The rules about other packages."""
    for name, homes in HOMES.items():
        if _is_part(item.module, name) and not any(_lives_in(relative, home) for home in homes):
            yield f"{name} may be named only in {', '.join(homes)}"
    if _is_part(item.module, "torch"):
        if room in WITHOUT_TORCH:
            yield f"{room} does without torch"
        if room in WITHOUT_TORCH_AT_IMPORT and not item.in_function:
            yield f"{room} imports torch inside functions only"
    top = item.module.split(".")[0]
    if room == "core" and top not in ("torch", "steepest", "") and top not in sys.stdlib_module_names:
        yield f"core needs torch and nothing else, not {top}"


def _is_part(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def _lives_in(relative: Path, home: str) -> bool:
    return relative.as_posix().startswith(home) if home.endswith("/") else relative.as_posix() == home


def test_every_module_keeps_to_its_layer() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    found = [f"steepest/{problem}" for file in files for problem in violations(file, PACKAGE)]
    assert not found, "\n" + "\n".join(found)


FORBIDDEN = [
    ("core/advantages.py", "x = 1\nfrom steepest.learner.actor import Actor\n", 2, "layer 3"),
    ("core/advantages.py", "from steepest.config.schema import Config\nimport yaml\n", 2, "not yaml"),
    ("core/masked.py", "from steepest import rewards\n", 1, "imports steepest.rewards"),
    ("core/masked.py", "from ..rewards import api\n", 1, "imports steepest.rewards.api"),
    ("core/__init__.py", "from .. import data\n", 1, "imports steepest.data"),
    ("core/kl.py", "import numpy as np\n", 1, "not numpy"),
    ("rollout/builtin/engine.py", "def f():\n    from steepest.learner import actor\n", 2, "layer 3"),
    ("rollout/api.py", "import importlib\nimportlib.import_module('steepest.trainer.ppo')\n", 2, "layer 5"),
    ("config/load.py", "from steepest.core.batch import Batch\n", 1, "layer 1"),
    ("errors.py", "from steepest.registry import Registry\n", 1, "imports steepest.registry"),
    ("__init__.py", "from .errors import SteepestError\n", 1, "imports steepest.errors"),
    ("trainer/ppo.py", "def f():\n    import ray\n", 2, "ray may be named only in cluster/ray.py"),
    ("cluster/local.py", "from ray.util import placement_group\n", 1, "ray may be named only"),
    ("rollout/api.py", "from vllm import LLM\n", 1, "vllm may be named only in rollout/engines/vllm.py"),
    ("models/load.py", "from torch import distributed\n", 1, "torch.distributed may be named only"),
    ("core/masked.py", "import torch.distributed as dist\n", 1, "torch.distributed may be named only"),
    ("rollout/api.py", "import torch\n\ntorch.distributed.barrier()\n", 3, "torch.distributed may be named only"),
    (
        "learner/actor.py",
        "import torch as t\nt.cuda.empty_cache()\n",
        2,
        "torch.cuda may be named only in devices/backends/",
    ),
    ("learner/actor.py", "def f(x):\n    return x.cuda()\n", 2, "torch.cuda may be named only in devices/backends/"),
    ("learner/actor.py", "import torch_npu\n", 1, "torch_npu may be named only in devices/backends/"),
    ("rewards/graders/gsm8k.py", "def f():\n    import torch\n", 2, "rewards does without torch"),
    ("data/chat.py", "from torch.utils.data import Dataset\n", 1, "data does without torch"),
    ("hub/find.py", "def f():\n    import torch\n", 2, "hub does without torch"),
    ("hub/find.py", "from steepest.models.load import load_tokenizer\n", 1, "layer 2"),
    ("data/prepare/gsm8k.py", "from modelscope_hub import HubApi\n", 1, "modelscope_hub may be named only in hub/"),
    ("models/load.py", "import huggingface_hub\n", 1, "huggingface_hub may be named only in hub/"),
    ("loggers/jsonl.py", "import torch\n", 1, "loggers imports torch inside functions only"),
    ("learner/actor.py", "import peft\n", 1, "peft may be named only in models/lora.py, trainer/jobs/export.py"),
    ("somewhere/new.py", "", 1, "has no layer"),
    ("trainer/ppo.py", "from steepest.trainer.run.hooks import Run\nfrom steepest.trainer import jobs\n", 2, "floor 5"),
    ("trainer/experience/scoring.py", "from steepest.trainer.algorithm import correction\n", 1, "floor 2"),
    ("trainer/algorithm/kl_rewards.py", "def f():\n    from steepest.trainer.run.metrics import three\n", 2, "floor 2"),
    ("trainer/new.py", "x = 1\nfrom steepest.trainer.loop import Timer\n", 2, "has no floor"),
    ("assembly/roles.py", "from steepest.cluster.local import LocalCluster\n", 1, "layer 4.5"),
    ("cluster/local.py", "from steepest.trainer.loop import Timer\n", 1, "layer 5"),
    ("process/threads.py", "from steepest.devices.api import Device\n", 1, "layer 1"),
]


@pytest.mark.parametrize(("path", "code", "line", "reason"), FORBIDDEN)
def test_a_planted_offence_is_found_with_its_line(tmp_path: Path, path: str, code: str, line: int, reason: str) -> None:
    file = _plant(tmp_path, path, code)
    found = violations(file, tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:{line}: ") and reason in found[0]


ALLOWED = [
    ("core/advantages.py", "import math\nimport torch\nfrom steepest.core.batch import Batch\n"),
    ("core/__init__.py", "from .masked import masked_mean\n"),
    ("devices/api.py", "from steepest.core.batch import Batch\n"),
    ("devices/backends/cuda.py", "import torch\ntorch.cuda.is_available()\n"),
    ("learner/sharding.py", "import torch.distributed as dist\nfrom steepest.models.load import x\n"),
    ("cluster/ray.py", "import ray\nfrom steepest.learner.actor import Actor\n"),
    ("rollout/engines/vllm.py", "def f():\n    from vllm import LLM\n"),
    ("loggers/tensorboard.py", "def f():\n    from torch.utils.tensorboard import SummaryWriter\n"),
    ("trainer/ppo.py", "from steepest import __version__\nfrom . import loop\n"),
    ("trainer/jobs/ppo.py", "from steepest.trainer.ppo import PPOStep\nfrom steepest.trainer.jobs import sft\n"),
    ("__main__.py", "from steepest import __version__\nfrom steepest.process.entry import run_entry\n"),
    ("models/load.py", "import raylib\nimport torchvision\nfrom steepest.hub import local_model\n"),
    ("data/prepare/gsm8k.py", "from steepest.hub import find\n"),
    ("hub/huggingface.py", "from huggingface_hub import HfApi\nfrom steepest.config.types import Hub\n"),
]


@pytest.mark.parametrize(("path", "code"), ALLOWED)
def test_what_is_allowed_is_let_through(tmp_path: Path, path: str, code: str) -> None:
    assert violations(_plant(tmp_path, path, code), tmp_path) == []


def _plant(package: Path, path: str, code: str) -> Path:
    file = package / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    return file
