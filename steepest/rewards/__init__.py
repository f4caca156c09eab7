"""Rewards: scoring functions by `data_source`, and the worker processes that run them. No torch here.

The modules of graders/ register the built-in names; no other place is searched.
"""

from __future__ import annotations

from steepest.rewards.api import REWARDS, RewardFunction, RewardRequest, RewardResult
from steepest.rewards.pool import RewardPool

__all__ = ["REWARDS", "RewardFunction", "RewardPool", "RewardRequest", "RewardResult"]
