"""Checks of environment variables and device files that several devices share."""

from __future__ import annotations

import os
from pathlib import Path

from steepest.checks import Check

DEV = Path("/dev")


def device_files(dev: Path, *patterns: str) -> list[str]:
    """The device files that the driver made in the folder `dev`, such as /dev/name0."""
    return sorted(str(file) for pattern in patterns for file in dev.glob(pattern))


def waits_for_every_kernel(variable: str) -> list[Check]:
    """A warning if the variable makes every operation wait until the card has finished it."""
    if os.environ.get(variable, "0") in ("", "0"):
        return []
    text = (
        f"{variable}={os.environ[variable]}: every operation waits for the card, which is for finding faults and slow"
    )
    return [Check(variable, "warning", text, f"unset {variable}")]
