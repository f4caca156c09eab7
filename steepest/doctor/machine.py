"""Lines about the machine: system, cores and threads, memory, disk."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steepest.checks import Check, ok, problem, warning
from steepest.doctor.probe_client import Answers
from steepest.process.cores import usable_cores

TESTED_PYTHON = ((3, 10), (3, 13))
GIB = 1024**3
LITTLE_MEMORY = 4 * GIB
LITTLE_DISK = 10 * GIB
NO_DISK = 1 * GIB
LITTLE_SHARED_MEMORY = 1 * GIB
SHARED_MEMORY = Path("/dev/shm")
THREADS = "OMP_NUM_THREADS"


def system(python: tuple[int, ...] = sys.version_info[:2]) -> list[Check]:
    """Operating system and Python; `python` is the (major, minor) version that is compared with the tested ones."""
    version = platform.python_version()
    first, last = (".".join(map(str, limit)) for limit in TESTED_PYTHON)
    where = f"{version} ({sys.executable})"
    lines = [ok("system", f"{platform.system()} {platform.release()}, {platform.machine()}")]
    if python > TESTED_PYTHON[1]:
        return [*lines, warning("python", f"{where} is newer than the tested {first} to {last}", f"use Python {last}")]
    return [*lines, ok("python", where)]


def processors(answers: Answers, cores: int | None = None) -> list[Check]:
    """Cores that this process may use (`cores`; None: ask the system), and how many threads torch starts on them."""
    cores = usable_cores() if cores is None else cores
    total = os.cpu_count() or cores
    lines = [ok("cores", f"{cores} usable" + (f" of {total} in the machine" if total != cores else ""))]
    given, threads = os.environ.get(THREADS), answers.torch.get("threads")
    told = f"{THREADS}={given}" if given else f"{THREADS} is unset"
    if given and not given.split(",")[0].strip().isdigit():
        return [*lines, warning("threads", f"{THREADS}={given} is no number", f"export {THREADS}={cores}")]
    if threads is None:
        return [*lines, ok("threads", told)]
    text = f"torch computes with {threads} on {cores} cores ({told})"
    if threads > cores:
        return [*lines, warning("threads", f"{text}: more threads than cores are slow", f"export {THREADS}={cores}")]
    if threads < cores // 2 or (threads == 1 and cores > 1):
        return [*lines, warning("threads", f"{text}: a CPU run leaves cores idle", f"export {THREADS}={cores}")]
    return [*lines, ok("threads", text)]


def memory(answers: Answers) -> list[Check]:
    """Main memory, or the limit of the container."""
    facts: Mapping[str, Any] = answers.devices.get("cpu", {})
    if "memory_total" not in facts:
        return []  # torch cannot be imported; the lines about versions report it
    free = facts["memory_available"]
    text = f"{gib(free)} free of {gib(facts['memory_total'])}"
    if free < LITTLE_MEMORY:
        return [warning("memory", f"{text}: little for a model", "end other programs, or take a larger machine")]
    return [ok("memory", text)]


def disk(shared_memory: Path = SHARED_MEMORY) -> list[Check]:
    """The default folder of runs, and shared memory if its folder exists."""
    lines = [folder_line("working folder", Path.cwd())]
    if shared_memory.is_dir():
        total, _, free = shutil.disk_usage(shared_memory)
        text = f"{gib(free)} free of {gib(total)} in {shared_memory}"
        if total < LITTLE_SHARED_MEMORY:
            remedy = "start the container with --shm-size=16g, if several processes are to work together"
            lines.append(warning("shared memory", f"{text}: little for several processes", remedy))
        else:
            lines.append(ok("shared memory", text))
    return lines


def folder_line(name: str, folder: Path, *, needed: bool = True) -> Check:
    """Check that a folder can be written, and print its free space. If it does not exist, its parent folder is checked.

    For a folder that not every run needs, the line is at most a warning.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    remedy = "set trainer.default_local_dir to another folder" if needed else "point its variable at another folder"
    bad = problem if needed else warning
    if not os.access(there, os.W_OK | os.X_OK):
        return bad(name, f"{folder} cannot be written to", remedy)
    total, _, free = shutil.disk_usage(there)
    text = f"{gib(free)} free of {gib(total)} in {folder}"
    if free < NO_DISK:
        return bad(name, f"{text}: too little for a model", remedy)
    if free < LITTLE_DISK:
        return warning(name, f"{text}: little for models and checkpoints", remedy)
    return ok(name, text)


def gib(size: float) -> str:
    """Bytes as GiB with one decimal."""
    return f"{size / GIB:.1f} GiB"
