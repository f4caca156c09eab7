"""Out of memory, in words: which model, which pass, how much there was, and which setting to lower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from steepest.devices.api import Device
from steepest.errors import DeviceMemoryError

RESUMES = "The same command resumes from the last checkpoint, where one was written."
"""For the end of a remedy."""


@contextmanager
def memory_guard(device: Device, doing: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Turn an out-of-memory error of the body into a DeviceMemoryError.

    `doing` is asked only then: what was being done ("actor update: a micro-batch of 8 sequences, 9000 tokens") and
    what to do about it, a sentence.
    """
    try:
        yield
    except DeviceMemoryError:  # reported already, by a guard inside this one
        raise
    except Exception as error:
        if not device.is_out_of_memory(error):
            raise
        what, remedy = doing()
        raise DeviceMemoryError(
            f"{what}: out of memory on {device.name}{_asked(str(error))}{_held(device)}. {remedy}"
        ) from error


def _asked(words: str) -> str:
    """How much was asked for, where torch says it."""
    found = re.search(r"tried to allocate ([\d.]+ ?[KMGT]iB|\d+ bytes)", words, flags=re.I)
    if found is None:
        return ""
    size = readable(int(found[1].split()[0])) if found[1].endswith("bytes") else found[1]
    return f", {size} more were asked for"


def _held(device: Device) -> str:
    memory = device.memory()
    return (
        f" ({readable(memory.total)} in all, {readable(memory.available)} free; this process held at most "
        f"{readable(memory.peak)})"
    )


def readable(size: int) -> str:
    """12 bytes, 1.50 MiB, 31.00 GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
