"""The result of one check of `steepest doctor`. Devices return such results as well (`version_checks`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    """Name of the check, the same in every release and unique in its group of the report, so that programs can look it
    up."""
    status: Status
    text: str
    """What was found, in words."""
    remedy: str | None = None
    """What to do; None where nothing has to be done."""
