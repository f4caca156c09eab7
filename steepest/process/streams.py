"""Standard output and standard error that never end a process: what cannot be printed is lost, and nothing else is."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import TextIO


def protect_streams() -> None:
    """Let this process print whatever happens to the reader.

    A descriptor that is closed (`>&-`) is opened on /dev/null, so that no file of the run gets its number. A reader
    that is gone (`| head`), a terminal that was closed and a full disk behind `> file` end the printing to that stream.
    A character that the stream's encoding does not have is printed as its escape. Streams that were replaced, by pytest
    or a notebook for example, stay as they are.
    """
    for number in (0, 1, 2):
        _open(number)
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _protected(sys.stdout, 1)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _protected(sys.stderr, 2)


def _open(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        found = os.open(os.devnull, os.O_RDWR)  # the lowest free number, mostly `number` itself
        if found != number:
            os.dup2(found, number)
            os.close(found)
        os.set_inheritable(number, True)


def _protected(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(UnfailingOutput(number)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or os.isatty(number),
    )


class UnfailingOutput(io.RawIOBase):
    """Writes to a descriptor. When that fails, the descriptor is pointed at /dev/null."""

    name: str

    def __init__(self, number: int) -> None:
        self._number = number
        self.name = {1: "<stdout>", 2: "<stderr>"}.get(number, str(number))

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        rest = view
        while rest:
            try:
                rest = rest[os.write(self._number, rest) :]
            except BlockingIOError:  # a pipe that the other side made non-blocking
                select.select([], [self._number], [])
            except OSError:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._number)
                os.close(null)
                break
        return len(view)
