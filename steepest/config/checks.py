"""What a section has besides its dataclasses: the meaning of null, rules, keys without effect, warnings.

Each file of sections/ has one `SECTION`. load.py lists the sections of each job and asks them in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from steepest.config import tree

ACTOR, REF, ROLLOUT, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout", "model"))

IsSet = Callable[[str], bool]
"""Whether the user gave a key."""


class Deriver:
    """Fills null keys of nested dicts and remembers from what."""

    def __init__(self, values: dict[str, Any], is_set: IsSet) -> None:
        self.values, self.is_set = values, is_set
        self.derived: dict[str, str] = {}
        """Filled key -> the key it follows from, or what chose it."""

    def __getitem__(self, key: str) -> Any:
        return tree.get(self.values, key)

    def fill(self, key: str, value: Any, origin: str) -> None:
        """Set `key` if it is null."""
        if self[key] is None and value is not None:
            self.replace(key, value, origin)

    def copy(self, origin: str, *keys: str) -> None:
        """Let each null key follow `origin`."""
        for key in keys:
            self.fill(key, self[origin], origin)

    def replace(self, key: str, value: Any, origin: str) -> None:
        """Set `key`, whatever it is."""
        tree.put(self.values, key, value)
        self.derived[key] = origin


Resolve = Callable[[Deriver], None]
Check = Callable[[Any, IsSet], Iterator[str]]
"""From a configuration to problems, one sentence each."""
Warn = Callable[[dict[str, Any], Any], Iterator[str]]
"""From the keys that the user asked for, with their values, and the configuration to sentences."""


@dataclass(frozen=True)
class Rule:
    """What keys must be to each other. It is passed over when the value of one of them could not be used."""

    keys: tuple[str, ...]
    check: Check


@dataclass(frozen=True)
class NoEffect:
    """Keys, or whole sections, that change nothing in a run for which `when` is true."""

    keys: tuple[str, ...]
    when: Callable[[Any], bool]
    reason: str

    def covers(self, key: str) -> bool:
        return any(key == one or key.startswith(f"{one}.") for one in self.keys)


@dataclass
class Section:
    """What one subject adds to a job. The methods are decorators that add a function to it."""

    resolvers: list[Resolve] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    tables: list[Callable[[], list[NoEffect]]] = field(default_factory=list)
    warnings: list[Warn] = field(default_factory=list)

    def null(self, function: Resolve) -> Resolve:
        """What null means: values that follow from other keys. What also needs the data is in plan.py."""
        self.resolvers.append(function)
        return function

    def rule(self, *keys: str) -> Callable[[Check], Check]:
        """A rule that reads `keys`."""

        def add(check: Check) -> Check:
            self.rules.append(Rule(keys, check))
            return check

        return add

    def no_effect(self, function: Callable[[], list[NoEffect]]) -> Callable[[], list[NoEffect]]:
        """The keys without effect. Of two entries that cover a key, the first whose `when` is true is reported."""
        self.tables.append(function)
        return function

    def warning(self, function: Warn) -> Warn:
        """A warning that no entry of the table can state."""
        self.warnings.append(function)
        return function


def resolve(sections: Sequence[Section], values: dict[str, Any], is_set: IsSet) -> dict[str, str]:
    """Fill in what is null in `values`, in place. Returns {filled key: key it follows from}."""
    deriver = Deriver(values, is_set)
    for section in sections:
        for function in section.resolvers:
            function(deriver)
    return deriver.derived


def warnings_of(sections: Sequence[Section], config: Any, asked: dict[str, Any]) -> Iterator[str]:
    """The warnings about the keys of `asked`, which the user asked for, with their values.

    A key without effect is named once, and keys without effect for one reason share a sentence.
    """
    left: Iterable[str] = list(asked)
    for entry in (entry for section in sections for table in section.tables for entry in table()):
        named = [key for key in left if entry.covers(key)]
        if named and entry.when(config):
            left = [key for key in left if key not in named]
            yield without_effect(named, entry.reason)
    for section in sections:
        for warn in section.warnings:
            yield from warn(asked, config)


def without_effect(keys: list[str], reason: str) -> str:
    """`a, b have no effect: reason.`"""
    return f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect: {reason}."


def names_of(section: str, names: str) -> tuple[str, ...]:
    """The keys of a section, from their names in one text."""
    return tuple(f"{section}.{name}" for name in names.split())
