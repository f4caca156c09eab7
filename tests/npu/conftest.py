"""The device of this folder's tests, loaded before anything else.

torch sets up its backward threads once, for the devices it knows when the first gradient is asked for. The loading is
done only in the processes of `python -m tests.npu`; elsewhere these tests are deselected, and torch_npu is left alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os

import pytest

from tests.npu.__main__ import EARLY

if os.environ.get(EARLY):
    with contextlib.suppress(ImportError, RuntimeError):  # the tests are then skipped, with the device's own reason
        importlib.import_module("torch_npu")


@pytest.fixture(scope="session")
def device() -> str:
    return "npu"
