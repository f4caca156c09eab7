"""Rewards: scoring functions by `data_source`, and the worker processes that run them. No torch here.

The names that are built in are those registered by the modules imported below; nothing is searched for.
"""

from __future__ import annotations

from steepest.rewards.api import REWARDS, RewardFunction, RewardRequest, RewardResult
from steepest.rewards.gsm8k import gsm8k
from steepest.rewards.pool import RewardPool

__all__ = ["REWARDS", "RewardFunction", "RewardPool", "RewardRequest", "RewardResult", "gsm8k"]
