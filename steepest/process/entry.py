"""How a command starts and ends: exit codes, error messages, and what must be set before torch is imported.

An entry point (`main_ppo`, `main_sft`, ...) imports this module first and torch only inside its functions.
`steepest/__init__.py` sets the variable that keeps a broken torch-npu from ending every run.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from steepest.errors import ConfigError, SteepestError
from steepest.process.files import system_errno
from steepest.process.stopping import STOP, Stopped, tell
from steepest.process.streams import protect_streams

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
SCHEDSTAT = Path("/proc/self/schedstat")
PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's cache of compiled operations, and that of the layer between it and torch."""
KEPT_PRIMITIVES = "128"
"""More than one step of decoding or one micro-batch needs, whose layers repeat the same shapes."""


def waiting_defaults(environment: Mapping[str, str], schedstat: Path = SCHEDSTAT) -> dict[str, str]:
    """Variables that make waiting threads behave as `process/openmp_waiting.py` describes; empty if the user set one.

    Where the kernel does not count the time that threads wait for a core, other processes on the cores cannot be
    noticed; there waiting threads sleep at once.
    """
    if WAIT_POLICY in environment or SPIN_COUNT in environment:
        return {}
    try:
        counted = int(schedstat.read_text().split()[0]) > 0  # this process has run, so 0 means: not counted
    except (OSError, ValueError, IndexError):
        counted = False
    return {WAIT_POLICY: "PASSIVE", SPIN_COUNT: "20000"} if counted else {WAIT_POLICY: "PASSIVE"}


def primitive_defaults(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that bound what oneDNN keeps on a CPU; without those that the user set.

    oneDNN compiles an operation for each shape and keeps 1024 of them, about 0.6 MB each. Packed sequences have another
    number of tokens in each micro-batch, so that most of them never serve again.
    """
    given = {name.replace("DNNL_", "ONEDNN_", 1) for name in environment}  # oneDNN reads its older names too
    return {name: KEPT_PRIMITIVES for name in PRIMITIVE_CACHES if name not in given}


# The OpenMP library and oneDNN read them when torch is imported or first computes; later they would change nothing.
OUR_WAITING = {} if "torch" in sys.modules else waiting_defaults(os.environ)
"""The variables of waiting threads that this process has set, and the user has not."""
os.environ.update(OUR_WAITING)
if "torch" not in sys.modules:
    os.environ.update(primitive_defaults(os.environ))

LOADED = time.perf_counter()
"""Time at which the command started, after the start of the interpreter."""

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
"""128 and the number of the signal, as a shell has it: 130 for Ctrl-C, 143 for SIGTERM."""
RESUMES = "The same command resumes from the last checkpoint, or starts again if none was written."
GOES_ON = "The same call continues from the last checkpoint, or starts again if none was written."
_MAX_PROBLEMS = 20
"""Number of problems shown in full, so that the message fits on a screen."""

_OF_THE_MACHINE = frozenset(
    {errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP}
    | {errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
)
"""Faults of a disk, a folder or a limit: a traceback says nothing more about them."""

Main = Callable[[list[str]], "int | None"]


def run_entry(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and return the exit code of the process: `leave(run_entry(main))`.

    `argv` does not hold the program's name; None means the arguments of this process. None from `main` counts as 0. A
    SteepestError, and what the system refuses (a full disk, a folder without permission), is printed on standard error
    without traceback (exit code 2, or that of the error's class), a signal as one sentence (128 and its number). Any
    other exception is a bug of ours and keeps its traceback. What the command prints cannot end it: see streams.py.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: main(arguments))


def guarded(call: Callable[[], int | None]) -> int:
    """`run_entry` for a function that takes no arguments."""
    protect_streams()
    try:
        with STOP.watch():
            code = call()
    except SteepestError as error:
        print(_red(describe(error)), file=sys.stderr, flush=True)
        return error.exit_code
    except Stopped as stopped:
        tell(f"Stopped by {stopped.name}. {stopped.note or RESUMES}")
        return stopped.exit_code
    except Exception as error:
        if system_errno(error) not in _OF_THE_MACHINE:
            raise
        print(_red(f"error: {describe_fault(error)}"), file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        tell(f"Interrupted. {RESUMES}")
        return EXIT_INTERRUPTED
    return EXIT_OK if code is None else code


@contextmanager
def stoppable() -> Iterator[None]:
    """What `run_entry` does for a command, around a job that a Python program starts: a signal ends it after its step.
    Errors and the interrupt reach the program, whose output streams stay its own."""
    with STOP.watch(ends_process=False):
        try:
            yield
        except Stopped as stopped:
            tell(f"Stopped by {stopped.name}. {stopped.note or GOES_ON}")
            raise


_LEAVING: list[int] = []
"""The exit code, once `leave` was called."""


def leave(code: int) -> NoReturn:
    """End the process, without the seconds that the interpreter takes to clear up after torch.

    Threads are waited for and functions registered by `atexit` run, as always; then the process ends.
    """
    _LEAVING.append(code)
    sys.exit(code)


@atexit.register  # first of all, so that it runs last: this module is imported before torch and every logger
def _end() -> None:
    if _LEAVING:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a pipe that nobody reads any more
                stream.flush()
        os._exit(_LEAVING[-1])


def describe(error: SteepestError) -> str:
    """The message of an error. Several problems of the configuration become a numbered list, cut to fit on a screen."""
    if not isinstance(error, ConfigError) or len(error.problems) == 1:
        return f"error: {error}"
    shown = error.problems[:_MAX_PROBLEMS]
    lines = [f"error: {len(error.problems)} problems:"]
    lines += [f"  {i}. {problem}" for i, problem in enumerate(shown, 1)]
    if len(shown) < len(error.problems):
        lines.append(f"  and {len(error.problems) - len(shown)} more; fix these first.")
    return "\n".join(lines)


def describe_fault(error: Exception) -> str:
    """The message of what the system refused: file, reason, remedy."""
    name = getattr(error, "filename", None)
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"{f'{name}: ' if name else ''}{reason}. Make room, or see to the file or folder and its permissions, then "
        "start the same command again."
    )


def _red(text: str) -> str:
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[31m{text}\033[0m"
