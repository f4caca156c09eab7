"""Errors for too little memory, which name the model, the pass, the memory there was and the setting to lower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from steepest.devices.api import Device
from steepest.errors import DeviceMemoryError

RESUMES = "The same command resumes from the last checkpoint, if one was written."
"""The last sentence of a remedy."""


@contextmanager
def memory_guard(device: Device, doing: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Turn an out-of-memory error of the body into a DeviceMemoryError.

    `doing` is called only then. It returns what was being done ("actor update: a micro-batch of 8 sequences, 9000
    tokens") and a sentence with the remedy.
    """
    try:
        yield
    except DeviceMemoryError:  # a guard inside this one has reported it
        raise
    except Exception as error:
        if not device.is_out_of_memory(error):
            raise
        what, remedy = doing()
        raise DeviceMemoryError(
            f"{what}: out of memory on {device.name}{_asked(str(error))}{_held(device)}. {remedy}"
        ) from error


def _asked(words: str) -> str:
    """The amount that was requested, if torch's message names it."""
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
