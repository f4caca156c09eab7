"""The small vocabulary the schema is written in: bounds, paths, required keys, names of functions.

A field's annotation says all that is checked about its value alone; what keys must be to each other is in the rules of
the sections.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from collections.abc import Mapping as Mapped
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


NAME_BYTES, PATH_BYTES = 255, 4095
"""Longest name of a file or folder, and longest path, of Linux."""


@dataclass(frozen=True)
class IsPath:
    """A file or folder: `~` is expanded."""

    def problem(self, value: str) -> str | None:
        """What keeps `value` from being the path of any file, or None."""
        if "\0" in value:
            return "holds a NUL character, which no path can"
        try:
            path = os.fsencode(os.path.expanduser(value))
        except UnicodeEncodeError:
            return (
                f"this process can name only files whose names are {sys.getfilesystemencoding()}. Start it with "
                "LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            )
        if max(map(len, path.split(b"/"))) > NAME_BYTES:
            return f"a name in a path has at most {NAME_BYTES} bytes"
        return f"a path has at most {PATH_BYTES} bytes" if len(path) > PATH_BYTES else None


def text_problem(value: Any) -> str | None:
    """Why a value, or a text within it, is no text: bytes of the command line that are not in its encoding."""
    if isinstance(value, Mapped):
        return next(filter(None, map(text_problem, (*value, *value.values()))), None)
    if isinstance(value, list | tuple):
        return next(filter(None, map(text_problem, value)), None)
    if not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value):
        return None
    encoding = sys.getfilesystemencoding()
    remedy = "" if encoding == "utf-8" else f" as {encoding}. Start the command with LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    return f"holds bytes that cannot be read{remedy}"


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
