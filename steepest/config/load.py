"""From command line and YAML to a frozen Config, or to one ConfigError that lists every problem.

    arguments.py  text                -> assignments, in order (file first, then command line)
    this file     assignments         -> known keys with values of the right type
    sections/     null                -> derived values;  the whole -> problems and warnings

Nothing here imports torch or opens a data file.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steepest.config import checks, describe, tree, verl_keys
from steepest.config.arguments import COMMAND_LINE, PROGRAM, Arguments, Assignment, read_arguments, read_settings
from steepest.config.checks import Rule, Section
from steepest.config.environment import SWITCHES
from steepest.config.keys import KeyBook
from steepest.config.schema import Config, Provenance, SFTConfig
from steepest.config.sections import (
    actor,
    advantages,
    batch_sizes,
    correction,
    critic,
    data,
    kl,
    model,
    reward,
    rollout,
    row_selection,
    sft,
    trainer,
)
from steepest.errors import ConfigError
from steepest.process.files import replace_text

ConfigT = TypeVar("ConfigT", Config, SFTConfig)
DEFAULT = "default"
BY_HAND = (COMMAND_LINE, PROGRAM)
"""Where a value was written for this one run, not in a file."""


@dataclass(frozen=True)
class Job(Generic[ConfigT]):
    """What the loader must know of one command."""

    schema: type[ConfigT]
    module: str
    book: KeyBook
    sections: tuple[Section, ...]
    """In the order in which they fill in null, and in which their problems and warnings are printed."""

    @property
    def rules(self) -> list[Rule]:
        return [rule for section in self.sections for rule in section.rules]


PPO = (data, model, actor, rollout, batch_sizes, critic, kl, advantages, correction, row_selection, reward, trainer)
SFT = (sft,)
"""The subjects of each job."""
PPO_JOB = Job(
    Config,
    "steepest.trainer.main_ppo",
    KeyBook(tree.leaves(Config), verl_keys.REFUSED, verl_keys.NO_EFFECT, verl_keys.ALIASES),
    tuple(subject.SECTION for subject in PPO),
)
SFT_JOB = Job(
    SFTConfig,
    "steepest.trainer.main_sft",
    KeyBook(tree.leaves(SFTConfig), verl_keys.SFT_REFUSED, verl_keys.SFT_NO_EFFECT, verl_keys.SFT_ALIASES),
    tuple(subject.SECTION for subject in SFT),
)


def load_config(overrides: list[str]) -> Config:
    """The PPO job's Config from `key=value` words and options.

    `--help`, `--help-all` and `--cfg job` print and raise SystemExit(0). Raises ConfigError with all problems at once.
    """
    return _load(PPO_JOB, overrides)


def load_settings(settings: Mapping[str, Any], preset: str | None = None) -> Config:
    """The PPO job's Config from a Python program's values, after those of a preset. Raises ConfigError with all
    problems at once."""
    config, problems = _Loading(PPO_JOB, read_settings(settings, preset)).run()
    if problems:
        raise ConfigError(problems)
    return config


def load_sft_config(overrides: list[str]) -> SFTConfig:
    """The SFT job's Config; otherwise as `load_config`."""
    return _load(SFT_JOB, overrides)


def config_dict(config: Config | SFTConfig) -> dict[str, Any]:
    """The effective values as nested plain dicts and lists, for loggers; without provenance."""
    return tree.thaw(config)


def save_config(config: Config | SFTConfig, path: Path) -> None:
    """Write the effective values as YAML; a comment says where a value that is not the default came from.

    `--config path` loads it again. It is written under another name and renamed, so it is whole or not there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, describe.to_yaml(config, with_sources=True))


def _load(job: Job[ConfigT], argv: list[str]) -> ConfigT:
    arguments = read_arguments(argv, job.book.unknown)
    if arguments.help or arguments.help_all:
        print(describe.help_text(job.schema, job.module, every_key=arguments.help_all))
        raise SystemExit(0)
    config, problems = _Loading(job, arguments).run()
    if problems:
        raise ConfigError(problems)
    if arguments.cfg is not None:
        print(describe.to_yaml(config), end="")
        for warning in config.provenance.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        raise SystemExit(0)
    return config


class _Loading(Generic[ConfigT]):
    """One load: the typed node, what the user gave, what could not be read."""

    def __init__(self, job: Job[ConfigT], arguments: Arguments) -> None:
        self.job: Job[ConfigT] = job
        self.book, self.arguments = job.book, arguments
        self.sections = tree.sections(job.schema)
        self.node = OmegaConf.create(tree.thaw(job.schema()))
        self.sources: dict[str, str] = {}
        self.ignored: dict[str, str] = {}
        """Accepted keys without a field -> why they change nothing."""
        self.problems = list(arguments.problems)
        self.bad: set[str] = set()
        """Keys whose value could not be used: rules that read them are passed over."""

    def run(self) -> tuple[ConfigT, list[str]]:
        for assignment in self.arguments.assignments:
            self._assign(assignment)
        values = self._values()
        self._check_required(values)
        given = {key: copy.deepcopy(tree.get(values, key)) for key in self.sources}
        derived = checks.resolve(self.job.sections, values, self._is_set)
        self._check_derived(values, derived)
        config = tree.freeze(self.job.schema, values)
        for rule in self.job.rules:
            if not self.bad.intersection(rule.keys):
                self.problems.extend(rule.check(config, self._is_set))
        if self.problems:
            return config, self.problems
        return tree.freeze(self.job.schema, values, provenance=self._provenance(config, given, derived)), []

    def _is_set(self, key: str) -> bool:
        return key in self.sources

    def _check_derived(self, values: dict[str, Any], derived: dict[str, str]) -> None:
        """Check derived values as given ones are; the problem names the key from which the value follows."""
        for key, origin in derived.items():
            value = tree.get(values, key)
            if {key, origin} & self.bad:
                self.bad.add(key)
            elif problem := tree.value_problem(self.book.leaves[key], value):
                self.bad.add(key)
                while origin in derived:
                    origin = derived[origin]
                found = f"={_shown(tree.get(values, origin))}" if origin in self.book.leaves else ""
                source = Assignment(origin, None, self.sources.get(origin, COMMAND_LINE))
                self._blame(origin, source, f"{origin}{found}: {key}={_shown(value)} is derived from it, and {problem}")

    def _assign(self, a: Assignment) -> None:
        """Store one assignment, or report why it cannot be stored."""
        key = self.book.true_name(a.key)
        if a.value == MISSING and not a.delete:
            return
        if key != a.key and a.value is None and key in self.sources:
            return  # verl's files write null for the older of two names
        if key in self.sections or (isinstance(a.value, dict) and a.value and key not in self.book.leaves):
            self._assign_section(key, a)
            return
        leaf, inside = self.book.leaf_of(key)
        if leaf is None:
            self._answer_stranger(key, a)
        elif a.delete:
            self._reset(leaf, a)
        else:
            self._store(leaf, key, inside, a)

    def _assign_section(self, key: str, a: Assignment) -> None:
        if a.delete:
            for leaf in self.book.leaves.values():
                if leaf.key.startswith(f"{key}."):
                    self._reset(leaf, Assignment(leaf.key, None, a.source, delete=True))
        elif isinstance(a.value, dict):
            written = a.written if isinstance(a.written, dict) else {}
            for name, value in a.value.items():
                self._assign(Assignment(f"{key}.{name}", value, a.source, written.get(name, value)))
        elif a.value is not None and not (key in self.book.refused and self.book.refused[key].accepts(a.value)):
            inner = [k.removeprefix(f"{key}.").split(".")[0] for k in self.book.leaves if k.startswith(f"{key}.")]
            self._blame(
                key, a, f"{key}={a.value}: a section, not a value. Its keys: {', '.join(dict.fromkeys(inner))}."
            )

    def _answer_stranger(self, key: str, a: Assignment) -> None:
        problem = self.book.unknown(key) if a.delete else self.book.problem_of(key, a.value)
        if problem:
            self._blame(self.book.suggest(key) or key, a, problem)
        elif not a.delete and (reason := self.book.without_effect(key, a.value)):
            self.ignored[key] = reason
        else:
            self.ignored.pop(key, None)

    def _reset(self, leaf: tree.Leaf, a: Assignment) -> None:
        """`~key`: back to the default. `~key=value` only if that is the value."""
        present, wanted = OmegaConf.select(self.node, leaf.key), tree.text_of(leaf, a.value, a.written)
        if a.check_value and present != wanted:
            self._blame(leaf.key, a, f"~{leaf.key}={wanted}: the value is {present}.")
            return
        default = list(leaf.default) if isinstance(leaf.default, tuple) else copy.deepcopy(leaf.default)
        OmegaConf.update(self.node, leaf.key, default, merge=False)
        self.sources.pop(leaf.key, None)
        self.bad.discard(leaf.key)

    def _store(self, leaf: tree.Leaf, key: str, inside: bool, a: Assignment) -> None:
        value = a.value if inside else tree.text_of(leaf, a.value, a.written)
        try:
            if not inside and "${" not in str(value):
                tree.fit(leaf, value)
            OmegaConf.update(self.node, key, value, merge=False)
        except (ValueError, OmegaConfBaseException) as error:
            self._blame(leaf.key, a, _unfit(leaf, key, value, error))
            return
        self.sources[leaf.key] = a.source

    def _blame(self, key: str, a: Assignment, problem: str) -> None:
        where = "" if a.source in BY_HAND else f" (in {a.source})"
        self.problems.append(problem + where)
        self.bad.add(key)

    def _values(self) -> dict[str, Any]:
        """All values as nested plain dicts: interpolations followed, choices and bounds checked, ~ expanded."""
        values: dict[str, Any] = {}
        for key, leaf in self.book.leaves.items():
            value: Any = leaf.default
            if key in self.sources:
                value = self._value(leaf)
            tree.put(values, key, list(value) if isinstance(value, tuple) else copy.deepcopy(value))
        return values

    def _value(self, leaf: tree.Leaf) -> Any:
        source = Assignment(leaf.key, None, self.sources[leaf.key])
        try:
            found = OmegaConf.select(self.node, leaf.key, throw_on_missing=True)
            value: Any = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            self._blame(leaf.key, source, f"{leaf.key}: its ${{...}} cannot be followed: {reason}.")
            return leaf.default
        try:
            value = tree.fit(leaf, value)
        except ValueError as error:
            self._blame(leaf.key, source, _unfit(leaf, leaf.key, value, error))
            return leaf.default
        problem = tree.value_problem(leaf, value)
        if problem:
            self._blame(leaf.key, source, f"{leaf.key}={_shown(value)}: {problem}")
            return leaf.default
        if value is not None and tree.is_path(leaf):
            return [tree.expand(v) for v in value] if leaf.is_list else tree.expand(value)
        return value

    def _check_required(self, values: dict[str, Any]) -> None:
        """Required keys that are missing; one that the user misspelt is not reported a second time."""
        for leaf in self.book.leaves.values():
            if not leaf.required or tree.get(values, leaf.key):
                continue
            if leaf.key not in self.bad and self.arguments.cfg is None:
                example = {"path": "Qwen/Qwen2.5-0.5B-Instruct"}.get(leaf.key.split(".")[-1], "FILE.parquet")
                self.problems.append(f"{leaf.key}: missing. It has no default; give {leaf.key}={example}.")
            self.bad.add(leaf.key)

    def _provenance(self, config: ConfigT, given: dict[str, Any], derived: dict[str, str]) -> Provenance:
        asked = [key for key in given if self._asks(key, config, given)]
        found = list(checks.warnings_of(self.job.sections, config, {key: given[key] for key in asked}))
        for reason in dict.fromkeys(self.ignored.values()):
            found.append(checks.without_effect([key for key, why in self.ignored.items() if why == reason], reason))
        sources = {key: self._source(key, derived) for key in self.book.leaves}
        files = {source for source in self.sources.values() if source not in BY_HAND}
        notes = [f"Settings come from {source}; the command line wins over them." for source in sorted(files)]
        values = tree.thaw(config)
        notes += [
            f"{key}={tree.get(values, key)}: chosen by {origin} in the environment."
            for key, origin in derived.items()
            if origin.split("=")[0] in SWITCHES
        ]
        return Provenance(sources=sources, notes=tuple(notes), warnings=tuple(found))

    def _source(self, key: str, derived: dict[str, str]) -> str:
        if key in derived:
            return f"derived from {derived[key]}"
        return self.sources.get(key, DEFAULT)

    def _asks(self, key: str, config: ConfigT, given: dict[str, Any]) -> bool:
        """True for a key of the command line, or of a file if the other keys imply another value than it gives."""
        if self.sources[key] in BY_HAND:
            return True
        leaf, values = self.book.leaves[key], tree.thaw(config)
        default = list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default
        tree.put(values, key, default)
        checks.resolve(self.job.sections, values, lambda k: k in self.sources and k != key)
        return bool(tree.get(values, key) != given[key])


def _unfit(leaf: tree.Leaf, key: str, value: Any, error: Exception) -> str:
    """The problem of a value that has not the type of its key."""
    text = repr(value) if isinstance(value, str) else _shown(value)
    # OmegaConf's own words name its classes; ours from `fit` say what was found
    found = "" if isinstance(error, OmegaConfBaseException) or not str(error) else f" ({error})"
    return f"{key}={text}: expected {leaf.expected}{found}."


def _shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(_shown(v) for v in value) + "]"
    return "null" if value is None else str(value)
