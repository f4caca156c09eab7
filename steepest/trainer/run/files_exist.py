"""The first check of a command: that the files which its configuration names are there. It needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from steepest.config.schema import Config, SFTConfig
from steepest.config.sections.reward import functions_of
from steepest.errors import ConfigError
from steepest.hub.local import looks_like_a_path
from steepest.registry import PACKAGE, is_own_code

DATA = (".parquet", ".json", ".jsonl", ".csv", ".tsv", ".gz")


def check_files(config: Config | SFTConfig) -> None:
    """Raises ConfigError with every file and folder that is missing. What may be a hub id is looked up later."""
    problems = [
        f"{key}={path!r}: there is no such file (looked for {Path(path).expanduser().absolute()})."
        for key, path in (*_data(config), *_models(config), *_rewards(config))
        if path and _is_missing(Path(path).expanduser())
    ]
    if problems:
        raise ConfigError(problems)


def _is_missing(path: Path) -> bool:
    """False where the system refuses to look, as with a name that is too long: who reads the file says why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _data(config: Config | SFTConfig) -> Iterator[tuple[str, str]]:
    for key in ("train_files", "val_files"):
        for file in getattr(config.data, key):
            if Path(file).suffix.lower() in DATA and not set(file) & set("*?["):  # a pattern is looked up later
                yield f"data.{key}", file


def _models(config: Config | SFTConfig) -> Iterator[tuple[str, str]]:
    if isinstance(config, SFTConfig):
        actor, critic, section = config.model, None, "model"
    else:
        actor, critic, section = config.actor_rollout_ref.model, config.critic.model, "actor_rollout_ref.model"
    found = {str(actor.path): f"{section}.path"}  # tokenizer and critic are mostly the actor's
    found.setdefault(str(actor.tokenizer_path or ""), f"{section}.tokenizer_path")
    if critic is not None:
        found.setdefault(str(critic.path or ""), "critic.model.path")
    yield from ((key, path) for path, key in found.items() if looks_like_a_path(path))


def _rewards(config: Config | SFTConfig) -> Iterator[tuple[str, str]]:
    if isinstance(config, SFTConfig):
        return
    path = config.custom_reward_function.path or ""
    if not path.startswith(PACKAGE):  # a module is looked for by the process that imports it
        yield "custom_reward_function.path", path
    for function in functions_of(config.reward.functions):
        file = function.name.rpartition(":")[0]
        if is_own_code(function.name) and file.endswith(".py"):
            yield "reward.functions", file
