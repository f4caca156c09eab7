"""Another machine than this one: which packages are installed on it, and how much its disk holds."""

from __future__ import annotations

import importlib
import resource
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def only_installed(patch: pytest.MonkeyPatch, site: Path) -> None:
    """The packages of the folder `site` (see `package` in installs.py) are all that is installed; the standard library
    and Steepest can be imported as before, and so can what is imported already."""
    names = ("stdlib", "platstdlib")
    library = [sysconfig.get_path(name) for name in names]
    library += [entry for entry in sys.path if Path(entry).name == "lib-dynload"]
    patch.setattr(sys, "path", [str(site), *library, str(ROOT)])
    importlib.invalidate_caches()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Within the `with` block no file of this process can grow beyond `size` bytes: the system refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_of(patch: pytest.MonkeyPatch, *, total: float, free: float) -> list[Path]:
    """Every disk has `total` bytes and `free` of them free. Returns the folders that are asked about, as they come."""
    asked: list[Path] = []

    def usage(path: Path) -> shutil._ntuple_diskusage:
        asked.append(path)
        return shutil._ntuple_diskusage(int(total), int(total - free), int(free))

    patch.setattr(shutil, "disk_usage", usage)
    return asked
