"""The errors that a key, a file, a reward or a machine can cause, and how messages name settings.

    SteepestError
    |- ConfigError      (ValueError)    a key of the configuration, or several at once
    |- DataError        (ValueError)    a row or a file of the data
    |- ModelError       (ValueError)    a model folder, hub id or tokenizer
    |- DeviceError      (RuntimeError)  a device that was asked for and is not there
    |  `- DeviceMemoryError             a device whose memory does not suffice
    |- RewardError      (RuntimeError)  a reward function that fails too often
    |- RolloutError     (RuntimeError)  a generation engine
    |- CheckpointError  (RuntimeError)  a checkpoint that cannot be written or read
    `- HealthError      (RuntimeError)  a run that is sick, where the user wants it to end then

Every message names the thing, the value found, what is allowed and what to do. The command line prints
these without a traceback; any other exception is a bug of ours and keeps its traceback.

Code below the jobs does not know configuration keys. It names a setting, and the job that runs names its key:

    raise DeviceMemoryError(f"Lower {setting('max_num_seqs')} (now {n}).")

    without a job                                    Lower max_num_seqs (now 64).
    within key_names(PPO_KEYS), in the PPO job       Lower actor_rollout_ref.rollout.max_num_seqs (now 64).

`config/key_names.py` has the keys of each job.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

_MARK = re.compile("\x02(?:([^\x02\x03|]*)\\|)?([^\x02\x03|]+)\x03")
"""A setting within a text, `name` or `owner|name`, between two control characters, which a terminal does not show."""
_NAMES: ContextVar[tuple[Mapping[str, str], ...]] = ContextVar("_NAMES", default=())
"""The names of the `key_names` blocks that are open, the innermost first."""


def setting(name: str, of: str = "") -> str:
    """A setting for the text of a message, which `render` replaces by a configuration key.

    `name` may carry a value, as in `setting("trust_remote_code=true")`. `of`: the part of the run that the setting
    belongs to ("critic"), where several parts have one of this name; the keys of a job then have `critic.name`.
    """
    return f"\x02{of}|{name}\x03" if of else f"\x02{name}\x03"


def render(text: str, names: Mapping[str, str] | None = None) -> str:
    """`text` with its settings by their keys in `names`, and those that have none there by their bare names.

    names: setting -> key. None: those of the `key_names` blocks around this call, the innermost first.
    """
    for found in _NAMES.get() if names is None else (names,):
        text = _with_keys(text, found)
    return _MARK.sub(lambda mark: mark[2], text)


def _with_keys(text: str, names: Mapping[str, str]) -> str:
    """`text` with a key for each setting that has one in `names`; the others stay as they are."""

    def key(mark: re.Match[str]) -> str:
        of, name = mark[1], mark[2]
        for known in (f"{of}.{name}", name):
            if known in names:
                return names[known]
        bare, _, value = name.partition("=")
        return f"{names[bare]}={value}" if value and bare in names else mark[0]

    return _MARK.sub(key, text)


@contextmanager
def key_names(names: Mapping[str, str]) -> Iterator[None]:
    """What runs in the block speaks of its settings by these keys: errors that leave it, and what `say` prints in it.

    Blocks nest: the innermost one that has a key for a setting names it. Usable as a decorator.
    """
    token = _NAMES.set((names, *_NAMES.get()))
    try:
        yield
    except SteepestError as error:
        error.bind(names)
        raise
    finally:
        _NAMES.reset(token)


class SteepestError(Exception):
    """Base class of the errors that a user can cause and fix. Its text names settings by the keys that were bound."""

    exit_code: ClassVar[int] = 2
    """Exit code of a command that ends with this error."""

    @property
    def marked(self) -> str:
        """The text, with settings still to be named: for the message of another error that quotes this one."""
        return super().__str__()

    def bind(self, names: Mapping[str, str]) -> None:
        """Name settings by their keys in `names`. What was bound before stays."""
        self.args = tuple(_with_keys(value, names) if isinstance(value, str) else value for value in self.args)

    def __str__(self) -> str:
        return render(self.marked, {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class ConfigError(SteepestError, ValueError):
    """One or several problems of the configuration, all reported at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.marked_problems = [problems] if isinstance(problems, str) else list(problems)
        """As `marked`, one text a problem."""
        super().__init__("\n".join(self.marked_problems))

    @property
    def problems(self) -> list[str]:
        """One text a problem."""
        return [render(problem, {}) for problem in self.marked_problems]

    def bind(self, names: Mapping[str, str]) -> None:
        """See SteepestError."""
        super().bind(names)
        self.marked_problems = [_with_keys(problem, names) for problem in self.marked_problems]

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.marked_problems,)


class DataError(SteepestError, ValueError):
    """A file or a row of the data is missing, unreadable or malformed."""


class ModelError(SteepestError, ValueError):
    """A model folder, hub id, tokenizer or architecture cannot be used."""


class DeviceError(SteepestError, RuntimeError):
    """The requested device is not usable on this machine."""


class DeviceMemoryError(DeviceError):
    """The memory of a device does not suffice for a model or a pass."""


class RewardError(SteepestError, RuntimeError):
    """Reward functions failed more often than the limit allows."""


class RolloutError(SteepestError, RuntimeError):
    """A rollout engine cannot start or cannot generate."""


class CheckpointError(SteepestError, RuntimeError):
    """A checkpoint cannot be written, or none can be read."""


class HealthError(SteepestError, RuntimeError):
    """A health check found a problem in a run that is to end then."""

    exit_code = 3
