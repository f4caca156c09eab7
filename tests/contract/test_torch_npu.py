"""The stand-in has the names, parameters and kernels of the real torch-npu, read from its own wheel.

    python -m pytest -m contract tests/contract

Not part of the default run: it fetches about 45 MB from the package index, once (kept in ~/.cache/steepest), and makes
empty CANN libraries, so that the real package can be imported here. Needs gcc and nm, on x86-64 Linux.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.contract import hollow_cann
from tests.fakes import fake_npu_build

pytestmark = pytest.mark.contract

DUMP = Path(hollow_cann.__file__).with_name("dump_api.py")
FAKES = Path(fake_npu_build.__file__).parent
ALLOWED = {
    "torch.npu.Stream": "torch.Stream stands in for it; its constructor takes a device, the real one a priority too",
    "torch.npu.Event": "torch.Event stands in for it; its constructor takes no interprocess flags",
}
"""Differences that are known and why they do no harm."""


def dump(*path: Path, **environment: str) -> dict[str, Any]:
    """What dump_api.py prints in a process that finds torch_npu in `path`."""
    found = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": os.pathsep.join(map(str, path))}
    line = [sys.executable, str(DUMP)]
    done = subprocess.run(line, env={**found, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def real_package() -> Path:
    """The folder that holds the real torch_npu for this torch, fetched if it is not there yet."""
    version = importlib.metadata.version("torch").split("+")[0]
    folder = Path.home() / ".cache" / "steepest" / f"torch-npu-{version}-py{sys.version_info[0]}.{sys.version_info[1]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made)]
            subprocess.run([*line, f"torch-npu=={version}"], check=True)
            made.rename(folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not (shutil.which("gcc") and shutil.which("nm")):
        pytest.skip("the empty CANN libraries are made with gcc and nm, for x86-64 Linux")
    import torch

    site, hollow = real_package(), tmp_path_factory.mktemp("hollow")
    assert hollow_cann.make(site, Path(torch.__file__).parent, hollow) > 50
    return dump(site, LD_LIBRARY_PATH=str(hollow))


def test_the_stand_in_is_what_the_real_package_is(real: dict[str, Any]) -> None:
    try:
        fake_npu_build.build()
    except fake_npu_build.CannotBuildError as error:
        pytest.skip(str(error))
    fake = dump(FAKES)
    assert fake.keys() == real.keys() and len(real) > 50
    different = {name: (fake[name], real[name]) for name in real if fake[name] != real[name]}
    assert different.keys() == ALLOWED.keys(), different


def test_the_dump_reads_the_real_package(real: dict[str, Any]) -> None:
    """The control: it says things that no empty answer would."""
    assert real["torch.npu.set_per_process_memory_fraction"] == ["fraction", "device"]
    assert real["torch_npu.npu_fusion_attention"][:5] == ["query", "key", "value", "head_num", "input_layout"]
    assert real["the process group's backend"] == "hccl" and real["module.to keeps tied weights"] is True
    assert "missing" not in real.values()
