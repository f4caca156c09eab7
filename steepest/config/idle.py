"""A key without effect: which, when, and why. The tables are in no_effect.py and, of one subject, in idle_*.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Idle:
    """Keys (or whole sections) and when they do nothing."""

    keys: tuple[str, ...]
    when: Callable[[Any], bool]
    reason: str

    def speaks_of(self, key: str) -> bool:
        return any(key == one or key.startswith(f"{one}.") for one in self.keys)


def names_of(section: str, names: str) -> tuple[str, ...]:
    """The keys of a section, from their names in one text."""
    return tuple(f"{section}.{name}" for name in names.split())
