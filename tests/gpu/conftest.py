"""The device of this folder's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda"
