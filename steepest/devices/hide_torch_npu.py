"""Hides a torch-npu that cannot work on this machine from the process. This file does not import torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "torch_npu"


def present() -> bool:
    """True if the package torch_npu is installed, working or not, hidden or not."""
    if sys.modules.get(PACKAGE) is not None:
        return True
    with unhidden():
        return importlib.util.find_spec(PACKAGE) is not None


def hide() -> None:
    """Make `import torch_npu`, and a search for the package, find nothing from now on."""
    sys.modules[PACKAGE] = None  # type: ignore[assignment]


@contextmanager
def unhidden() -> Iterator[None]:
    """Undo `hide` in the `with` block. Afterwards the package is hidden again, unless the block imported it."""
    hidden = PACKAGE in sys.modules and sys.modules[PACKAGE] is None
    if hidden:
        del sys.modules[PACKAGE]
    try:
        yield
    finally:
        if hidden and PACKAGE not in sys.modules:
            hide()
