"""How a command starts and ends: exit codes, error messages, and what must be set before torch is imported.

An entry point (`main_ppo`, `main_sft`, ...) imports this module first and torch only inside its functions. What keeps
a broken torch-npu from ending every run is set in `steepest/__init__.py`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from steepest.errors import ConfigError, SteepestError

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
SCHEDSTAT = Path("/proc/self/schedstat")


def waiting_defaults(environment: Mapping[str, str], schedstat: Path = SCHEDSTAT) -> dict[str, str]:
    """Variables that make waiting threads behave as `process/openmp_waiting.py` describes; empty if the user set one.

    Where the kernel keeps no account of threads that wait for a core, nobody would notice others on the cores: there
    waiting threads sleep at once.
    """
    if WAIT_POLICY in environment or SPIN_COUNT in environment:
        return {}
    try:
        counted = int(schedstat.read_text().split()[0]) > 0  # this process has run, so 0 means: not counted
    except (OSError, ValueError, IndexError):
        counted = False
    return {WAIT_POLICY: "PASSIVE", SPIN_COUNT: "20000"} if counted else {WAIT_POLICY: "PASSIVE"}


# The OpenMP library reads them when torch is imported; later they would change nothing.
OUR_WAITING = {} if "torch" in sys.modules else waiting_defaults(os.environ)
"""Those variables that this process set by itself."""
os.environ.update(OUR_WAITING)

LOADED = time.perf_counter()
"""When the command started, but for the interpreter's own start."""

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_MAX_PROBLEMS = 20
"""Problems shown in full, so that the message fits on a screen."""

Main = Callable[[list[str]], "int | None"]


def run_entry(main: Main, argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and give the exit code of the process: `sys.exit(run_entry(main))`.

    `argv` is without the program's name; None means that of this process. None from `main` counts as 0. A
    SteepestError is printed on standard error without traceback (2), Ctrl-C in one word (130). Any other exception is a
    bug of ours and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: main(arguments))


def guarded(call: Callable[[], int | None]) -> int:
    """`run_entry` for a function that takes no arguments."""
    try:
        code = call()
    except SteepestError as error:
        print(_red(describe(error)), file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(
            "\nInterrupted. The same command resumes from the last checkpoint, or starts again where none was written.",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_INTERRUPTED
    return EXIT_OK if code is None else code


def describe(error: SteepestError) -> str:
    """The message of an error, on one screen: several problems of the configuration become a numbered list."""
    if not isinstance(error, ConfigError) or len(error.problems) == 1:
        return f"error: {error}"
    shown = error.problems[:_MAX_PROBLEMS]
    lines = [f"error: {len(error.problems)} problems:"]
    lines += [f"  {i}. {problem}" for i, problem in enumerate(shown, 1)]
    if len(shown) < len(error.problems):
        lines.append(f"  and {len(error.problems) - len(shown)} more; fix these first.")
    return "\n".join(lines)


def _red(text: str) -> str:
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[31m{text}\033[0m"
