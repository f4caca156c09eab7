"""Rewards: scoring functions by `data_source`, and the worker processes that run them. No torch here.

The names that are built in are those registered by the modules of graders/.
"""

from __future__ import annotations

from steepest.rewards.api import REWARDS, RewardFunction, RewardRequest, RewardResult
from steepest.rewards.pool import RewardPool

__all__ = ["REWARDS", "RewardFunction", "RewardPool", "RewardRequest", "RewardResult"]
