"""The command line and YAML files, read into a flat list of assignments. Nothing is checked against a schema here.

Hydra reads both: its override grammar for `key=value`, its compose API for files, so `defaults:` lists and
interpolations work. No Hydra app is started: no outputs folder, no change of directory, no logging set up.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steepest.config import written
from steepest.config.foreign_names import foreign
from steepest.config.types import text_problem
from steepest.errors import ConfigError

Trees = tuple[dict[str, Any], dict[str, Any]]
"""A YAML file's values as they were read, and the same with what was written in place of what was read."""
COMMAND_LINE = "command line"
PROGRAM = "argument of steepest.train"
PRESETS = Path(__file__).parent / "presets"
OPTIONS = ("--help", "--help-all", "--cfg job", "--config FILE", "--config-name NAME", "--config-path FOLDER")
_FLAGS = {
    "--config-name": "config_name",
    "-cn": "config_name",
    "--config-path": "config_path",
    "-cp": "config_path",
    "--config-dir": "config_path",
    "-cd": "config_path",
    "--config": "config_file",
    "--cfg": "cfg",
    "-c": "cfg",
}

_VALUES = {"cfg": "job", "config_file": "my.yaml", "config_path": "FOLDER"}


@dataclass(frozen=True)
class Assignment:
    """One `key=value` of a file or of the command line; `delete` for `~key`."""

    key: str
    value: Any
    source: str
    written: Any = None
    """`value` with the text of every number, truth value and null in it; see written.py."""
    delete: bool = False
    check_value: bool = False
    """With `delete`: only if the value is the present one (`~key=value`)."""


@dataclass
class Arguments:
    """What the user asked for, in order; `problems` holds what could not be read."""

    assignments: list[Assignment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    help: bool = False
    help_all: bool = False
    cfg: str | None = None
    config_file: str | None = None
    config_name: str | None = None
    config_path: str | None = None


def read_arguments(argv: list[str], answer: Callable[[str], str | None] = lambda key: None) -> Arguments:
    """Flags, then the preset or file of `--config-name`, then the file of `--config`, then `key=value` in order. Never
    raises: see `problems`.

    `answer` says what is wrong with a key, or None; it is asked about words that look like options.
    """
    out = Arguments()
    overrides = _read_flags(argv, out, answer)
    _read_named_file(out)
    _read_given_file(out)
    for text in _whole_settings(overrides, out):
        try:
            out.assignments.append(read_override(text))
        except ValueError as error:
            out.problems.append(str(error))
    return out


def read_settings(settings: Mapping[str, Any], preset: str | None) -> Arguments:
    """The same for a Python program: keys with values of any type, after the values of a preset."""
    out = Arguments(config_name=preset)
    _read_named_file(out)
    for key, value in settings.items():
        plain = _plain(value)
        out.assignments.append(Assignment(key, plain, PROGRAM, _written(plain)))
    return out


def _plain(value: Any) -> Any:
    """Paths as texts, tuples as lists, numbers of numpy and torch as Python's."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if callable(getattr(value, "item", None)) else value


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _written(entry) for name, entry in value.items()}
    return [_written(entry) for entry in value] if isinstance(value, list) else str(value)


def _read_flags(argv: list[str], out: Arguments, answer: Callable[[str], str | None]) -> list[str]:
    rest: list[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        name, has_value, value = word.partition("=")
        if word in ("--help", "-h", "--hydra-help"):
            out.help = True
        elif word == "--help-all":
            out.help_all = True
        elif name in _FLAGS:
            found = value if has_value else left.pop(0) if left else None
            if not found or found.startswith("-"):
                out.problems.append(f"{name}: needs a value, e.g. {name} {_VALUES.get(_FLAGS[name], 'NAME')}.")
            else:
                setattr(out, _FLAGS[name], found)
        elif word in ("-m", "--multirun"):
            out.problems.append(f"{word}: Steepest makes one run a command. `steepest sweep` takes several values.")
        elif word in ("--resolve", "--run", "-r"):
            continue
        elif word.startswith("-"):
            out.problems.append(_no_such_option(word, left, answer))
        else:
            rest.append(word)
    if out.cfg not in (None, "job", "all"):
        out.problems.append(f"--cfg {out.cfg}: must be job.")
    return rest


_PIECE = re.compile(r"[^\s{}\[\]]+:[-+]?[\d.]+(e[-+]?\d+)?")
"""`name:number`: one entry of a mapping from which a shell has taken the braces."""


def _whole_settings(words: list[str], out: Arguments) -> list[str]:
    """The words without those that a shell has made of one setting: cut at its spaces, or at the commas of its braces.
    Each such setting is one problem, which shows how to write it."""
    whole: list[str] = []
    while words:
        first, rest = words[0], words[1:]
        key, _, value = first.partition("=")
        if _open_brackets(value) > 0:
            pieces = [first]
            while rest and _open_brackets(" ".join(pieces).partition("=")[2]) > 0:
                pieces.append(rest.pop(0))
            joined = " ".join(pieces)
            if len(pieces) > 1 and _open_brackets(joined.partition("=")[2]) == 0:
                out.problems.append(f"{key}: the shell has cut this setting at its spaces. Write {in_quotes(joined)}")
                words = rest
                continue
        end = next((i for i, word in enumerate(words) if word.partition("=")[0] != key), len(words))
        pieces = words[:end]
        values = [piece.partition("=")[2] for piece in pieces]
        if len(pieces) > 1 and all(one.count(":") for one in values) and any(map(_PIECE.fullmatch, values)):
            entries = ", ".join(": ".join(one.rsplit(":", 1)) for one in values)
            out.problems.append(
                f"{key}: given {len(pieces)} times, which is what a shell makes of braces without quotes. Write "
                + in_quotes(f"{key}={{{entries}}}")
            )
            words = words[len(pieces) :]
            continue
        whole.append(first)
        words = words[1:]
    return whole


def _open_brackets(value: str) -> int:
    """How many brackets are not closed, where the value is a list or a mapping."""
    if not value.startswith(("[", "{")):
        return 0
    return sum(value.count(mark) for mark in "[{") - sum(value.count(mark) for mark in "]}")


def in_quotes(setting: str) -> str:
    """A setting as a shell has to get it."""
    return shlex.quote(setting)


def _no_such_option(word: str, left: list[str], answer: Callable[[str], str | None]) -> str:
    """The problem of a word with dashes that is no option. The value that follows another library's setting is taken
    off `left`."""
    name, has_value, _ = word.lstrip("-").partition("=")
    key = name.replace("-", "_")
    problem = f"{word}: no such option. There are {', '.join(OPTIONS)}."
    if has_value:
        problem += f" Keys are written without dashes: {word.lstrip('-')}"
    found = answer(key) or problem
    if foreign(key) is None and not found.endswith(f".{key}?"):  # the last part of a key of ours
        return problem
    if not has_value and left and "=" not in left[0] and not left[0].startswith("--"):
        left.pop(0)
    return f"{found} Settings are written key=value, without dashes."


def read_override(text: str) -> Assignment:
    """One `key=value`, `+key=value`, `++key=value` or `~key`. Raises ValueError with the whole message."""
    from hydra.errors import HydraException

    bare = text.lstrip("+~")
    if text.endswith((".yaml", ".yml")) and "=" not in text:
        raise ValueError(f"{text!r}: not a setting. A file of settings is given by --config {text}.")
    if "=" not in text and not text.startswith("~"):
        raise ValueError(f"{text!r}: not a setting. Write key=value, e.g. trainer.device=cpu.")
    if not bare.partition("=")[0].strip():
        raise ValueError(f"{text!r}: no key before the equals sign. Write key=value, without spaces around it.")
    if problem := text_problem(text):
        raise ValueError(f"{text}: {problem}.")
    named, names = _name_own_code(text)
    try:
        override = _parser().parse_override(named)
    except HydraException:
        return _read_loosely(text)
    key = override.get_key_element().lstrip("+~")
    if override.is_sweep_override():
        value = text.partition("=")[2]
        raise ValueError(
            f"{key}={value}: several values for one key make a sweep: that is `steepest sweep`, and this is one run. "
            f"A list is written '{key}=[{value}]'."
        )
    return Assignment(
        key,
        _with_names(override.value(), names),
        COMMAND_LINE,
        _with_names(written.override_text(named), names),
        override.is_delete(),
        "=" in text,
    )


def is_sweep(text: str) -> bool:
    """Whether a word gives several values to one key, in Hydra's grammar: `lr=1e-6,3e-6`."""
    from hydra.errors import HydraException

    try:
        return bool(_parser().parse_override(text).is_sweep_override())
    except HydraException:
        return False


def sweep_values(text: str) -> list[str]:
    """The words with one value each that such a word stands for, as they were written: `1e-6` stays `1e-6`. Raises
    ConfigError for an interval."""
    override, (key, _, value) = _parser().parse_override(text), text.partition("=")
    if not override.is_discrete_sweep():
        raise ConfigError(f"{text}: an interval is no list of values. Write them out: {key}=1,2,4.")
    if re.match(r"\w+\(", value):  # choice(...), range(...): Hydra computes them
        return [f"{key}={one}" for one in override.sweep_string_iterator()]
    return [f"{key}={one}" for one in _at_commas(value)]


def _at_commas(text: str) -> list[str]:
    """The parts between the commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for mark in text:
        if mark == quote or (not quote and mark in "'\""):
            quote = "" if quote else mark
        elif not quote:
            depth += (mark in "[{(") - (mark in "]})")
        if mark == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += mark
    return [part.strip() for part in parts]


@functools.cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


_OWN_CODE = re.compile(r"""(?P<quote>['"]?)(?P<name>[^\s{}\[\],:='"]+:[A-Za-z_]\w*)(?P=quote)(?=\s*:)""")
"""`my_reward.py:f` before the colon of a mapping, with or without quotes of its own. Hydra takes the name up to its own
colon as the name, and quotes for an error."""


def _name_own_code(text: str) -> tuple[str, dict[str, str]]:
    """The override with words that Hydra reads in place of `file.py:function` in mappings, and what they stand for."""
    key, _, value = text.partition("=")
    names: dict[str, str] = {}

    def word(found: re.Match[str]) -> str:
        names[f"own_code_{len(names)}"] = found["name"]
        return f"own_code_{len(names) - 1}"

    return (f"{key}={_OWN_CODE.sub(word, value)}", names) if value.startswith(("{", "[{")) else (text, names)


def _with_names(value: Any, names: dict[str, str]) -> Any:
    """A value with those words replaced by what they stand for."""
    if isinstance(value, dict):
        return {names.get(name, name): _with_names(entry, names) for name, entry in value.items()}
    return [_with_names(entry, names) for entry in value] if isinstance(value, list) else value


def _read_loosely(text: str) -> Assignment:
    """What Hydra's grammar refuses although the meaning is plain: ~/a.parquet, run (1), a=b in a value, Jinja text."""
    key, _, value = text.partition("=")
    bare = key.lstrip("+~")
    if found := re.fullmatch(r"(reward\.functions)\.(\S+\.py:\w+)", bare):
        shown = in_quotes(f"{found[1]}={{{found[2]}: {value}}}")
        raise ValueError(f"{bare}: the name of a file cannot be a part of a key. Write {shown}.")
    if not all(part.isidentifier() for part in bare.replace("-", "_").split(".")):
        raise ValueError(f"{text!r}: {bare!r} is not a key. Keys look like trainer.device; write key=value.")
    if value[:1] in ("[", "{", "'", '"') and not value.startswith(("{%", "{{", "{#")):
        try:
            read, as_written = written.read_yaml(value)
            return Assignment(bare, read, COMMAND_LINE, as_written, key.startswith("~"), True)
        except yaml.YAMLError:
            raise ValueError(
                f"{bare}={value}: cannot be read. Lists are written '[a,b]', mappings '{{a: b}}', "
                "and the whole setting goes in single quotes in the shell."
            ) from None
    return Assignment(bare, value, COMMAND_LINE, value, key.startswith("~"), True)


def _read_given_file(out: Arguments) -> None:
    """Append the values of `--config FILE`; the name of a preset stands for its file."""
    given = out.config_file
    if given is None:
        return
    path = Path(given).expanduser().absolute()
    if not path.exists() and "/" not in given and (PRESETS / f"{given}.yaml").is_file():
        path = PRESETS / f"{given}.yaml"
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "there is no such file"
        out.problems.append(f"--config={given}: {what}. Give a YAML file, or the name of a preset: {_presets()}.")
        return
    _append_file(out, path, f"--config={given}", _read_yaml)


def _presets() -> str:
    return ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def _read_yaml(path: Path) -> Trees:
    """A file of any name, as `compose_file` returns it. Hydra's composition, which is particular about names, is used
    only where the file asks for it."""
    tree, texts = written.read_yaml(path.read_text(encoding="utf-8"))
    if isinstance(tree, dict) and "defaults" in tree:
        return compose_file(path)
    if not isinstance(tree, dict) or not isinstance(texts, dict):
        raise OSError("the file is not a mapping of keys")
    return {str(key): value for key, value in tree.items()}, {str(key): value for key, value in texts.items()}


def _read_named_file(out: Arguments) -> None:
    """Compose the user's YAML (or a preset) with Hydra and append its values as assignments."""
    name, folder = out.config_name, out.config_path
    if name is None:
        if folder is not None:
            out.problems.append("--config-path: needs --config-name NAME, the file NAME.yaml in that folder.")
        return
    path = _locate(name, folder)
    if not path.is_file() and path.stem != "ppo_trainer":
        known = sorted(p.stem for p in path.parent.glob("*.yaml"))
        there = f"There are: {', '.join(known)}." if known else "The folder has no .yaml file, or is not there."
        out.problems.append(f"--config-name={name}: no file {path}. {there}")
        return
    _append_file(out, path, f"--config-name={name}", compose_file)


def _append_file(out: Arguments, path: Path, option: str, read: Callable[[Path], Trees]) -> None:
    is_preset = path.parent == PRESETS
    source = f"preset {path.stem}" if is_preset else f"file {path}"
    try:
        tree, texts = read(path)
    except _composition_errors() as error:
        reason = " ".join(str(error).split())
        out.problems.append(f"{option}: {path} cannot be read: {reason}")
        return
    out.assignments.extend(Assignment(key, value, source, texts[key]) for key, value in tree.items())


def _locate(name: str, folder: str | None) -> Path:
    file_name = f"{name.removesuffix('.yaml')}.yaml"
    if folder is not None:
        return Path(folder).expanduser().resolve() / file_name
    if "/" in name or (name.endswith(".yaml") and Path(name).is_file()):
        return Path(file_name).expanduser().resolve()
    return PRESETS / file_name


def _composition_errors() -> tuple[type[Exception], ...]:
    from hydra.errors import HydraException

    return HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, RecursionError


def compose_file(path: Path) -> Trees:
    """The file's tree, its `defaults:` list followed, as nested plain dicts, and the same with what was written in
    place of what was read; interpolations are left as text."""
    from hydra import initialize_config_dir

    _store_base_names()
    with initialize_config_dir(config_dir=str(path.parent), version_base=None):
        read = _compose(path.stem)
    with written.written_folder(path.parent):
        return read, _compose(path.stem)


def _compose(name: str) -> dict[str, Any]:
    from hydra import compose

    tree = OmegaConf.to_container(compose(config_name=name), resolve=False)
    if not isinstance(tree, dict):
        raise OSError("the file is not a mapping of keys")
    return {str(key): value for key, value in tree.items()}


def _store_base_names() -> None:
    """Let `defaults: [ppo_trainer]`, as verl's recipes have it, mean our own defaults."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="ppo_trainer", node={}, provider="steepest")
