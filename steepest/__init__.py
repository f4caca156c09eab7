"""Steepest: reinforcement-learning post-training for language models.

    run = steepest.train(model="Qwen/Qwen2.5-0.5B-Instruct", train=rows, reward=my_function, algorithm="grpo")

docs/python.md has examples. Importing the package loads nothing; its names are loaded when they are first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steepest.python.run import Checkpoint as Checkpoint
    from steepest.python.run import Run as Run
    from steepest.python.run import load_run as load_run
    from steepest.python.train import train as train

# With torch-npu installed and CANN missing, `import torch` itself fails unless this is set before it, also for a run on
# the CPU. The NPU device imports torch_npu itself when it is requested. A value that the user has set is kept.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

__version__ = "0.1.0"

_HOMES = {"train": "train", "load_run": "run", "Run": "run", "Checkpoint": "run"}
"""Name -> the module of steepest.python that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'steepest' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(f"steepest.python.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
