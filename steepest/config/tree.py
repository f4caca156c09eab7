"""Between dataclasses and dotted keys: the leaves of a schema, and back to frozen dataclasses.

`fit` converts a value to the type of its key; `value_problem` checks choices and bounds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from steepest.config.types import Bounds, IsPath, MinusOneOr, ModuleOf, NameOf, Required, Weighted, text_problem
from steepest.registry import is_own_code, nearest

ConfigT = TypeVar("ConfigT")
PROVENANCE = "provenance"
_FLAGS = {
    **dict.fromkeys(("true", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "no", "n", "off", "0"), False),
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping {a: b}"}


@dataclass(frozen=True)
class Leaf:
    """One key of a schema: its dotted name, its default and what its annotation says about a value."""

    key: str
    default: Any
    base: type
    """int, float, bool, str or dict; of the elements when the leaf is a list."""
    is_list: bool = False
    length: int | None = None
    optional: bool = False
    choices: tuple[str, ...] = ()
    marks: tuple[Any, ...] = ()

    def mark(self, kind: type) -> Any:
        """The first mark of this kind, or None."""
        return next((m for m in self.marks if isinstance(m, kind)), None)

    @property
    def required(self) -> bool:
        return self.mark(Required) is not None

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        word = "a name, a list of names or a mapping {name: weight}" if self.mark(Weighted) else _WORDS[self.base]
        if self.choices:
            word = "one of " + ", ".join(self.choices)
        if self.length:
            word = f"a list of {self.length} numbers"
        elif self.is_list:
            word = f"{word}, alone or in a list"
        return word + (" or null" if self.optional else "")


def leaves(schema: type) -> dict[str, Leaf]:
    """Every key of `schema` (a dataclass of dataclasses), in the order written. `provenance` is no key."""
    return dict(_all_leaves(schema))


@functools.cache
def _all_leaves(schema: type) -> tuple[tuple[str, Leaf], ...]:
    return tuple((leaf.key, leaf) for leaf in _walk(schema, schema(), ""))


def _walk(schema: type, instance: Any, prefix: str) -> Iterator[Leaf]:
    hints = typing.get_type_hints(schema, include_extras=True)
    for item in dataclasses.fields(schema):
        if item.name == PROVENANCE:
            continue
        hint, default = hints[item.name], getattr(instance, item.name)
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), default, f"{prefix}{item.name}.")
        else:
            leaf = _read_hint(f"{prefix}{item.name}", hint, default)
            # types.DERIVED: null until its section has filled it in
            yield dataclasses.replace(leaf, optional=True) if default is None else leaf


def _read_hint(key: str, hint: Any, default: Any) -> Leaf:
    """Take Annotated, Optional, tuple and Literal off a type hint, outermost first. The modules of a folder are choices
    as those of a Literal are."""
    facts: dict[str, Any] = {"marks": ()}
    while True:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            hint, facts["marks"] = args[0], facts["marks"] + args[1:]
        elif origin in (typing.Union, types.UnionType):
            hint = next(a for a in args if a is not type(None))
            facts["optional"] = True
        elif origin is tuple:
            hint, facts["is_list"] = args[0], True
            facts["length"] = None if args[-1] is Ellipsis else len(args)
        elif origin is Literal:
            hint, facts["choices"] = str, args
        else:
            leaf = Leaf(key, default, origin or hint, **facts)
            folder = leaf.mark(ModuleOf)
            return leaf if folder is None else dataclasses.replace(leaf, choices=folder.names)


def sections(schema: type) -> set[str]:
    """Every dotted name that holds keys rather than a value."""
    return {".".join(key.split(".")[:i]) for key in leaves(schema) for i in range(1, key.count(".") + 1)}


def text_of(leaf: Leaf, value: Any, written: Any) -> Any:
    """What the leaf is given: for a text what was written, else `value`, which was read. See written.py.

    null stays null where it is a value, in a list and for a required key, which reports it.
    """
    if leaf.base is not str or isinstance(value, dict):
        return value
    if isinstance(value, list):
        return [None if one is None else text for one, text in zip(value, written, strict=True)]
    return None if value is None and (leaf.optional or leaf.is_list or leaf.required) else written


def fit(leaf: Leaf, value: Any) -> Any:
    """Convert a parsed value to the leaf's type and shape: a lone value into a list, 1e3 or '1000' to 1000.

    Raises ValueError; its text, which may be empty, says what was found.
    """
    if value is None and leaf.optional:
        return None
    if value in ("None", "none", "NULL") and leaf.optional:
        raise ValueError("nothing is written null")
    if leaf.mark(Weighted):
        value = _weighted(value)
    if not leaf.is_list:
        return _fit_one(leaf.base, value)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if leaf.length and len(values) != leaf.length:
        raise ValueError(f"found {len(values)} of them" if values else "the list is empty")
    return [_fit_one(leaf.base, one) for one in values]


def _fit_one(base: type, value: Any) -> Any:
    if base is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    if base is dict or value is None:
        raise ValueError
    if isinstance(value, list | tuple | dict):
        raise ValueError("found a mapping" if isinstance(value, dict) else "found a list")
    if base is bool:
        return _flag(value)
    return str(value) if base is str else _number(base, value)


def _weighted(value: Any) -> Any:
    """A name, or a list of names and mappings, as one mapping of names to weights."""
    if isinstance(value, str):
        return {value: 1.0}
    if not isinstance(value, list | tuple):
        return value
    found: dict[str, Any] = {}
    for one in value:
        more = _weighted(one)
        if not isinstance(more, dict):
            raise ValueError(f"found {one!r} in the list")
        if twice := sorted(found.keys() & more.keys()):
            raise ValueError(f"found {twice[0]} twice")
        found |= more
    return found


def _flag(value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("found a number")
    found = _FLAGS.get(str(value).lower())
    if found is None:
        raise ValueError
    return found


def _number(base: type, value: Any) -> Any:
    """An int or a float, finite."""
    if isinstance(value, bool):
        raise ValueError("found true or false")
    if base is int and isinstance(value, float) and not value.is_integer():
        raise ValueError
    try:
        number = base(value)
    except (ValueError, OverflowError):
        raise ValueError from None
    if number != number:
        raise ValueError("not a number at all")
    if number in (math.inf, -math.inf):
        raise ValueError("not finite")
    return number


def value_problem(leaf: Leaf, value: Any) -> str | None:
    """Why a value of the right type is not allowed (choices, bounds, names), or None."""
    if value is None:
        return None
    if problem := text_problem(value):
        return f"{problem}."
    for one in value if leaf.is_list else [value]:
        if (path := leaf.mark(IsPath)) and (problem := path.problem(one)):
            return f"{problem}."
        if leaf.choices and one not in leaf.choices:
            return f"must be {leaf.expected}.{_guess(one, leaf.choices)}"
        bounds = leaf.mark(Bounds) or leaf.mark(MinusOneOr)
        if bounds and (problem := bounds.problem(one)):
            return f"{problem}."
        name = leaf.mark(NameOf)
        if name and one not in name.known and not is_own_code(one):
            known = f"Known: {', '.join(name.known)}, or module:function of your own"
            return f"no such {name.kind}.{_guess(one, name.known)} {known}."
    return None


def _guess(value: str, known: tuple[str, ...]) -> str:
    near = nearest(value, known)
    return f" Did you mean {near}?" if near else ""


def get(tree: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key of nested dicts."""
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Store a value under a dotted key of nested dicts."""
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value


def freeze(schema: type[ConfigT], tree: Mapping[str, Any], **extra: Any) -> ConfigT:
    """Nested dicts to the frozen dataclass; lists become tuples."""
    hints = _hints(typing.cast(typing.Any, schema))
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        if dataclasses.is_dataclass(hints[name]):
            fields[name] = freeze(typing.cast(type, hints[name]), value)
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return schema(**fields, **extra)


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def thaw(config: Any) -> dict[str, Any]:
    """A frozen config as plain nested dicts and lists, without provenance."""
    return {
        item.name: _thaw_value(getattr(config, item.name))
        for item in dataclasses.fields(config)
        if item.name != PROVENANCE
    }


def _thaw_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return thaw(value)
    return list(value) if isinstance(value, tuple) else value


def expand(path: str) -> str:
    """`~` and `$NAME` in a path. A variable that is not set stays as it is written."""
    return os.path.expandvars(os.path.expanduser(path))


def is_path(leaf: Leaf) -> bool:
    return leaf.mark(IsPath) is not None
