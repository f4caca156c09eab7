"""The small vocabulary the schema is written in: bounds, paths, required keys, names of functions.

A field's annotation says all that is checked about its value alone; what keys must be to each other is in the rules of
the sections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from steepest.registry import module_names


@dataclass(frozen=True)
class Bounds:
    """The range a number must lie in; `low` and `high` are included, `above` and `below` are not."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, or None."""
        if self.above is not None and not value > self.above:
            return f"must be above {self.above:g}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below:g}"
        if self.low is not None and not value >= self.low:
            return f"must be at least {self.low:.10g}"
        if self.high is not None and not value <= self.high:
            return f"must be at most {self.high:.10g}"
        return None


@dataclass(frozen=True)
class MinusOneOr:
    """-1 (no limit, or not set), or a number of at least `low`."""

    low: int

    def problem(self, value: float) -> str | None:
        return None if value == -1 or value >= self.low else f"must be -1 or at least {self.low}"


@dataclass(frozen=True)
class IsPath:
    """A file or folder: `~` is expanded."""


@dataclass(frozen=True)
class Weighted:
    """A mapping of names to weights, or to options: a name alone, or a list of names, gives each the weight 1."""


@dataclass(frozen=True)
class Required:
    """No default: the run cannot start without it."""


@dataclass(frozen=True)
class NameOf:
    """The name of a registered function: one of `known`, or `module:function` or `file.py:function` of the user's."""

    kind: str
    names: Callable[[], tuple[str, ...]]
    """Asked when a name is checked, so that what is registered for a while counts."""

    @property
    def known(self) -> tuple[str, ...]:
        return self.names()


@dataclass(frozen=True)
class ModuleOf:
    """The name of a module in a folder of Steepest, such as "steepest.devices.backends". The folder is listed, and
    nothing in it is imported. A new file there is a new choice."""

    package: str

    @property
    def names(self) -> tuple[str, ...]:
        return module_names(self.package)


DERIVED: Any = None
"""Default of a field that may be left null and is filled in by its section: in a loaded Config it has its type."""


Positive = Annotated[int, Bounds(low=1)]
NonNegative = Annotated[int, Bounds(low=0)]
Seed = Annotated[int, Bounds(low=0, high=2**32 - 1)]
"""What every generator takes (numpy's is the narrowest)."""
NonNegativeFloat = Annotated[float, Bounds(low=0.0)]
PositiveFloat = Annotated[float, Bounds(above=0.0)]
Share = Annotated[float, Bounds(low=0.0, high=1.0)]
PositiveShare = Annotated[float, Bounds(above=0.0, high=1.0)]
File = Annotated[str, IsPath()]
Files = Annotated[tuple[str, ...], IsPath()]
RequiredFile = Annotated[str, IsPath(), Required()]
RequiredFiles = Annotated[tuple[str, ...], IsPath(), Required()]
Mapping = dict[str, Any]
WeightedNames = Annotated[dict[str, Any], Weighted()]
DeviceName = Annotated[str, ModuleOf("steepest.devices.backends")]
LoggerName = Annotated[str, ModuleOf("steepest.loggers.outputs")]
EngineName = Annotated[str, ModuleOf("steepest.rollout.engines")]
LossAggMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
ComputeDtype = Literal["auto", "bfloat16", "float32"]
Hub = Literal["huggingface", "modelscope"]
