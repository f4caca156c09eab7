"""Measures the rate of plain matrix products on this machine. `perf/mfu` is a share of this rate."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from steepest.devices.api import Accelerator, Device

SECONDS = 0.25
"""Duration of a measurement."""
_SIZES = (256, 512, 1024, 2048, 4096)
"""Rows and columns of the matrices."""
_SHORT = 1e-3
"""If a product takes fewer seconds than this, a larger one is tried, which may use more cores."""


def gemm_rate(
    device: Device, dtype: torch.dtype, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Operations per second of square matrix products in `dtype`, with the threads of this process.

    It returns the best of several measurements, since others may have used the machine in the rest of them. It takes
    about `seconds`.
    """
    deadline = clock() + seconds
    best, sizes = 0.0, iter(_SIZES)
    size = next(sizes)
    _product(device, dtype, size, clock, times=1)  # starts threads, loads kernels
    while not best or clock() < deadline:
        rate = _product(device, dtype, size, clock)
        best = max(best, rate)
        if 2 * size**3 / rate < _SHORT:
            size = next(sizes, size)
    return best


def _product(device: Device, dtype: torch.dtype, size: int, clock: Callable[[], float], times: int = 3) -> float:
    """The rate over `times` successive products."""
    with torch.inference_mode():
        a = torch.ones(size, size, dtype=dtype, device=device.torch_device())
        out = torch.empty_like(a)
        device.synchronize()
        start = clock()
        for _ in range(times):
            torch.mm(a, a, out=out)
        device.synchronize()
    return times * 2 * size**3 / (clock() - start)


def describe_rate(rate: float, dtype: torch.dtype, device: Device) -> str:
    """One sentence for the start summary."""
    number = f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
    threads = "" if isinstance(device, Accelerator) else f" with {torch.get_num_threads()} thread(s)"
    kind = str(dtype).removeprefix("torch.")
    return f"{number} in {kind} matrix products, measured{threads}; perf/mfu is the share of it that was used"
