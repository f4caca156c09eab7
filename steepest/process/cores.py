"""How many cores a process may use. Without torch, so that it can be asked before torch is imported."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(root: Path = CGROUP) -> int:
    """Cores this process may run on: by its affinity, and by the container's share of time."""
    share = _container_cores(root)
    return cores_by_affinity() if share is None else min(cores_by_affinity(), max(1, math.ceil(share)))


def cores_by_affinity() -> int:
    """Without regard to the container's share, as libraries count."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _container_cores(root: Path) -> float | None:
    """The container's quota in cores, by version 2 and version 1 of control groups; None without one."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    return int(quota) / int(period) if quota.strip().isdigit() and int(period) else None
