"""Registries of estimators and losses that check each function against its spec in config/algorithms.py."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic

from steepest.config.algorithms import Specs, SpecT
from steepest.registry import Entry, Registry, is_own_code, nearest

STATEMENTS = "steepest/config/algorithms.py"


@dataclass(frozen=True)
class Algorithm(Entry, Generic[SpecT]):
    """A registered function with its spec."""

    spec: SpecT = field(kw_only=True)


class Algorithms(Registry, Generic[SpecT]):
    """A table of functions, each with a spec.

    A built-in function is registered by its name; its spec is in `specs`. A user's own function states its spec in the
    decorator, e.g. `register("mine", needs=("values",))`. Fields left out, and a function without a decorator, have the
    defaults; `options` are those of the built-ins whose keywords the function has. A loss may have a second function,
    `choose`.
    """

    def __init__(self, kind: str, key: str, specs: Specs[SpecT]) -> None:
        super().__init__(kind, key)
        self.specs = specs

    def get(self, name: str) -> Algorithm[SpecT]:
        """See `Registry.get`."""
        found = super().get(name)
        assert isinstance(found, Algorithm)
        return found

    def _entry(self, name: str, value: Any, facts: dict[str, Any]) -> Algorithm[SpecT]:
        """Make an entry. Raises ValueError for a built-in that differs from its spec or has none, and for an unknown
        fact."""
        fields = {item.name for item in dataclasses.fields(self.specs.kind)} - {"name"}
        if unknown := sorted(facts.keys() - fields - {"choose"}):
            guess = nearest(unknown[0], [*fields, "choose"])
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ValueError(f"{self.kind} {name!r}: nothing can be stated under {unknown[0]!r}.{hint}")
        stated = {fact: facts[fact] for fact in facts if fact in fields}
        functions = {fact: facts[fact] for fact in facts if fact not in fields}
        keywords = _keywords(value).union(*(_keywords(function) for function in functions.values()))
        spec = self.specs.find(name)
        if spec is None:
            spec = self._own(name, value, stated, keywords)
        else:
            self._compare(spec, value, stated, keywords)
        return Algorithm(name, value, functions, spec=spec)

    def _compare(self, spec: SpecT, value: Any, stated: dict[str, Any], keywords: set[str]) -> None:
        if stated:
            raise ValueError(f"{self.kind} {spec.name!r}: state {', '.join(stated)} in {STATEMENTS}, not here")
        wanted = {*spec.options.values(), *spec.constants}
        if keywords != wanted:
            raise ValueError(
                f"{self.kind} {spec.name!r}: {_place(value)} takes the keywords {_listed(keywords)}, and its statement "
                f"in {STATEMENTS} names {_listed(wanted)}"
            )

    def _own(self, name: str, value: Any, stated: dict[str, Any], keywords: set[str]) -> SpecT:
        if not is_own_code(name) and str(getattr(value, "__module__", "")).partition(".")[0] == "steepest":
            guess = nearest(name, self.specs.names())
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ValueError(f"{self.kind} {name!r}: {_place(value)} has no statement in {STATEMENTS}.{hint}")
        options = {key: keyword for key, keyword in self.specs.options().items() if keyword in keywords}
        spec = self.specs.kind(name, **{"options": options, **stated})
        if missing := {*spec.options.values()} - keywords:
            raise ValueError(f"{self.kind} {name!r}: {_place(value)} has no keyword {_listed(missing)}")
        return spec


def _keywords(function: Callable[..., Any]) -> set[str]:
    """The names of the keyword-only parameters."""
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _place(value: Any) -> str:
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', value)}"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"
