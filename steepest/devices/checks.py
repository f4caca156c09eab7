"""What a device has to say about the software and the settings around it; `steepest doctor` prints it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from glob import glob
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    status: Status
    text: str
    """What was found."""
    remedy: str | None = None
    """What to do about it; None where nothing has to be done."""


def device_files(*patterns: str) -> list[str]:
    """The files of cards that the driver made, such as /dev/name0."""
    return sorted(file for pattern in patterns for file in glob(pattern))


def waits_for_every_kernel(variable: str) -> list[Check]:
    """A warning when the variable makes every operation wait until the card has done it."""
    if os.environ.get(variable, "0") in ("", "0"):
        return []
    text = (
        f"{variable}={os.environ[variable]}: every operation waits for the card, which is for finding faults and slow"
    )
    return [Check(variable, "warning", text, f"unset {variable}")]
