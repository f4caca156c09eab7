"""The command line and YAML files, read into a flat list of assignments. Nothing is checked against a schema here.

Hydra reads both: its override grammar for `key=value`, its compose API for files, so `defaults:` lists and
interpolations work. No Hydra app is started: no outputs folder, no change of directory, no logging set up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steepest.config import written
from steepest.config.types import text_problem

COMMAND_LINE = "command line"
PRESETS = Path(__file__).parent / "presets"
_FLAGS = {
    "--config-name": "config_name",
    "-cn": "config_name",
    "--config-path": "config_path",
    "-cp": "config_path",
    "--config-dir": "config_path",
    "-cd": "config_path",
    "--cfg": "cfg",
    "-c": "cfg",
}


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
    cfg: str | None = None
    config_name: str | None = None
    config_path: str | None = None


def read_arguments(argv: list[str]) -> Arguments:
    """Flags, then the YAML file if one is named, then `key=value` in order. Never raises: see `problems`."""
    out = Arguments()
    overrides = _read_flags(argv, out)
    _read_file(out)
    for text in overrides:
        try:
            out.assignments.append(read_override(text))
        except ValueError as error:
            out.problems.append(str(error))
    return out


def _read_flags(argv: list[str], out: Arguments) -> list[str]:
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, has_value, value = word.partition("=")
        if word in ("--help", "-h", "--hydra-help"):
            out.help = True
        elif name in _FLAGS:
            found = value if has_value else next(words, None)
            if not found or found.startswith("-"):
                out.problems.append(f"{name}: needs a value, e.g. {name} {'job' if 'c' in name[:3] else 'NAME'}.")
            else:
                setattr(out, _FLAGS[name], found)
        elif word in ("-m", "--multirun"):
            out.problems.append(f"{word}: Steepest makes one run a command. Call it once for each value.")
        elif word in ("--resolve", "--run", "-r"):
            continue
        elif word.startswith("-"):
            hint = f" Keys are written without dashes: {word.lstrip('-')}" if has_value else ""
            out.problems.append(
                f"{word}: no such option. There are --help, --cfg job, --config-name, --config-path.{hint}"
            )
        else:
            rest.append(word)
    if out.cfg not in (None, "job", "all"):
        out.problems.append(f"--cfg {out.cfg}: must be job.")
    return rest


def read_override(text: str) -> Assignment:
    """One `key=value`, `+key=value`, `++key=value` or `~key`. Raises ValueError with the whole message."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    bare = text.lstrip("+~")
    if "=" not in text and not text.startswith("~"):
        raise ValueError(f"{text!r}: not a setting. Write key=value, e.g. trainer.device=cpu.")
    if not bare.partition("=")[0].strip():
        raise ValueError(f"{text!r}: no key before the equals sign. Write key=value, without spaces around it.")
    if problem := text_problem(text):
        raise ValueError(f"{text}: {problem}.")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return _read_loosely(text)
    key = override.get_key_element().lstrip("+~")
    if override.is_sweep_override():
        value = text.partition("=")[2]
        raise ValueError(
            f"{key}={value}: several values for one key make a sweep, and Steepest makes one run a command. "
            f"A list is written '{key}=[{value}]'."
        )
    return Assignment(
        key, override.value(), COMMAND_LINE, written.override_text(text), override.is_delete(), "=" in text
    )


def _read_loosely(text: str) -> Assignment:
    """What Hydra's grammar refuses although the meaning is plain: ~/a.parquet, run (1), a=b in a value, Jinja text."""
    key, _, value = text.partition("=")
    bare = key.lstrip("+~")
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


def _read_file(out: Arguments) -> None:
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
    is_preset = path.parent == PRESETS
    source = f"preset {path.stem}" if is_preset else f"file {path}"
    try:
        tree, texts = compose_file(path)
    except _composition_errors() as error:
        reason = " ".join(str(error).split())
        out.problems.append(f"--config-name={name}: {path} cannot be read: {reason}")
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


def compose_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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
