"""`reward` and `custom_reward_function`: how responses are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steepest.config.schema_types import File, Positive, PositiveFloat, Share


@dataclass(frozen=True)
class CustomRewardConfig:
    """`custom_reward_function` (also under `reward.`): your own scorer."""

    path: File | None = None
    """Python file; null: the reward registered for each row's data source."""
    name: str = "compute_score"
    """Function in that file: f(data_source, solution_str, ground_truth, extra_info) to a number or a dict."""


@dataclass(frozen=True)
class RewardConfig:
    """`reward`: how responses are scored."""

    num_workers: Positive | None = None
    """Worker processes; null: one a core, at most 8."""
    timeout_s: PositiveFloat = 10.0
    """Seconds a response may take to score; then it counts as an error. Ours, not verl's."""
    max_error_rate: Share = 0.1
    """Share of a batch's scores that may fail before the run ends. Ours, not verl's."""
    mode: Literal["strict", "flexible"] = "strict"
    """GSM8K: strict wants `#### number`; flexible compares the value, in any usual form. Ours, not verl's."""
