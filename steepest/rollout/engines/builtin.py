"""Steepest's own engine: its code is the folder rollout/builtin/."""

from __future__ import annotations

from steepest.rollout.api import ROLLOUT_ENGINES
from steepest.rollout.builtin.engine import BuiltinEngine

ROLLOUT_ENGINES.register("builtin")(BuiltinEngine)
