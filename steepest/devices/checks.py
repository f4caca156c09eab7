"""Checks of environment variables and device files that several devices share."""

from __future__ import annotations

import os
from glob import glob

from steepest.checks import Check


def device_files(*patterns: str) -> list[str]:
    """The device files that the driver made, such as /dev/name0."""
    return sorted(file for pattern in patterns for file in glob(pattern))


def waits_for_every_kernel(variable: str) -> list[Check]:
    """A warning if the variable makes every operation wait until the card has finished it."""
    if os.environ.get(variable, "0") in ("", "0"):
        return []
    text = (
        f"{variable}={os.environ[variable]}: every operation waits for the card, which is for finding faults and slow"
    )
    return [Check(variable, "warning", text, f"unset {variable}")]
