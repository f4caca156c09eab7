"""Variables of the environment that choose a default: which hub names are fetched from."""

from __future__ import annotations

import os
from collections.abc import Mapping

from steepest.config.types import Hub
from steepest.errors import ConfigError

SWITCHES = ("STEEPEST_USE_MODELSCOPE", "VERL_USE_MODELSCOPE")
"""Either makes ModelScope the default hub; the second is verl's."""
_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off", ""), False),
}


def switch_problems(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What is wrong with the switches: a word that is neither yes nor no, or two that contradict each other."""
    given = {name: environ[name] for name in SWITCHES if name in environ}
    problems = [
        f"{name}={value!r} in the environment: expected True or False (also 1, yes, on; 0, no, off)."
        for name, value in given.items()
        if value.strip().lower() not in _WORDS
    ]
    if not problems and len({_is_on(value) for value in given.values()}) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        problems.append(f"{both} in the environment contradict each other. Unset one of them.")
    return problems


def hub_from_environment(environ: Mapping[str, str] = os.environ) -> tuple[Hub, str | None]:
    """(default hub, what chose it: `VERL_USE_MODELSCOPE=True`, or None where nothing did).

    A wrong switch chooses nothing here: `switch_problems` reports it.
    """
    for name in SWITCHES:
        if name in environ and _is_on(environ[name]):
            return "modelscope", f"{name}={environ[name]}"
    return "huggingface", None


def default_hub(environ: Mapping[str, str] = os.environ) -> Hub:
    """The hub of a command that has no configuration. Raises ConfigError for a wrong switch."""
    if problems := switch_problems(environ):
        raise ConfigError(problems)
    return hub_from_environment(environ)[0]


def _is_on(value: str) -> bool:
    return _WORDS.get(value.strip().lower(), False)
