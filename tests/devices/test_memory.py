"""Out of memory: recognised whoever says it, and told with sizes and remedy."""

from __future__ import annotations

import pytest
import torch

from steepest.devices import MemoryStats
from steepest.devices.backends.cpu import CPUDevice
from steepest.devices.memory import memory_guard, readable
from steepest.errors import DeviceError, DeviceMemoryError, RolloutError

WORDS = ("actor update: a micro-batch of 8 sequence(s), 900 tokens", "Lower some.key below 8 (now 8).")


class Card(CPUDevice):
    name = "card"

    def memory(self, index: int = 0) -> MemoryStats:
        return MemoryStats(total=80 * 2**30, available=3 * 2**29, peak=78 * 2**30)


def guarded(error: BaseException) -> str:
    with pytest.raises(DeviceMemoryError) as caught, memory_guard(Card(), lambda: WORDS):
        raise error
    assert caught.value.__cause__ is error and isinstance(caught.value, DeviceError)
    return str(caught.value)


HELD = "(80.00 GiB in all, 1.50 GiB free; this process held at most 78.00 GiB). Lower some.key below 8 (now 8)."


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."), "20.00 MiB"),
        (RuntimeError("NPU out of memory. Tried to allocate 1.40 GiB (NPU 0; 32.00 GiB total ...)"), "1.40 GiB"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."),
            "3.00 GiB",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (MemoryError(), None),
    ],
)
def test_whoever_says_it(error: BaseException, asked: str | None) -> None:
    more = f", {asked} more were asked for" if asked else ""
    assert guarded(error) == f"{WORDS[0]}: out of memory on card{more} {HELD}"


def test_a_real_allocation_that_fails_on_the_cpu() -> None:
    with (
        pytest.raises(
            DeviceMemoryError, match=r"out of memory on cpu, 3725.29 GiB more were asked for \(.* GiB in all"
        ),
        memory_guard(CPUDevice(), lambda: WORDS),
    ):
        torch.empty(10**12)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), RolloutError("NaN")],
)
def test_other_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_guard(Card(), lambda: pytest.fail("asked")):
        raise error
    assert caught.value is error


def test_the_inner_guard_is_the_one_that_speaks() -> None:
    inner, outer = memory_guard(Card(), lambda: WORDS), memory_guard(Card(), lambda: ("outer", ""))
    with pytest.raises(DeviceMemoryError, match="^actor update"), outer, inner:
        raise MemoryError


def test_sizes_are_readable() -> None:
    assert [readable(n) for n in (12, 2**10, 3 * 2**19, 31 * 2**30)] == [
        "12 bytes",
        "1.00 KiB",
        "1.50 MiB",
        "31.00 GiB",
    ]
