"""A torch-npu that cannot work here, kept out of the process. No torch here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = "torch_npu"


def present() -> bool:
    """Whether the package torch_npu is there, working or not, hidden or not."""
    if sys.modules.get(PACKAGE) is not None:
        return True
    with unhidden():
        return importlib.util.find_spec(PACKAGE) is not None


def hide() -> None:
    """From now on `import torch_npu` finds nothing, and neither does a search for the package."""
    sys.modules[PACKAGE] = None  # type: ignore[assignment]


@contextmanager
def unhidden() -> Iterator[None]:
    """Let the body see what `hide` hid; hidden again afterwards unless the body imported it."""
    hidden = PACKAGE in sys.modules and sys.modules[PACKAGE] is None
    if hidden:
        del sys.modules[PACKAGE]
    try:
        yield
    finally:
        if hidden and PACKAGE not in sys.modules:
            hide()
