"""One mutation."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    file: str
    """Below `room`."""
    old: str
    new: str
    why: str
    room: str = "core"
    """A folder of `steepest`."""

    @property
    def path(self) -> str:
        """Below `steepest`."""
        return f"{self.room}/{self.file}"
