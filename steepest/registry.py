"""Name -> function tables: one class for estimators, losses, rewards, engines, devices and loggers."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from steepest.errors import ConfigError


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def is_own_code(name: str) -> bool:
    """True for `module:function` and `path/to/file.py:function`: names of the user's own code."""
    return ":" in name


@cache
def module_names(package: str) -> tuple[str, ...]:
    """The modules in a folder of Steepest, such as "steepest.devices.backends", in the order of the alphabet. Nothing
    is imported, not even the package itself. Names with a leading underscore are left out."""
    folder = Path(__file__).parent.joinpath(*package.split(".")[1:])
    return tuple(sorted(found.name for found in pkgutil.iter_modules([str(folder)]) if not found.name.startswith("_")))


@dataclass(frozen=True)
class Entry:
    """One registered function with the facts that were given to `register`."""

    name: str
    value: Any
    facts: dict[str, Any] = field(default_factory=dict)


class Registry:
    """A table of names. Names are looked up at start; afterwards functions are passed, never strings.

    `kind` is the word used in messages ("advantage estimator"), `key` the setting that holds the name.
    `package` is a folder of Steepest whose modules register the built-in entries: a new file there is a new entry. They
    are imported when the table is first used. `module:function` and `path/to/file.py:function` reach code outside the
    package.
    """

    def __init__(self, kind: str, key: str, package: str | None = None) -> None:
        self.kind, self.key, self.package = kind, key, package
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(self, *names: str, **facts: Any) -> Callable[[Any], Any]:
        """Decorator: store the value under each name. A name that is taken is refused."""

        def store(value: Any) -> Any:
            if not self._is_built_in(value):
                self._load()  # a built-in name is taken, whether its module was imported before or not
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} {name!r} is registered already")
                self._entries[name] = self._entry(name, value, facts)
            return value

        return store

    def _entry(self, name: str, value: Any, facts: dict[str, Any]) -> Entry:
        return Entry(name, value, facts)

    def _is_built_in(self, value: Any) -> bool:
        return self.package is not None and str(getattr(value, "__module__", "")).startswith("steepest.")

    def _load(self) -> None:
        """Import every module of `package`, once."""
        if self.package is not None and not self._loaded:
            for name in module_names(self.package):
                importlib.import_module(f"{self.package}.{name}")
            self._loaded = True

    @contextmanager
    def temporarily(self, *entries: Entry) -> Iterator[None]:
        """Register `entries` for the `with` block. At its end they are removed, with everything that the block
        registered."""
        self._load()
        before = dict(self._entries)
        try:
            for entry in entries:
                self.register(entry.name, **entry.facts)(entry.value)
            yield
        finally:
            self._entries = before

    def names(self) -> list[str]:
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> Entry:
        """The entry under `name`. Raises ConfigError with the nearest name and the whole list.

        A user's own function may be decorated with `register` too; the facts given there are used.
        """
        self._load_for(name)
        if name in self._entries:
            return self._entries[name]
        if is_own_code(name):
            value = load_object(name, self.key)
            known = next((entry for entry in self._entries.values() if entry.value is value), None)
            return self._entry(name, value, {}) if known is None else replace(known, name=name)
        guess = nearest(name, self.names())
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ConfigError(f"{self.key}={name!r}: no such {self.kind}.{hint} Known: {', '.join(self.names())}.")

    def _load_for(self, name: str) -> None:
        """Import what registers `name`."""
        self._load()


class ModuleRegistry(Registry):
    """A table whose built-in entries are one module each, of the entry's name: `names` imports nothing, and `get` only
    the module that it needs."""

    package: str

    def __init__(self, kind: str, key: str, package: str) -> None:
        super().__init__(kind, key, package)

    def names(self) -> list[str]:
        return sorted({*module_names(self.package), *self._entries})

    def _load_for(self, name: str) -> None:
        if name not in self._entries and name in module_names(self.package):
            importlib.import_module(f"{self.package}.{name}")
            if name not in self._entries:
                raise ValueError(f"{self.package}.{name} registers no {self.kind} {name!r}")


def with_options(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Bind those of `options` that `function` takes as keyword-only parameters, and return the result."""
    names = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return partial(function, **{name: value for name, value in options.items() if name in names})


_LOADED_FILES: dict[Path, ModuleType] = {}


def load_object(target: str, key: str) -> Any:
    """Import `module:name`, `pkg://module:name` or `file.py:name`. `key` is the setting named in errors."""
    where, _, name = target.rpartition(":")
    module = load_file(where, key) if where.endswith(".py") else load_module(where, key)
    if not hasattr(module, name):
        guess = nearest(name, vars(module))
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ConfigError(f"{key}: {where} defines no {name!r}.{hint}")
    return getattr(module, name)


def load_file(path: str, key: str) -> ModuleType:
    """Run a Python file as a module of its own, once per process, like an import.

    A file that is missing or does not import is a ConfigError.
    """
    file = Path(path).expanduser().resolve()
    if file in _LOADED_FILES:
        return _LOADED_FILES[file]
    if not file.is_file():
        raise ConfigError(f"{key}={path!r}: there is no such file (looked for {file}).")
    spec = importlib.util.spec_from_file_location(f"steepest_user_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}={path!r}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{key}={path!r}: importing it raised {type(error).__name__}: {error}") from error
    _LOADED_FILES[file] = module
    return module


PACKAGE = "pkg://"
"""How verl marks a module that Python finds, where a file may stand too."""


def load_module(name: str, key: str) -> ModuleType:
    """Import a module that Python finds, with or without PACKAGE before its name."""
    name = name.removeprefix(PACKAGE)
    try:
        return importlib.import_module(name)
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{key}: importing {name!r} raised {type(error).__name__}: {error}") from error
