"""One thing that `steepest doctor` looked at, and what came of it. Devices say such things of themselves, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    """Stable within its group of the report: programs look checks up by it."""
    status: Status
    text: str
    """What was found, in words."""
    remedy: str | None = None
    """What to do; None where nothing has to be done."""
