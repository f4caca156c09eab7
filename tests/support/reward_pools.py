"""Pools over the misbehaving functions of functions.py."""

from __future__ import annotations

from pathlib import Path

from steepest.rewards import RewardPool, RewardRequest

FUNCTIONS = str(Path(__file__).parents[1] / "rewards" / "functions.py")


def requests(*solutions: str, source: str = "d") -> list[RewardRequest]:
    return [RewardRequest(f"row:{i}", source, solution, "72", {}) for i, solution in enumerate(solutions)]


def custom_pool(name: str = "compute_score", **options) -> RewardPool:
    options = {"num_workers": 2, "timeout_s": 10.0, "max_error_rate": 1.0} | options
    return RewardPool(custom=(FUNCTIONS, name), **options)
