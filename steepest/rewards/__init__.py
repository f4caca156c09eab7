"""Rewards: scoring functions by `data_source`, and the worker processes that run them. No torch here.

The modules imported below register the built-in names; no other place is searched.
"""

from __future__ import annotations

from steepest.rewards.api import REWARDS, RewardFunction, RewardRequest, RewardResult
from steepest.rewards.exact import exact
from steepest.rewards.gsm8k import gsm8k
from steepest.rewards.math import math
from steepest.rewards.multiple_choice import multiple_choice
from steepest.rewards.numeric import numeric
from steepest.rewards.pool import RewardPool
from steepest.rewards.shaping import format_reward, length

__all__ = [
    "REWARDS",
    "RewardFunction",
    "RewardPool",
    "RewardRequest",
    "RewardResult",
    "exact",
    "format_reward",
    "gsm8k",
    "length",
    "math",
    "multiple_choice",
    "numeric",
]
