"""How many cores a process may use. This file does not import torch: it runs before torch is imported."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(root: Path = CGROUP) -> int:
    """Number of cores this process may use: the smaller of its CPU affinity and the container's quota of time."""
    share = _container_cores(root)
    return cores_by_affinity() if share is None else min(cores_by_affinity(), max(1, math.ceil(share)))


def cores_by_affinity() -> int:
    """Number of cores in the CPU affinity, without the container's quota. Libraries count cores this way."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _container_cores(root: Path) -> float | None:
    """The container's quota in cores, from control groups of version 2 or 1; None without a quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    return int(quota) / int(period) if quota.strip().isdigit() and int(period) else None
