"""A reward that differs between responses of any model, so that the measured step has a gradient."""

from __future__ import annotations

from typing import Any


def digits(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None) -> float:
    """The share of digits among the characters of the response."""
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))
