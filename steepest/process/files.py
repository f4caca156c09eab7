"""Files that outlive a kill, and what some file systems do not do: locks, syncs of folders, a count of free space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

_RUST_ERROR = re.compile(r"(?:\(os error |Os \{ code: )(\d+)")
_NOT_DONE_HERE = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF})
"""A call that the file system does not know. EBADF: one that syncs only what is open for writing."""
_NO_LOCKS = frozenset(
    {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EPERM}
)
_NO_FOLDERS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR})
"""What opening a folder answers on a file system that gives no handle to one."""


def system_errno(error: BaseException) -> int | None:
    """The number of the system's error; None for another kind of exception. safetensors raises an error of its own that
    carries the number in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = _RUST_ERROR.search(str(error))
    return None if found is None else int(found[1])


def replace_text(path: Path, text: str, *, synced: bool = False) -> None:
    """Replace a small file: a reader and a kill see the old text or the new, never a part. An OSError leaves the old
    one, and nothing next to it. `synced`: it is on the disk when this returns."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        if synced:
            sync(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    if synced:
        sync(path.parent)


def sync(path: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the file system can say so."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FOLDERS and path.is_dir():
            return
        raise
    try:
        fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_DONE_HERE and not (error.errno in _NO_FOLDERS and path.is_dir()):
            raise
    finally:
        os.close(handle)


def free_bytes(folder: Path) -> int | None:
    """Bytes that can still be written below a folder; None where the file system does not count them."""
    total, _, free = shutil.disk_usage(folder)
    return free if total > 0 else None


def lock(file: IO[str], flock: Callable[[IO[str], int], None] = fcntl.flock) -> str | None:
    """Lock an open file until it is closed. None, or what the file system answered that has no locks.

    Raises BlockingIOError when another process holds it.
    """
    try:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return error.strerror or str(error)
    return None


class LineFile:
    """Appends whole lines to a file: each is there, for readers and after a kill, when `append` returns.

    Nothing is kept in a buffer: an error is raised once, by the line that could not be written, and that line leaves
    no part behind if the file can still be cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        """Write `line` and the end of the line. Raises OSError."""
        # a lone surrogate becomes \udcXX, which is what JSON calls it
        rest = memoryview(line.encode("utf-8", "backslashreplace") + b"\n")
        written, before = 0, os.fstat(self._file.fileno()).st_size
        try:
            while written < len(rest):
                written += self._file.write(rest[written:])
        except OSError:
            self._cut(before, before + written)
            raise

    def _cut(self, size: int, expected: int) -> None:
        if os.fstat(self._file.fileno()).st_size == expected:  # else another process has written behind it
            with contextlib.suppress(OSError):  # the reader of a later start removes the part
                self._file.truncate(size)

    def is_removed(self) -> bool:
        """Whether the file has no name any more, so that nobody could read what is appended."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def close(self) -> None:
        """Raises OSError where the file system reports only now that it could not keep what it took."""
        self._file.close()
