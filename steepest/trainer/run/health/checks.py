"""What a check is, and what it sees of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from steepest.learner.metrics import Metrics


@dataclass(frozen=True)
class Seen:
    """What the checks look at after a step."""

    step: int
    metrics: Metrics
    validations: Mapping[int, float] = field(default_factory=dict)
    """Step -> result of every validation of this run so far."""

    def number(self, name: str) -> float | None:
        """A metric of the step; None where the step has none of this name, or one that is not finite."""
        value = self.metrics.get(name)
        return value if value is not None and math.isfinite(value) else None


@dataclass
class Check:
    """One sickness. A call returns the sentence that names it with its remedy, or None; it is made once a step."""

    name: ClassVar[str]
    """The metric is `health/<name>`: 1 in the row of a step where the check finds its sickness, else 0."""
    is_problem: ClassVar[bool] = True
    """Whether `trainer.on_problem=stop` ends the run: nothing is learnt, or what is learnt is wrong."""

    kept: dict[str, list[float]] = field(default_factory=dict, kw_only=True)
    """All that the check knows of earlier steps: lists of numbers by name. A checkpoint holds them."""

    def __call__(self, seen: Seen) -> str | None:
        raise NotImplementedError

    def last(self, name: str, value: float, most: int) -> list[float]:
        """Append a number to a list that keeps the last `most`, and return the list."""
        values = [*self.kept.get(name, []), value][-most:]
        self.kept[name] = values
        return values

    def in_a_row(self, sick: bool, steps: int) -> bool:
        """Whether this step and those before it, `steps` together, were sick."""
        found = self.last("sick", float(sick), steps)
        return len(found) == steps and all(found)
