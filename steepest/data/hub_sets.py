"""Data sets on a hub: `OWNER/NAME:CONFIG:SPLIT` -> files on this machine, by what the repository says about itself.

The `configs` of its README name the files of each split. Without them the names of folders and files do, as
`main/train-00000-of-00001.parquet`. Files that are no tables (scripts, archives) are not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from steepest.config.types import Hub
from steepest.data.files import SUFFIXES, expand, suffix_of
from steepest.errors import DataError, setting
from steepest.hub import Source, find, paths_of

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.\-]*/[A-Za-z0-9_][\w.\-]*)(@(?P<revision>[^:]+))?(:(?P<rest>[^/]+))?")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words for it in the names of files."""
FOR_TRAINING = ("train",)
FOR_VALIDATION = ("validation", "test")
_Layout = dict[str, dict[str, list[str]]]
"""Config -> split -> paths in the repository."""


@dataclass(frozen=True)
class HubSet:
    """A data set as the user names it. `parts`: config and split, the split alone, the config alone, or neither."""

    repo: str
    revision: str | None = None
    parts: tuple[str, ...] = ()


def parse(name: str) -> HubSet | None:
    """The data set that `name` means; None for a file."""
    if os.path.exists(Path(name).expanduser()) or expand(name) != [name] or suffix_of(name) in SUFFIXES:
        return None
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    rest = found["rest"]
    return HubSet(found["repo"], found["revision"], tuple(rest.split(":")) if rest else ())


def local_files(
    names: Sequence[str], *, hub: Hub, key: str, splits: Sequence[str] = FOR_TRAINING, note: Callable[[str], None]
) -> list[str]:
    """The names with the files of each data set of a hub in its place. `splits`: which split is taken where the name
    has none, the first that there is. Raises DataError: no such data set, config or split, or no file that is read."""
    files: list[str] = []
    for name in names:
        wanted = parse(name)
        files += [name] if wanted is None else _fetch(name, wanted, hub, key, splits, note)
    return files


def _fetch(
    name: str, wanted: HubSet, hub: Hub, key: str, splits: Sequence[str], note: Callable[[str], None]
) -> list[str]:
    source = Source(
        wanted.repo,
        hub,
        key,
        f"{setting('data_hub')}=",
        revision=wanted.revision,
        revision_option=f"{key}={wanted.repo}@",
        local_option=f"{key}=FILE",
        noun="data set",
    )
    try:
        paths = paths_of(source, kind="dataset")
    except DataError as error:  # a name with one slash may have been meant as a file
        looked = Path(name).expanduser().absolute()
        raise DataError(f"{error.marked} There is no file of this name either (looked for {looked}).") from error
    readme = {}
    if "README.md" in paths:
        folder = find(source, kind="dataset", files=("README.md",), note=lambda _: None).path
        readme = front_matter((folder / "README.md").read_text(encoding="utf-8", errors="replace"))
    files = [path for path in paths if suffix_of(path) in SUFFIXES and not _is_about(path)]
    layout = _declared(readme, files) or _guessed(files)
    config, split = _choose(layout, wanted.parts, splits, f"{key}={name}", _default(readme), paths)
    chosen = layout[config][split]
    note(f"{key}={name}: config {config!r}, split {split!r}, {len(chosen)} {'file' if len(chosen) == 1 else 'files'}")
    folder = find(source, kind="dataset", files=chosen, note=note).path
    return [str(folder / path) for path in chosen]


def front_matter(text: str) -> dict[str, Any]:
    """The YAML at the head of a README; empty where there is none that can be read."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text.lstrip("\ufeff"), flags=re.S)
    try:
        tree = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _declared(readme: Mapping[str, Any], files: Sequence[str]) -> _Layout:
    """The layout that the README's `configs` state."""
    layout: _Layout = {}
    configs = readme.get("configs")
    for config in configs if isinstance(configs, list) else []:
        stated = config.get("data_files") if isinstance(config, dict) else None
        entries = stated if isinstance(stated, list) else [stated]
        for entry in entries:
            entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
            patterns = entry.get("path")
            patterns = patterns if isinstance(patterns, list) else [patterns]
            fits = [path for path in files if any(_matches(path, str(pattern)) for pattern in patterns)]
            if fits:
                splits = layout.setdefault(str(config.get("config_name", "default")), {})
                splits[str(entry.get("split", "train"))] = fits
    return layout


def _matches(path: str, pattern: str) -> bool:
    """`**/` also matches no folder at all, as in the shell."""
    return fnmatch(path, pattern) or fnmatch(path, pattern.replace("**/", ""))


def _guessed(files: Sequence[str]) -> _Layout:
    """The layout that the names of folders and files show. A file whose name has no split is one of train."""
    folders = {PurePosixPath(path).parts[0] for path in files if "/" in path}
    has_configs = len(folders) > 1 and not any(_split_of(folder) for folder in folders)
    layout: _Layout = {}
    for path in files:
        config = PurePosixPath(path).parts[0] if has_configs and "/" in path else "default"
        layout.setdefault(config, {}).setdefault(_split_of(path) or "train", []).append(path)
    return layout


def _split_of(path: str) -> str | None:
    words = re.split(r"[^a-z]+", path.lower())
    return next((split for split, names in _SPLITS.items() if set(names) & set(words)), None)


def _is_about(path: str) -> bool:
    """Files of a repository that describe it."""
    name = PurePosixPath(path).name
    return name.startswith(".") or name in ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")


def _default(readme: Mapping[str, Any]) -> str:
    configs = readme.get("configs")
    stated = [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    return next((str(one.get("config_name", "default")) for one in stated if one.get("default")), "default")


def _choose(
    layout: _Layout, parts: Sequence[str], splits: Sequence[str], named: str, default: str, paths: Sequence[str]
) -> tuple[str, str]:
    """Config and split."""
    if not layout:
        there = ", ".join(paths[:8]) or "nothing"
        raise DataError(f"{named}: the data set has no file that is read ({', '.join(SUFFIXES)}); it holds {there}.")
    every = [f"{config}:{split}" for config, found in layout.items() for split in found]
    known = f"There are {', '.join(every[:20])}{', ...' if len(every) > 20 else ''}."
    base = named.partition(":")[0]
    if len(parts) > 2:
        raise DataError(f"{named}: expected {base}:CONFIG:SPLIT. {known}")
    config = next(iter(layout)) if len(layout) == 1 else default
    split = None
    if len(parts) == 2:
        config, split = parts
    elif parts and (parts[0] in layout.get(config, {}) or parts[0] not in layout):
        split = parts[0]
    elif parts:
        config = parts[0]
    if config not in layout:
        what = f"no config {config!r}" if len(parts) == 2 else "several configs, and none is the default"
        raise DataError(f"{named}: the data set has {what}. {known} Write one of them as {base}:CONFIG:SPLIT.")
    if split is None:
        split = next((one for one in splits if one in layout[config]), None)
        split = next(iter(layout[config])) if split is None and len(layout[config]) == 1 else split
    if split not in layout[config]:
        wanted = f"no split {split!r}" if split else f"no split {' or '.join(map(repr, splits))}"
        raise DataError(f"{named}: {wanted} in config {config!r}. {known}")
    return config, split
