"""The errors that a key, a file, a reward or a machine can cause.

    SteepestError
    |- ConfigError      (ValueError)    a key of the configuration, or several at once
    |- DataError        (ValueError)    a row or a file of the data
    |- ModelError       (ValueError)    a model folder, hub id or tokenizer
    |- DeviceError      (RuntimeError)  a device that was asked for and is not there
    |  `- DeviceMemoryError             a device whose memory does not suffice
    |- RewardError      (RuntimeError)  a reward function that fails too often
    |- RolloutError     (RuntimeError)  a generation engine
    `- CheckpointError  (RuntimeError)  a checkpoint that cannot be written or read

Every message names the thing, the value found, what is allowed and what to do. The command line prints
these without a traceback; any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class SteepestError(Exception):
    """Base class of the errors that a user can cause and fix."""


class ConfigError(SteepestError, ValueError):
    """One or several problems of the configuration, all reported at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)


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
